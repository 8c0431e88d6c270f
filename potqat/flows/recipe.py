"""How ``potqat train`` trains: its settings, and the presets by size of the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from potqat.config import PoTConfig
from potqat.flows.trainer import Phase

LOSSES = ("kl", "ce", "last")
PARTS = ("scales", "norms", "blocks", "all")
DTYPES = ("float32", "bfloat16")
QUANTIZER = PoTConfig(scale="learned", scale_init="output", rounding="reconstruct")


@dataclass(frozen=True)
class Recipe:
    """Settings of one training run, all that its losses depend on but the model, the text and the quantizer.

    Attributes:
        loss: ``"kl"`` to the float model's distribution, or ``"ce"``, cross-entropy with the text, both at every
            position; ``"last"``, cross-entropy at the last position of each window (the papers').
        parts: what is trained: ``"scales"`` (learned ones); ``"norms"``, these and every gain and bias; ``"blocks"``,
            all but the tables (embeddings, and heads tied to them) and their scales; ``"all"``.
        context, batch, accumulate: tokens of a window, windows a pass, passes a step.
        float_steps: of the steps, so many at first in float; what they give is calibrated and trained on, quantized.
        learning_rate, final_learning_rate, scale_learning_rate, weight_decay, betas: as Phase has them.
        float_learning_rate: the same at its highest for what is trained in float: a control, and ``float_steps``.
        warmup: share of the steps in which the learning rates rise.
        dtype: ``"bfloat16"`` runs both models under autocast; weights stay float32.
        checkpointing: keep only the blocks' inputs and compute the rest again for the gradient.
        calibration_tokens: of the training text, for the start; in windows of 512, or of ``context`` if that is less.
        generated_tokens: so many more that the float model (as ``float_steps`` made it) writes by itself.
        held_out: share of the text, its end, that is neither trained nor calibrated on.
        evaluate_every: steps from one point of the curve, and one saved state, to the next.

    Raises:
        ValueError: a value outside its range.
    """

    loss: str = "kl"
    parts: str = "blocks"
    context: int = 256
    batch: int = 4
    accumulate: int = 1
    steps: int = 300
    float_steps: int = 0
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-5
    scale_learning_rate: float = 2e-3
    float_learning_rate: float = 1e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    dtype: str = "float32"
    checkpointing: bool = False
    calibration_tokens: int = 32768
    generated_tokens: int = 0
    held_out: float = 0.125
    evaluate_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("loss", LOSSES), ("parts", PARTS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("context", "batch", "accumulate", "steps", "calibration_tokens", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.generated_tokens < 0:
            raise ValueError(f"generated_tokens must be at least 0, got {self.generated_tokens}")
        if not 0 <= self.float_steps < self.steps:
            raise ValueError(f"float_steps must be from 0 to below the {self.steps} steps, got {self.float_steps}")
        for name in ("learning_rate", "scale_learning_rate", "float_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a share of the steps, from 0 to below 1, got {self.warmup}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be a share of the text between 0 and 1, got {self.held_out}")

    def quantized_phase(self, name: str) -> Phase:
        """Training through the quantizer."""
        return self._phase(name, self.float_steps, self.steps - self.float_steps, self.learning_rate)

    def float_phase(self, name: str, steps: int) -> Phase:
        """Training in float, from the first step on."""
        return self._phase(name, 0, steps, self.float_learning_rate)

    def _phase(self, name: str, start: int, steps: int, rate: float) -> Phase:
        return Phase(
            name=name, start=start, iterations=steps, learning_rate=rate,
            final_learning_rate=self.final_learning_rate * rate / self.learning_rate,
            warmup=round(self.warmup * steps), evaluate_every=self.evaluate_every, seed=self.seed,
            scale_learning_rate=self.scale_learning_rate, scale_decays=True, weight_decay=self.weight_decay,
            betas=self.betas,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return dataclasses.asdict(self) | {"betas": list(self.betas)}


PRESETS = {
    # The reproduction's model, a GPT of 0.8 million parameters: its learning rates.
    "1m": Recipe(
        loss="ce", context=64, batch=12, steps=2000, learning_rate=5e-4, final_learning_rate=5e-5,
        float_learning_rate=5e-4, evaluate_every=200,
    ),
    # SmolLM2-135M from reconstructed blocks, KL: 1e-4 is slower, 1e-3 undoes more than it learns. With
    # cross-entropy 1e-3 went further than 1e-4 (CHANGELOG).
    "100m": Recipe(batch=8, learning_rate=3e-4, final_learning_rate=3e-5),
    # arXiv 2601.02298 for GPT-2 124M: one target a window, 384 a step.
    "papers": Recipe(
        loss="last", parts="all", context=64, batch=12, accumulate=32, steps=500, learning_rate=0.5e-5,
        final_learning_rate=0.5e-5, float_learning_rate=0.5e-5, warmup=0, weight_decay=0.1,
    ),
}  # fmt: skip
LARGE = 20_000_000  # parameters from which a model takes the preset "100m"


def preset_for(skeleton: nn.Module) -> str:
    """The preset that suits the size of a model."""
    return "100m" if sum(parameter.numel() for parameter in skeleton.parameters()) >= LARGE else "1m"
