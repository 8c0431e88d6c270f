"""The papers' character-level experiment: train a GPT, quantize it in several ways from one checkpoint, compare.

Float training first; then, from that checkpoint and on the same batches, a float control and the quantization-aware
training (QAT) of each arm; beside them post-training quantization (PTQ) of the checkpoint. Quantized rows are measured
on the packed model with int8 activations. Read ``run`` from top to bottom.
"""

from __future__ import annotations

import copy
import sys
import threading
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from tqdm import tqdm

import potqat
from potqat.config import GRIDS, PoTConfig
from potqat.flows import results
from potqat.flows.experiment import ARMS, Experiment
from potqat.flows.results import Row
from potqat.flows.text import Text, load_text
from potqat.flows.trainer import Phase, cross_entropy, stop_on_interrupt, train
from potqat.metrics import evaluate, tokens_per_second
from potqat.models.generate import generate
from potqat.models.gpt import GPT, GPTConfig
from potqat.report import Report

CURVE_WINDOWS = 128  # a point of the curves, from each of the training and validation text
TABLE_WINDOWS = 2000  # a row of the table: the whole split of any text up to 1.28 million characters at context 64
PROMPT, SAMPLED = 32, 400  # characters
TEMPERATURE, TOP_K = 0.8, 200  # the papers'
CHECKPOINT, CONTROL = "float", "control"  # the two float models of a run, as phases, files and rows


def run(experiment: Experiment, out: str | Path, data: str | Path | None = None) -> dict[str, Any]:
    """Run the experiment, or go on where a run in ``out`` stopped.

    Leaves in ``out``: metrics.json, table.txt, loss_curves.png, samples.txt, ``models/`` (float32, bfloat16 and each
    packed model as safetensors) and ``state/`` (what resuming needs).

    Args:
        experiment: settings.
        out: folder, made if missing.
        data: UTF-8 text file; None takes ``pydoc_data.topics``.

    Returns:
        the content of metrics.json, with ``table`` and ``samples`` as text.

    Raises:
        ValueError: bad text or state, or ``out`` holds a run with other settings.
        OSError: a file cannot be read or written.
        potqat.flows.trainer.Interrupted: Ctrl-C; the same call resumes.
    """
    results.require_matplotlib()
    out = Path(out)
    text = load_text(data, experiment.context)
    config = _model_config(experiment, text)
    results.open_run(out, {**experiment.fingerprint(), "text": text.sha256, "potqat": potqat.__version__})

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        model = GPT(config)
    model.to(experiment.device)
    phases = _phases(experiment)
    total = sum(phase.iterations for phase in phases.values())
    trained: dict[str, nn.Module] = {}
    curves: dict[str, list[dict[str, float]]] = {}
    progress = partial(tqdm, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 5.0)
    with stop_on_interrupt() as stop, progress(total=total, unit="it") as bar:
        for name, phase in phases.items():
            if name != CHECKPOINT:
                model = _prepared(trained[CHECKPOINT], ARMS[name].config if name in ARMS else None, experiment)
            curves[name] = _train(model, phase, text, experiment, out / "state" / f"{name}.pt", bar, stop)
            trained[name] = model

    (out / "models").mkdir(exist_ok=True)
    sizes = _save_float(trained[CHECKPOINT], out / "models")
    models = 2 + sum(1 + (ARMS[name].config.grid in GRIDS) for name in experiment.arms)  # PTQ needs a packed form
    with progress(desc="measuring", total=models, unit="model") as bar:
        rows = _rows(trained, text, experiment, out / "models", sizes["float32"], bar)
    metrics = _metrics(experiment, text, rows, curves, sizes)
    labels = {CONTROL: "float control"} | {name: ARMS[name].label for name in experiment.arms}
    results.plot(out / "loss_curves.png", curves, labels, rows)
    results.write_json(out / "metrics.json", metrics)
    shown = {"table": _table(metrics, rows, sizes), "samples": _samples(rows, text, experiment)}
    for name, content in shown.items():
        (out / f"{name}.txt").write_text(content + "\n", encoding="utf-8")
    return metrics | shown


# ---- Training -----------------------------------------------------------------------------------------------


def _model_config(experiment: Experiment, text: Text) -> GPTConfig:
    return GPTConfig(
        vocab_size=len(text.characters), block_size=experiment.context, n_layer=experiment.layers,
        n_head=experiment.heads, n_embd=experiment.width, dropout=experiment.dropout, bias=False,
    )  # fmt: skip


