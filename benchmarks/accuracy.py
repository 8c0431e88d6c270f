"""What 4 bits cost a model in accuracy, arm by arm, measured with `potqat quantize` and `potqat eval` themselves:

    python benchmarks/accuracy.py MODEL --calibration valid.txt --text test.txt --text other.txt --work DIR

An arm is GRID-GRANULARITY-METHOD with options, as pot4-channel-gptq, e2m1-32-gptq-float, pot4-128-gptq-seed1:
METHOD is absmax, mse, output (scales; rounding to nearest), absmax+gptq (error compensation on such scales), gptq
(what --calibration does by default) or reconstruct (blocks trained from there); float takes float activations, not
int8; tokensN so many calibration tokens, not --calibration-tokens; ownP of these P percent that the model writes by
itself; seedN another sample of the calibration text; embedding the arm's grid for embeddings, not int8; head16 int16
activations for the head of a Llama-family model that is tied to its embedding. Folders made elsewhere, as by training,
are --packed NAME=DIR.

The other text of README's table is section A (A1 to A5, Markdown, in order) of An Anarchist FAQ 15.3, as it is in
Debian's package `anarchism`.

Every figure is of a packed folder that runs through the real kernels. Results are written after each arm, quantized
folders are kept in --work: the same command goes on where it was stopped, and a longer list of arms adds to the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accuracy_plot import plot
from report import RESULTS

from potqat.cli.quantize import CALIBRATION_TOKENS
from potqat.config import GRIDS
from potqat.flows import calibration_text, evaluate, inspection, sources
from potqat.flows.results import require_matplotlib, write_json
from potqat.flows.text import read_text

NEAREST = ("--rounding", "nearest")
METHODS = {  # options of potqat quantize
    "absmax": ("--scale", "absmax", *NEAREST),
    "mse": ("--scale", "mse", *NEAREST),
    "output": ("--scale", "output", *NEAREST),
    "absmax+gptq": ("--scale", "absmax", "--rounding", "gptq"),
    "gptq": (),
    "reconstruct": ("--rounding", "reconstruct"),
}
UNCALIBRATED = ("absmax", "mse")
OPTIONS = r"(?:-(?:float|embedding|head16|(?:tokens|own|seed)\d+))*"
NAME = re.compile(rf"({'|'.join(GRIDS)})-(channel|tensor|\d+)-([a-z+]+)({OPTIONS})")
ARMS = (
    *(f"pot4-{granularity}-{method}" for granularity in ("channel", 128, 32) for method in METHODS),
    *(f"{grid}-{granularity}-gptq" for grid in ("e2m1", "int4") for granularity in ("channel", 128, 32)),
    *(f"{grid}-{granularity}-reconstruct" for grid in ("e2m1", "int4") for granularity in ("channel", 128, 32)),
    *(f"{grid}-{granularity}-absmax" for grid in ("e2m1", "int4") for granularity in ("channel", 32)),
    *(f"{grid}-channel-gptq-seed{seed}" for grid in ("pot4", "e2m1") for seed in (0, 1)),
    "pot4-channel-gptq-float",
    "int8-channel-absmax",
    "int8-channel-absmax-float",
)


@dataclass(frozen=True)
class Arm:
    """One way to quantize; ``options`` are float, embedding, head16, tokensN, ownP, seedN."""

    name: str
    grid: str
    granularity: str
    method: str
    options: tuple[str, ...]

    @property
    def calibrated(self) -> bool:
        return self.method not in UNCALIBRATED

    def number(self, word: str) -> int | None:
        """N of the option ``word``N."""
        return next((int(option.removeprefix(word)) for option in self.options if option.startswith(word)), None)

    def tokens(self, default: int) -> tuple[int, int]:
        """Calibration tokens of the text, and those that the model writes."""
        tokens = self.number("tokens") or default
        own = tokens * (self.number("own") or 0) // 100
        return tokens - own, own

    @property
    def settings(self) -> list[str]:
        """Of ``potqat quantize``, without files."""
        words = ["--grid", self.grid, "--granularity", self.granularity, *METHODS[self.method]]
        words += ["--activations", "float"] * ("float" in self.options)
        words += ["--embedding-grid", self.grid] * ("embedding" in self.options)
        words += ["--override", "embed_tokens:activations=int16"] * ("head16" in self.options)
        seed = self.number("seed")
        return words + ([] if seed is None else ["--calibration-seed", str(seed)])

    @property
    def label(self) -> str:
        scales = f"groups of {self.granularity}" if self.granularity.isdecimal() else f"a scale a {self.granularity}"
        return ", ".join([f"`{self.grid}`", scales, self.method, *map(_in_words, self.options)])


def _in_words(option: str) -> str:
    word = option.rstrip("0123456789")
    number = option[len(word) :]
    return {
        "float": "float activations",
        "embedding": "embedding, too",
        "head": f"int{number} activations for the head",
        "tokens": f"{int(number or 0):,} tokens",
        "own": f"{number}% of the text its own",
        "seed": f"sample {number}",
    }[word]


def arm(name: str) -> Arm:
    """
    Raises:
        argparse.ArgumentTypeError: no arm is called so.
    """
    found = NAME.fullmatch(name)
    of_calibrated = found and any(word in found[4] for word in ("-seed", "-own", "-tokens"))
    if not found or found[3] not in METHODS or (of_calibrated and found[3] in UNCALIBRATED):
        raise argparse.ArgumentTypeError(
            f"{name!r} must be GRID-GRANULARITY-METHOD, then any of -float, -embedding, -head16 and, of calibrated "
            "ones, -tokensN, -ownP and -seedN, "
            f"with a grid of {', '.join(GRIDS)} and a method of {', '.join(METHODS)}"
        )
    return Arm(name, found[1], found[2], found[3], tuple(found[4].split("-")[1:]))


def packed(given: str) -> tuple[str, str]:
    name, equals, folder = given.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{given!r} must be NAME=DIR")
    return name, folder


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", metavar="MODEL", help="the float model: hub name, folder, GGUF file")
    made.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="text to calibrate on")
    made.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS, metavar="N", help="%(default)s")
    made.add_argument("--text", type=Path, action="append", required=True, metavar="FILE", help="text to measure on")
    made.add_argument("--tokens", type=int, metavar="N", help="the first N tokens of each text (default: all)")
    made.add_argument("--context", type=int, default=512, metavar="N", help="tokens a window (default: %(default)s)")
    made.add_argument("--arms", type=arm, nargs="*", default=list(map(arm, ARMS)), metavar="ARM", help="default: all")
    made.add_argument("--packed", type=packed, action="append", default=[], metavar="NAME=DIR", help="a folder more")
    made.add_argument("--work", type=Path, required=True, metavar="DIR", help="where quantized folders are kept")
    made.add_argument("--json", type=Path, default=RESULTS / "accuracy.json", metavar="FILE", help="%(default)s")
    return made


def main(words: list[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception: the command that runs is stopped, too
    try:
        report = prepared(arguments)
        todo = [a for a in arguments.arms if a.name not in report["arms"]]
        folders = {}
        for name, folder in arguments.packed:
            source = sources.find(folder)
            if not source.packed:
                raise ValueError(f"--packed {name}={folder}: a float model; give a folder that potqat wrote")
            identity = source.identity().removeprefix(folder).strip()
            if report["arms"].get(name, {}).get("identity") != identity:
                folders[name] = folder, {"label": name, "identity": identity}
        begin, count = time.monotonic(), len(todo) + len(folders)
        for i, (name, job) in enumerate([*((a.name, a) for a in todo), *folders.items()]):
            left = (time.monotonic() - begin) / i * (count - i) if i else None
            print(f"{i + 1} of {count}: {name}" + ("" if left is None else f", {left / 60:.0f} min left"), flush=True)
            folder, entry = quantized(job, arguments) if isinstance(job, Arm) else job
            report["arms"][name] = entry | measured(folder, arguments, name)
            write_json(arguments.json, report)
            print("   " + "; ".join(_said(text) for text in report["arms"][name]["texts"]), flush=True)
    except (ValueError, OSError) as error:
        print(f"accuracy.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    plot(report, arguments.json.with_suffix(".png"))
    return 0


def prepared(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check all that can be checked before hours of work; the report so far.

    Raises:
        ValueError, OSError: a model or text that cannot be used, or results and folders of other settings.
    """
    require_matplotlib("the results")
    source = sources.find(arguments.model)
    if source.packed:
        raise ValueError(f"{arguments.model}: already quantized; name the float model")
    tokenizer = sources.tokenizer_for(source, None)
    plans = evaluate.plan_texts(
        arguments.text, tokenizer, model=source.name, max_context=source.max_context, vocabulary=source.vocabulary,
        context=arguments.context, tokens=arguments.tokens,
    )  # fmt: skip
    calibration_text.windows_of_file(arguments.calibration, tokenizer, source, arguments.calibration_tokens)
    made_from = {
        "model": by_content(source),
        "calibration": {
            "text": arguments.calibration.name,
            "sha256": hashlib.sha256(read_text(arguments.calibration).encode()).hexdigest(),
            "tokens": arguments.calibration_tokens,
        },
    }
    settings = made_from | {"context": arguments.context, "texts": [p.text | {"used": len(p.tokens)} for p in plans]}
    arguments.work.mkdir(parents=True, exist_ok=True)
    _agree(arguments.work / "settings.json", made_from, {})
    return _agree(arguments.json, settings, {"arms": {}})


