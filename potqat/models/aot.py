"""One decoding step of a GPT as a program without Python: AOTInductor's, in a file that later processes load."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from potqat import __version__
from potqat.models.gpt import GPT, KVCache

KEY = "potqat.step"  # of what the file is for, in its metadata


def compile_step(model: GPT, cache: KVCache, path: Path) -> None:
    """Write the program of ``model(idx, cache, positions)`` for one token a text to ``path`` (.pt2), for any number of
    slots and threads. It holds no weights. Takes half a minute for 12 layers, and a C++ compiler as torch.compile does.

    Args:
        model: float or packed, in eval mode; it does not change.
        cache: views of the first slots of a cache; its batch size, dtype and strides are the program's.

    Raises:
        ValueError: the model is in training mode, or the path does not end in .pt2.
        OSError: the file cannot be written.
    """
    if model.training:
        raise ValueError(f"{path}: dropout is on in training mode; call model.eval() before compiling")
    if path.suffix != ".pt2":
        raise ValueError(f"{path}: the name of a compiled step must end in .pt2")
    batch = cache[0][0].shape[0]
    idx, positions = torch.zeros(batch, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    slots = {2: torch.export.Dim.AUTO}
    part = path.with_name(f"{path.stem}.{os.getpid()}.part.pt2")
    settings = {
        "aot_inductor.package_constants_in_so": False,  # nor beside it: load_step hands the model's own to the program
        "aot_inductor.metadata": {KEY: json.dumps(_made_for(model, cache))},
        "cpp.dynamic_threads": True,
    }
    try:
        part.touch()  # says now, not after half a minute, that nothing can be written there
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own pytree
            exported = torch.export.export(
                model, (idx, cache, positions), dynamic_shapes=(None, [(slots, slots) for _ in cache], None)
            )
            torch._inductor.aoti_compile_and_package(exported, package_path=str(part), inductor_configs=settings)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_step(model: GPT, cache: KVCache, path: Path) -> Callable[[torch.Tensor, KVCache, torch.Tensor], torch.Tensor]:
    """The step that ``compile_step`` wrote, on the weights of ``model`` as they are in memory: later changes in place
    are seen, the model is kept alive.

    Returns:
        a function of idx int64 [B, 1], views of the first slots of a cache, and positions int64 [1], which gives logits
        [B, 1, V] and writes the cache.

    Raises:
        ValueError: the file is not one, or is for another model, batch size, torch or potqat.
        OSError: it cannot be read.
    """
    path.open("rb").close()
    try:
        program = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
        theirs = json.loads(program.get_metadata()[KEY])
    except Exception as error:  # torch lets anything out of a foreign file
        raise ValueError(f"{path}: not a compiled step ({type(error).__name__}); delete it or name another") from error
    ours = json.loads(json.dumps(_made_for(model, cache)))
    for name in ours:
        if theirs.get(name) != ours[name]:
            raise ValueError(
                f"{path}: compiled for another {name} ({theirs.get(name)} there, {ours[name]} here); delete it or name "
                "another"
            )
    tensors = _tensors(model)
    program.load_constants(
        {name: tensors[name] for name in program.get_constant_fqns()}, check_full_update=True, user_managed=True
    )

    def step(idx: torch.Tensor, cache: KVCache, positions: torch.Tensor) -> torch.Tensor:
        # Not by a call of the program: that parses its description of arguments each time, a twentieth of a step.
        return program.loader.boxed_run([idx.long(), *itertools.chain.from_iterable(cache), positions])[0]

    step.model = model  # the program has but the addresses of its tensors
    return step


def _tensors(model: GPT) -> dict[str, torch.Tensor]:
    """All under all of their names: of tied ones the program may know either."""
    return dict(
        itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    )


def _made_for(model: GPT, cache: KVCache) -> dict[str, object]:
    """What a program is good for. It reads memory as it was compiled to, whatever is there: all that counts is here."""
    tensors = [(name, str(t.dtype), list(t.shape), list(t.stride())) for name, t in sorted(_tensors(model).items())]
    packed = [(name, module.cfg.to_dict()) for name, module in model.named_modules() if hasattr(module, "cfg")]
    text, keys = json.dumps([tensors, packed]), cache[0][0]
    return {
        "torch": torch.__version__,
        "potqat": __version__,
        "model": {**dataclasses.asdict(model.config), "tensors": hashlib.sha256(text.encode()).hexdigest()[:16]},
        "batch size": keys.shape[0],
        "cache": [str(keys.dtype), str(keys.device), list(keys.stride())],
    }
