"""Perplexity of a long text in windows, and in the same pass the distance to a float reference model.

Windows of ``context`` tokens start at 0, stride, 2 * stride ...; only whole windows count. A window predicts each of
its tokens but the first from the tokens before it in the window, and of these targets the ones count that no earlier
window scored; the first token of the text is never a target. With stride = context, windows share no token and each
scores context - 1 targets: GPTQ's evaluation (arXiv 2210.17323). With a smaller stride, each window after the first
scores its last ``stride`` tokens, and each of them sees at least context - stride tokens: Hugging Face's sliding
window ("Perplexity of fixed-length models").

Every figure comes with a 95% confidence interval: where it would lie over all text of the kind. Tokens of a window
depend on each other, so windows are what is drawn: the spread of their sums gives the error ("clustered" in
arXiv 2411.00640, sections 2.2 and 4.2; llama.cpp's perplexity tool takes tokens as independent, which is narrower).
Models are compared on the same windows, window by window. Neighbouring windows of one document still depend on each
other a little, which no interval here knows.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

POSITIONS = 32  # whose log-probabilities are held at once: 19 MB a float32 array at a vocabulary of 150,000
LARGEST_LOSS = math.log(sys.float_info.max)  # nats a token beyond which a perplexity is no number any more
CONFIDENCE = 0.95

Interval = tuple[float, float]

Model = Callable[[torch.Tensor], torch.Tensor]  # token ids int64 [B, T] -> logits [B, T, V]


@dataclass(frozen=True)
class Windows:
    """The windows over ``tokens`` tokens; len() of it is their number. ``stride``: the context by default.

    Raises:
        ValueError: context < 2, stride outside 1..context, or not one window fits.
    """

    tokens: int
    context: int
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.stride is None:
            object.__setattr__(self, "stride", self.context)
        if self.context < 2:
            raise ValueError(f"context must be at least 2 tokens, one to see and one to predict, got {self.context}")
        if not 1 <= self.stride <= self.context:
            raise ValueError(
                f"stride must be in 1..context, or tokens between windows are lost, got {self.stride} with context "
                f"{self.context}"
            )
        if self.tokens < self.context:
            raise ValueError(
                f"one window of context {self.context} needs as many tokens, got {self.tokens}; give more text or a "
                "smaller context"
            )

    def __len__(self) -> int:
        return (self.tokens - self.context) // self.stride + 1

    def first(self, i: int) -> int:
        """Index inside window ``i`` of the first target that it scores; it scores all from there to its end."""
        return max(1, self.context - self.stride) if i else 1

    def scored(self, i: int) -> int:
        """Targets that window ``i`` scores."""
        return self.context - self.first(i)


class Sums(NamedTuple):
    """Sums over the targets of one window, in nats: what an interrupted evaluation must keep."""

    loss: float
    reference_loss: float | None = None
    kl: float | None = None
    agreed: int | None = None


class Mean(NamedTuple):
    """A mean over targets; ``standard_error`` and ``interval`` (of CONFIDENCE) take windows as independent draws, and
    are None with a single one."""

    value: float
    standard_error: float | None
    interval: Interval | None

    @property
    def exp_interval(self) -> Interval | None:
        """Of the exponential of the mean; not symmetric about it. Ends beyond any float become the largest one."""
        return self.interval and tuple(math.exp(min(end, LARGEST_LOSS)) for end in self.interval)


@dataclass(frozen=True)
class Reference:
    """A float model on the same targets. ``loss`` and ``kl`` = KL(reference || model) are means in nats a token,
    ``loss_difference`` (model - reference) is paired by window; ``top1_agreement`` is the share of targets for which
    both models rank the same token first, its interval within 0..1."""

    loss: float
    kl: float
    kl_standard_error: float | None
    kl_interval: Interval | None
    top1_agreement: float
    top1_interval: Interval | None
    loss_difference: Mean

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@dataclass(frozen=True)
class Perplexity:
    """Mean loss in nats over ``scored`` targets in ``windows`` windows. Standard error and interval (of the perplexity)
    say how far another text of the kind may differ, not how exact the sum is."""

    loss: float
    standard_error: float | None
    interval: Interval | None
    scored: int
    windows: int
    context: int
    stride: int
    reference: Reference | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the perplexities and their ratio (model / reference); ``*interval`` are [low, high]."""
        against = self.reference
        return {
            "perplexity": self.perplexity,
            "perplexity_interval": _listed(self.interval),
            "loss": self.loss,
            "standard_error": self.standard_error,
            "confidence": CONFIDENCE,
            "scored": self.scored,
            "windows": self.windows,
            "context": self.context,
            "stride": self.stride,
            "reference": None if against is None else {
                "perplexity": against.perplexity,
                "perplexity_ratio": math.exp(self.loss - against.loss),
                "perplexity_ratio_interval": _listed(against.loss_difference.exp_interval),
                "loss": against.loss,
                "kl": against.kl,
                "kl_standard_error": against.kl_standard_error,
                "kl_interval": _listed(against.kl_interval),
                "top1_agreement": against.top1_agreement,
                "top1_agreement_interval": _listed(against.top1_interval),
            },
        }  # fmt: skip


