"""What the character-level experiment trains: its settings, the presets, and the arms it compares."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from potqat.config import PoTConfig


def _paper(grid: str) -> PoTConfig:
    """The recipe of PoT-QAT (arXiv 2601.02298) for its character model: one scale a tensor by a moving average with
    the observer floor 2^-12, double rounding, identity gradient; tables on the same grid."""
    return PoTConfig(
        grid=grid, granularity="tensor", scale="paper", rounding="paper", ste="identity", embedding_grid=grid,
        eps=2.0**-12,
    )  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to quantize, compared with the others; ``label`` names it in tables and pictures."""

    label: str
    config: PoTConfig


# In the order of the table's rows; sampled text is shown of the last packed one.
ARMS = {
    "int4-paper": Arm("int4, paper recipe", _paper("int4")),
    "pot9-paper": Arm("PoT 9 levels, paper recipe", _paper("pot(3)")),
    "pot4-paper": Arm("PoT 15 levels, paper recipe", _paper("pot4")),
    "int4": Arm("int4, channel scales", PoTConfig(grid="int4", scale="learned")),
    "pot4": Arm("PoT 15 levels, channel scales", PoTConfig(grid="pot4", scale="learned")),
}


@dataclass(frozen=True)
class Experiment:
    """Settings of one run. The defaults are the papers' model and length with nanoGPT's optimizer settings.

    The float model trains for ``float_iterations``; from that one checkpoint a float control and each of ``arms`` train
    on to ``total_iterations``, all on the same batches and learning rates (``qat_learning_rate`` falling along a cosine
    to ``qat_final_learning_rate``). ``qat``: "eager" or "pt2e". Weights, batches, dropout and samples follow ``seed``.

    Raises:
        ValueError: an unknown arm, or a number out of its range.
    """

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    batch: int = 12
    dropout: float = 0.2
    float_iterations: int = 15_000
    total_iterations: int = 22_500
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    warmup: int = 100
    qat_learning_rate: float = 5e-4
    qat_final_learning_rate: float = 5e-5
    evaluate_every: int = 500
    arms: tuple[str, ...] = tuple(ARMS)
    qat: str = "eager"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.arms:
            if name not in ARMS:
                raise ValueError(f"unknown arm {name!r}; the arms are: {', '.join(ARMS)}")
        for name in ("layers", "heads", "width", "context", "batch", "float_iterations", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.total_iterations <= self.float_iterations:
            raise ValueError(
                f"total_iterations must be more than float_iterations, got {self.total_iterations} and "
                f"{self.float_iterations}"
            )
        if self.qat not in ("eager", "pt2e"):
            raise ValueError(f"qat must be 'eager' or 'pt2e', got {self.qat!r}")

    def fingerprint(self) -> dict:
        """The settings that a resumed run must share. Arms are left out: more of them may be added later."""
        fields = dataclasses.asdict(self)
        del fields["arms"]
        return fields


PRESETS = {
    "reproduce": Experiment(),
    "demo": Experiment(
        float_iterations=1000,
        total_iterations=1400,
        qat_learning_rate=1e-3,
        qat_final_learning_rate=1e-4,
        evaluate_every=100,
        arms=("int4-paper", "pot4-paper", "pot4"),
    ),
}
