"""Train a pretrained model through the quantizer, starting from calibrated weights; resumable. Read ``run`` from top to
bottom.

The text's tokens are split by position: training and calibration see the first part, every figure is of the held-out
end. At the end the model is packed, written, read back, and measured on the kernels it will run on, beside the float
model and, where asked for, beside a float control: the same model trained in float on the same windows. Some of the
first steps can be in float, too.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

import potqat
from potqat.flows import calibration_text, evaluate, losses, quantize, results, sources, training_plot, training_start
from potqat.flows.recipe import Recipe
from potqat.flows.text import tokenize
from potqat.flows.trainer import Phase, Trained, stop_on_interrupt, train
from potqat.models.gpt import GPT, GPTConfig
from potqat.plan import check_packable, plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FLOAT, QAT, CONTROL = "float", "qat", "control"  # phases, as names of states and curves
CURVE_TOKENS = 4096  # held-out tokens of a point of the curves, at most
MEASURED_TOKENS = 32768  # held-out tokens of the final figures, at most


@dataclass(frozen=True)
class Data:
    """A text as tokens: ``train`` and ``held_out`` are int64 [tokens], first and last part."""

    name: str
    sha256: str
    train: torch.Tensor
    held_out: torch.Tensor


def load_data(path: Path, tokenizer: PreTrainedTokenizerBase, source: sources.Source, recipe: Recipe) -> Data:
    """Tokenize a UTF-8 text and split it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty, not UTF-8, not for this tokenizer or model, or too short; or the context is longer than
            the model's.
    """
    context = recipe.context
    if context > source.max_context:
        raise ValueError(f"context {context} is more than the {source.max_context} tokens this model takes; give less")
    text, ids = tokenize(path, tokenizer, source.vocabulary)
    tokens = torch.tensor(ids, dtype=torch.int64)
    cut = round(len(tokens) * (1 - recipe.held_out))
    for part, what in ((tokens[:cut], "training"), (tokens[cut:], "held-out")):
        if len(part) < context + 1:
            raise ValueError(
                f"{path.name}: the text is too short: its {what} part holds {len(part)} tokens of {len(tokens)}, and "
                f"one window of context {context} needs {context + 1}; give a longer text or a smaller context"
            )
    return Data(path.name, hashlib.sha256(text.encode()).hexdigest(), tokens[:cut], tokens[cut:])


def run(
    source: sources.Source,
    cfg: potqat.PoTConfig,
    recipe: Recipe,
    data: Data,
    out: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    control: bool = False,
) -> dict[str, Any]:
    """Train, or go on where a run in ``out`` stopped.

    Leaves in ``out``: ``packed/`` (the model, with its tokenizer), metrics.json, training.png, ``control/`` (the float
    control, if there is one; of nanoGPT a checkpoint ``control.pt``), and ``state/`` (what resuming needs; delete it
    when no more is trained).

    Args:
        cfg: where it needs calibration, that is on ``recipe.calibration_tokens`` of ``data.train`` and
            ``recipe.generated_tokens`` of the model's own.
        control: train the float model, too.

    Returns:
        the content of metrics.json.

    Raises:
        ValueError: a model, configuration, recipe or state that cannot be trained, or ``out`` holds another run.
        OSError: a file cannot be read or written.
        potqat.flows.trainer.Interrupted: Ctrl-C while training; the same call goes on.
    """
    out = Path(out)
    results.require_matplotlib("training.png")
    _check(source, cfg, recipe, control)
    settings = {"model": source.identity(), "text": data.sha256, "quantizer": cfg.to_dict(), **recipe.to_dict()}
    results.open_run(out, settings | {"potqat": potqat.__version__})

    teacher = _without_dropout(sources.load(source))
    fit = partial(_fit, teacher, data, recipe, out / "state")
    trained: dict[str, Trained] = {}
    begin = teacher
    if recipe.float_steps:
        begin = copy.deepcopy(teacher)
        trained |= fit({FLOAT: begin}, [recipe.float_phase(FLOAT, recipe.float_steps)])
    student, report = training_start.start(begin.eval(), cfg, recipe, data.train, source, tokenizer, out / "state")
    del begin
    models, phases = {QAT: student}, [recipe.quantized_phase(QAT)]
    if control:
        models[CONTROL] = copy.deepcopy(teacher)
        phases.append(recipe.float_phase(CONTROL, recipe.steps))
    trained |= fit(models, phases)

    packed, size = _packed(student, tokenizer, out / "packed")
    models[QAT] = packed
    written = {CONTROL: _write_control(models[CONTROL], tokenizer, out)} if control else {}
    measured = _measured(models, teacher, data, recipe)
    metrics = {
        "model": source.name,
        "text": {"name": data.name, "sha256": data.sha256, "train": len(data.train), "held_out": len(data.held_out)},
        "quantizer": cfg.to_dict(),
        "recipe": recipe.to_dict(),
        "results": measured,
        "file_bytes": size,
        "curves": {name: done.curve for name, done in trained.items()},
        "losses": {name: done.losses for name, done in trained.items()},
        "start": report,
        "machine": results.machine(),
        **written,
    }
    training_plot.plot(out / "training.png", metrics)
    results.write_json(out / "metrics.json", metrics)
    return metrics


def _check(source: sources.Source, cfg: potqat.PoTConfig, recipe: Recipe, control: bool) -> None:
    """What can be told without the weights."""
    check_packable(plan(sources.skeleton(source), cfg))
    if recipe.checkpointing and isinstance(source.config, GPTConfig):
        raise ValueError(f"{source.name}: gradient checkpointing is for Hugging Face models; train nanoGPT without it")
    if control and recipe.loss == "kl":
        raise ValueError(
            "a float control of KL training is the float model itself, which the result stands beside already; "
            "leave the control out, or train with loss ce or last"
        )
    if control and recipe.parts == "scales":
        raise ValueError("a float control has no scales to train; leave it out, or train other parts")
    if recipe.float_steps and (recipe.loss == "kl" or recipe.parts == "scales"):
        raise ValueError(
            "a float model has no scales to train, and no KL from itself to lower: float steps need loss ce or last, "
            "and other parts than scales"
        )


def _without_dropout(model: nn.Module) -> nn.Module:
    """A trained model moves little in some hundred steps: dropout would only blur what it is compared with."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):  # that of GPT's attention, and of Hugging Face's
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