@torch.no_grad()
def score(model: Model, tokens: torch.Tensor, windows: Windows, i: int, reference: Model | None = None) -> Sums:
    """Run window ``i`` through ``model`` and then ``reference``, as they are (put modules into eval mode first).

    Log-probabilities are float32, a few positions at a time; their sums are float64.

    Args:
        model, reference: token ids int64 [1, context] -> logits [1, context, V] of any float dtype.
        tokens: int64 [windows.tokens], on the models' device.

    Raises:
        ValueError: logits of another shape, two vocabularies, or a loss or KL that is not a usable number.
    """
    begin, first = i * windows.stride, windows.first(i)
    window = tokens[begin : begin + windows.context]
    logits = _logits(model, "the model", window)[first - 1 : -1]  # (S, V): position p predicts token p + 1
    parts = [window[first:, None].split(POSITIONS), logits.split(POSITIONS)]
    if reference is not None:
        expected = _logits(reference, "the reference model", window)[first - 1 : -1]
        if expected.shape != logits.shape:
            raise ValueError(
                f"the reference model has a vocabulary of {expected.shape[1]} tokens and the model one of "
                f"{logits.shape[1]}; compare models that share a tokenizer"
            )
        parts.append(expected.split(POSITIONS))
    loss = reference_loss = kl = 0.0
    agreed = 0
    for targets, q, *p in zip(*parts, strict=True):
        log_q = q.float().log_softmax(-1)
        loss -= log_q.gather(1, targets).sum(dtype=torch.float64).item()
        if p:
            log_p = p[0].float().log_softmax(-1)
            reference_loss -= log_p.gather(1, targets).sum(dtype=torch.float64).item()
            terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))  # 0 log 0 = 0
            kl += terms.sum(dtype=torch.float64).item()
            agreed += int((p[0].argmax(-1) == q.argmax(-1)).sum())
    for name, total in (("loss", loss), ("loss of the reference model", reference_loss), ("KL", kl)):
        if not abs(total) < LARGEST_LOSS * windows.scored(i):  # NaN compares false
            raise ValueError(
                f"window {i} (tokens {begin} to {begin + windows.context - 1}): the {name} is "
                f"{total / windows.scored(i)} nats a token; the logits of this model are broken, check its weights"
            )
    return Sums(loss) if reference is None else Sums(loss, reference_loss, kl, agreed)


def summarize(windows: Windows, sums: Sequence[Sums]) -> Perplexity:
    """The result from the sums of every window, in order."""
    counts = [windows.scored(i) for i in range(len(windows))]
    loss = mean(counts, [window.loss for window in sums])
    reference = None
    if sums[0].kl is not None:
        kl = mean(counts, [window.kl for window in sums])
        top1 = mean(counts, [window.agreed for window in sums])
        reference = Reference(
            math.fsum(window.reference_loss for window in sums) / sum(counts),
            kl.value, kl.standard_error, kl.interval and (max(0.0, kl.interval[0]), kl.interval[1]),
            top1.value, top1.interval and (max(0.0, top1.interval[0]), min(1.0, top1.interval[1])),
            mean(counts, [window.loss - window.reference_loss for window in sums]),
        )  # fmt: skip
    return Perplexity(
        loss.value, loss.standard_error, loss.exp_interval, sum(counts), len(windows), windows.context, windows.stride,
        reference,
    )  # fmt: skip


def _logits(model: Model, name: str, window: torch.Tensor) -> torch.Tensor:
    logits = model(window[None])
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != (1, len(window)):
        got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        t = len(window)
        raise ValueError(f"{name} must return logits [1, {t}, vocabulary] for token ids [1, {t}], got {got}")
    return logits[0]


def mean(counts: Sequence[int], totals: Sequence[float]) -> Mean:
    """Mean over all targets of sums ``totals`` over windows of ``counts`` targets.

    Its standard error is that of the ratio estimator (the delta method for a quotient of two sums; Cochran, Sampling
    Techniques, 6.3), which for windows of equal count is the usual one of a mean of window means; the interval takes
    Student's t with a degree of freedom less than windows.
    """
    value = math.fsum(totals) / sum(counts)
    n = len(counts)
    if n == 1:
        return Mean(value, None, None)
    squares = math.fsum((total - value * count) ** 2 for total, count in zip(totals, counts, strict=True))
    error = math.sqrt(squares * n / (n - 1)) / sum(counts)
    reach = student_t(n - 1) * error
    return Mean(value, error, (value - reach, value + reach))


def student_t(freedom: int) -> float:
    """How many standard errors an interval of CONFIDENCE reaches to each side, within 0.2% of Student's t.

    Abramowitz and Stegun 26.7.5, and the closed forms for one and two degrees of freedom."""
    p = (1 + CONFIDENCE) / 2
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    x = statistics.NormalDist().inv_cdf(p)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / freedom**i for i, term in enumerate(terms, start=1))


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)