def _phases(experiment: Experiment) -> dict[str, Phase]:
    """The float phase, then the control and the arms: equal but for the name, so that only the quantizer differs."""
    e = experiment
    first = Phase(
        name=CHECKPOINT, start=0, iterations=e.float_iterations, learning_rate=e.learning_rate,
        final_learning_rate=e.final_learning_rate, warmup=e.warmup, evaluate_every=e.evaluate_every, seed=2 * e.seed,
    )  # fmt: skip
    after = Phase(
        name=CONTROL, start=e.float_iterations, iterations=e.total_iterations - e.float_iterations,
        learning_rate=e.qat_learning_rate, final_learning_rate=e.qat_final_learning_rate, warmup=0,
        evaluate_every=e.evaluate_every, seed=2 * e.seed + 1,
    )  # fmt: skip
    return {CHECKPOINT: first, CONTROL: after} | {name: replace(after, name=name) for name in e.arms}


def _prepared(model: nn.Module, config: PoTConfig | None, experiment: Experiment) -> nn.Module:
    """A copy of the float checkpoint, ready to train on."""
    model = copy.deepcopy(model)
    if config is None:
        return model
    if experiment.qat == "eager":
        potqat.prepare_qat_(model, config)
        return model
    batch, time = torch.export.Dim("batch", min=1), torch.export.Dim("time", min=1, max=experiment.context)
    example = torch.zeros(2, experiment.context, dtype=torch.int64, device=experiment.device)
    return potqat.pt2e.prepare(model.train(), (example,), config, dynamic_shapes=({0: batch, 1: time},))


def _train(
    model: nn.Module, phase: Phase, text: Text, experiment: Experiment, path: Path, bar: tqdm, stop: threading.Event
) -> list[dict[str, float]]:
    context = experiment.context
    generator = torch.Generator().manual_seed(phase.seed)
    starts = torch.randint(
        len(text.splits["train"]) - context, (phase.iterations, experiment.batch), generator=generator
    )
    windows = {split: text.windows(split, context, CURVE_WINDOWS).to(experiment.device) for split in ("train", "val")}

    def batches_at(i: int) -> list[torch.Tensor]:
        return [text.at("train", starts[i], context).to(experiment.device)]

    def point(model: nn.Module) -> dict[str, float]:
        return {split: evaluate(model, part).loss for split, part in windows.items()}

    return train(model, phase, batches_at, cross_entropy, point, path, bar, stop).curve


# ---- Results ------------------------------------------------------------------------------------------------


def _save_float(model: nn.Module, folder: Path) -> dict[str, int]:
    """Bytes on disk of the float model, by dtype: what packed files are compared with."""
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        path = folder / f"{name}.safetensors"
        safetensors.torch.save_model(copy.deepcopy(model).cpu().to(dtype), str(path))  # stores tied weights once
        sizes[name] = path.stat().st_size
    return sizes


def _rows(
    trained: dict[str, nn.Module], text: Text, experiment: Experiment, folder: Path, float_bytes: int, bar: tqdm
) -> list[Row]:
    """The table's rows, models on the CPU."""
    windows = {split: text.windows(split, experiment.context, TABLE_WINDOWS) for split in ("val", "test")}
    windows["curve"] = text.windows("val", experiment.context, CURVE_WINDOWS)
    checkpoint = copy.deepcopy(trained[CHECKPOINT]).cpu().eval()
    begin, end = experiment.float_iterations, experiment.total_iterations

    def row(name: str, label: str, iterations: int, model: nn.Module, **fields) -> Row:
        losses = {split: evaluate(model, part) for split, part in windows.items()}
        bar.update()
        return Row(name, label, iterations, model, losses["val"], losses["test"], losses["curve"], **fields)

    def packed_row(name: str, label: str, iterations: int, model: nn.Module, stored: nn.Module, **fields) -> Row:
        size = potqat.save(stored, folder / name)
        return row(name, label, iterations, model, packed=True, file=name, bytes=size, **fields)

    control = copy.deepcopy(trained[CONTROL]).cpu()
    rows = [
        row(CHECKPOINT, "float, the checkpoint", begin, checkpoint, bytes=float_bytes),
        row(CONTROL, "float, trained on: the control", end, control, bytes=float_bytes),
    ]
    for name in experiment.arms:
        label, config = ARMS[name].label, ARMS[name].config
        model = copy.deepcopy(trained[name]).cpu()
        fake = evaluate(model, windows["val"])
        if config.grid not in GRIDS:
            rows.append(row(f"{name}-qat", f"{label}, QAT", end, model, fake_quantized_val=fake))
            continue
        ptq = copy.deepcopy(checkpoint)
        report = potqat.quantize_(ptq, config)
        rows.append(packed_row(f"{name}-ptq", f"{label}, PTQ", begin, ptq, ptq, report=report))
        qat, stored, report = _converted(model, config, checkpoint, experiment)
        rows.append(
            packed_row(f"{name}-qat", f"{label}, QAT", end, qat, stored, report=report, fake_quantized_val=fake)
        )
    timed = {r.name: r.model for r in rows if r.bytes is not None}
    speeds = tokens_per_second(timed, windows["val"][:64, :-1])
    for r in rows:
        r.tokens_per_second = speeds.get(r.name)
    return rows