def by_content(source: sources.Source) -> str:
    """The name of a model, without a path of this machine, and of files here a hash: a copy of them is the same."""
    files = sorted(source.path.iterdir()) if source.path.is_dir() else [source.path] * source.path.is_file()
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while part := opened.read(1 << 20):
                digest.update(part)
    return f"{source.path.name} {digest.hexdigest()[:16]}" if files else source.name


def _agree(path: Path, settings: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """What ``path`` holds, if it was made with ``settings``; it is made if it is not there."""
    if not path.exists():
        write_json(path, {"settings": settings} | fresh)
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != settings:
        differ = ", ".join(key for key in settings if found["settings"].get(key) != settings[key])
        raise ValueError(f"{path}: made with other settings ({differ}); name another file and folder, or delete these")
    return found


def quantized(arm: Arm, arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """(the arm's folder, which is made if it is not there; what it was made with, and what that took)."""
    folder, note = arguments.work / arm.name, arguments.work / f"{arm.name}.json"
    tokens, own = arm.tokens(arguments.calibration_tokens)
    if not note.exists():
        if folder.exists():
            raise ValueError(f"{folder}: there, and no {note.name} beside it; delete the folder")
        words = ["quantize", arguments.model, "--out", str(folder), *arm.settings, "--json"]
        if arm.calibrated:
            words += ["--calibration", str(arguments.calibration)]
            words += ["--calibration-tokens", str(tokens)]
            words += ["--generated-tokens", str(own)] if own else []
        resumed = folder.with_name(f"{folder.name}.unfinished").exists()
        report, took = potqat(words)
        write_json(note, {"file_bytes": report["file_bytes"], **took, "resumed": resumed})
    entry = {"label": arm.label, "settings": arm.settings, "calibrated": arm.calibrated}
    if arm.calibrated:
        entry |= {"calibration_tokens": tokens, "calibration_context": calibration_text.CONTEXT}
    entry |= {"generated_tokens": own, "calibration_seed": arm.number("seed")}
    return str(folder), entry | {"quantize": json.loads(note.read_text(encoding="utf-8"))}


def measured(folder: str, arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Bytes of a packed folder, and its distance to the float model on every text."""
    words = ["eval", folder, "--reference", arguments.model, "--context", str(arguments.context), "--json"]
    for text in arguments.text:
        words += ["--text", str(text)]
    if arguments.tokens is not None:
        words += ["--tokens", str(arguments.tokens)]
    safe = re.sub(r"[^\w+-]", "_", name)
    result, took = potqat([*words, "--out", str(arguments.work / f"{safe}.eval.json")])
    texts = result.get("texts", [result])
    found = inspection.inspect(sources.load(sources.find(folder)))
    linear = [layer for layer in found.layers if layer.kind == "linear" and layer.tied_to is None]
    weights = sum(layer.weights for layer in linear)
    return {
        "linear_weights": weights,
        "bytes_per_weight": sum(layer.code_bytes + layer.scale_bytes for layer in linear) / weights,
        "bytes": found.totals()["model"]["bytes"],
        "float32_bytes": found.totals()["model"]["float32_bytes"],
        "evaluate": took,
        "machine": texts[0]["machine"],
        "texts": [
            {key: value for key, value in text.items() if key not in ("model", "reference_model", "machine")}
            for text in texts
        ],
    }


def potqat(words: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the command prints as JSON; its seconds, and the most memory that it held).

    Raises:
        ValueError: it failed; what it says about it is on stderr.
    """
    begin = time.monotonic()
    with subprocess.Popen([sys.executable, "-m", "potqat", *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            printed = process.stdout.read()
        except SystemExit:
            process.send_signal(signal.SIGINT)  # it keeps what it has done
            raise
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode:
        raise ValueError(f"potqat {words[0]} failed (status {process.returncode}), see above")
    took = {
        "seconds": round(time.monotonic() - begin, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    return json.loads(printed), took


def _said(text: dict[str, Any]) -> str:
    against = text["reference"]
    return f"{text['text']['file']}: ratio {against['perplexity_ratio']:.3f}, KL {against['kl']:.4f}"


if __name__ == "__main__":
    sys.exit(main())