# ---- Training -----------------------------------------------------------------------------------------------


def _fit(
    teacher: nn.Module, data: Data, recipe: Recipe, state: Path, models: dict[str, nn.Module], phases: list[Phase]
) -> dict[str, Trained]:
    """Train one model after the other, under one progress bar."""
    progress = partial(tqdm, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 5.0)
    trained: dict[str, Trained] = {}
    with stop_on_interrupt() as stop, progress(total=sum(p.iterations for p in phases), unit="step") as bar:
        for (name, model), phase in zip(models.items(), phases, strict=True):
            choose_parts(model, recipe.parts)
            if recipe.checkpointing:
                _enable_checkpointing(model)
            trained[name] = train(
                model, phase, _batches(data, recipe, phase.start), losses.make(recipe, teacher),
                _point(teacher, data, recipe), state / f"{name}.pt", bar, stop,
            )  # fmt: skip
    return trained


def _enable_checkpointing(model: nn.Module) -> None:
    """Of a Hugging Face model: transformers 5 renamed the method."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def choose_parts(model: nn.Module, parts: str) -> None:
    """Let only ``parts`` (see Recipe) of a QAT or float model take gradients.

    Raises:
        ValueError: it has none of them.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    of_tables = {id(p) for m in model.modules() if id(getattr(m, "weight", None)) in tables for p in m.parameters()}

    def chosen(name: str, parameter: nn.Parameter) -> bool:
        if parts == "all":
            return True
        if parts == "blocks":
            return id(parameter) not in of_tables
        return name.endswith("log2_scale") or (parts == "norms" and parameter.dim() < 2)

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name, parameter))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameters of the parts {parts!r}; train others")


def _batches(data: Data, recipe: Recipe, first: int) -> Callable[[int], list[torch.Tensor]]:
    """Step, counted from ``first`` -> ``accumulate`` batches of windows at random places, int64 [batch, context + 1].
    The windows of a step are the same in every phase."""
    generator = torch.Generator().manual_seed(recipe.seed)
    starts = torch.randint(
        len(data.train) - recipe.context, (recipe.steps, recipe.accumulate, recipe.batch, 1), generator=generator
    )
    return lambda step: list(data.train[starts[first + step] + torch.arange(recipe.context + 1)])


def _point(teacher: nn.Module, data: Data, recipe: Recipe) -> Callable[[nn.Module], dict[str, float]]:
    """A point of the curves: loss and KL to the float model on held-out windows, before packing."""
    context = recipe.context
    count = max(1, min(CURVE_TOKENS, len(data.held_out) - 1) // context)
    windows = calibration_text.spread(data.held_out, count, context + 1)

    @torch.no_grad()
    def point(model: nn.Module) -> dict[str, float]:
        model.eval()
        sums = [losses.held_out(recipe, model, teacher, window[None]) for window in windows]
        model.train()
        loss, kl = (math.fsum(values) / count for values in zip(*sums, strict=True))
        return {"val": loss, "kl": kl}

    return point


# ---- Results ------------------------------------------------------------------------------------------------


def _packed(student: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> tuple[nn.Module, int]:
    """The model as it will be used, read back from the folder that it was written to, and its bytes."""
    potqat.convert_(student)
    with _anew(folder) as part:
        size = quantize.write_model(student, tokenizer, part, potqat.save)
    return sources.load(sources.find(str(folder))), size


def _write_control(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, out: Path) -> str:
    """Write the float control, to be a reference of ``potqat eval``; returns its name in ``out``."""
    if isinstance(model, GPT):
        held = {"model": model.state_dict(), "model_args": dataclasses.asdict(model.config)}
        potqat.checkpoint.write(out / f"{CONTROL}.pt", lambda part: torch.save(held, part))
        return f"{CONTROL}.pt"
    with _anew(out / CONTROL) as part:
        quantize.write_model(model, tokenizer, part, lambda model, folder: model.save_pretrained(folder))
    return CONTROL


@contextmanager
def _anew(folder: Path) -> Iterator[Path]:
    """A folder to write in that takes the place of ``folder``, and of what an earlier run left there."""
    if folder.exists():
        shutil.rmtree(folder)
    with quantize.new_folder(folder) as part:
        yield part


def _measured(models: dict[str, nn.Module], teacher: nn.Module, data: Data, recipe: Recipe) -> dict[str, Any]:
    """Perplexity on held-out text of each model beside the float one, and of the packed one beside the control."""
    tokens = data.held_out[:MEASURED_TOKENS]
    reference = sources.logits_of(teacher.eval())
    found = {
        name: evaluate.measure(sources.logits_of(model.eval()), tokens, recipe.context, reference=reference).to_dict()
        for name, model in models.items()
    }
    if CONTROL in found:
        found["ratio_to_control"] = math.exp(found[QAT]["loss"] - found[CONTROL]["loss"])
    return found