def _converted(
    model: nn.Module, config: PoTConfig, checkpoint: nn.Module, experiment: Experiment
) -> tuple[nn.Module, nn.Module, Report]:
    """What to run, what to store, and the report. The graph that PT2E lowers runs, but files hold modules: they come
    from an eager model with the same state."""
    if experiment.qat == "eager":
        packed = copy.deepcopy(model)
        report = potqat.convert_(packed)
        return packed, packed, report
    stored = copy.deepcopy(checkpoint)
    potqat.prepare_qat_(stored, config)
    stored.load_state_dict(model.state_dict())
    return potqat.pt2e.convert(model), stored, potqat.convert_(stored)


def _metrics(experiment: Experiment, text: Text, rows: list[Row], curves: dict, sizes: dict[str, int]) -> dict:
    shown = [row for row in rows if row.packed]
    return {
        "experiment": asdict(experiment),
        "model": asdict(rows[0].model.config),
        "arms": {name: {"label": ARMS[name].label, "config": ARMS[name].config.to_dict()} for name in experiment.arms},
        "text": {
            "name": text.name,
            "sha256": text.sha256,
            "characters": text.characters,
            "tokens": {split: len(ids) for split, ids in text.splits.items()},
        },
        "evaluation": {
            "context": experiment.context,
            "stride": experiment.context,
            "val_tokens": rows[0].val.tokens,
            "test_tokens": rows[0].test.tokens,
        },
        "machine": results.machine(),
        "float_bytes": sizes,
        "rows": [row.to_dict() for row in rows],
        "report": shown[-1].report.to_dict() if shown else None,
        "curves": curves,
    }


def _table(metrics: dict, rows: list[Row], sizes: dict[str, int]) -> str:
    control = next(row for row in rows if row.name == CONTROL)
    note, machine = metrics["evaluation"], metrics["machine"]
    return (
        f"{results.table(rows, control, sizes['float32'], sizes['bfloat16'])}\n\n"
        f"Loss in nats a token on {metrics['text']['name']} (val {note['val_tokens']:,} and test "
        f"{note['test_tokens']:,} characters), context {note['context']}, stride {note['stride']}; "
        "'last val': last position of each window only.\n"
        f"The checkpoint has {rows[0].iterations:,} iterations, and PTQ starts from it; the control and QAT go on to "
        f"{control.iterations:,}. Quantized rows: the packed model with int8 activations; 'fake val': the same weights "
        "before packing, float activations.\n"
        f"tokens/s: forward of 64 windows on {machine['threads']} thread(s), {machine['isa']}, {machine['cpu']}."
    )


def _samples(rows: list[Row], text: Text, experiment: Experiment) -> str:
    """The control beside the last packed row: the same start and the same random numbers."""
    shown = [row for row in rows if row.name == CONTROL] + [row for row in rows if row.packed][-1:]
    columns = []
    for row in shown:
        ids = generate(
            row.model.eval(), text.splits["test"][None, :PROMPT], SAMPLED, context=experiment.context,
            temperature=TEMPERATURE, top_k=TOP_K, generator=torch.Generator().manual_seed(experiment.seed),
        )  # fmt: skip
        columns.append((f"{row.label} ({row.bytes:,} bytes)", text.decode(ids[0])))
    return results.side_by_side(columns)
