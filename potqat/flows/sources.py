"""What MODEL means on the command line, and how it is loaded: a hub name, a Hugging Face folder, a GGUF file, a nanoGPT
checkpoint, or a folder that potqat wrote."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import potqat
from potqat import checkpoint, manifest
from potqat.flows.text import read_text
from potqat.models.gpt import GPT, GPTConfig, load_nanogpt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GPT_TYPE = GPT.__name__.lower()  # config.json's model_type of potqat.models.gpt


@dataclass(frozen=True)
class Source:
    """Where a model comes from. ``kind``: "hub", "folder", "gguf", "nanogpt" or "packed"."""

    name: str
    kind: str

    @property
    def path(self) -> Path:
        return Path(self.name)

    def identity(self) -> str:
        """Its name and, of files here, their sizes and times: another model under the same name has another one."""
        folder = self.path.is_dir()
        files = sorted(self.path.iterdir()) if folder else [self.path] * self.path.is_file()
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return f"{self.name} {hashlib.sha256(repr(states).encode()).hexdigest()[:16]}" if files else self.name


def find(name: str) -> Source:
    """Tell what ``name`` is, without loading it.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a file or folder that holds no model that potqat reads.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / checkpoint.CONFIG).is_file():
            raise ValueError(
                f"{name}: a folder without {checkpoint.CONFIG}; name a GGUF file or nanoGPT's ckpt.pt itself"
            )
        packed = "quantization_config" in checkpoint.read_config(path)
        return Source(name, "packed" if packed else "folder")
    if path.is_file():
        if path.suffix == ".gguf":
            return Source(name, "gguf")
        if path.suffix in (".pt", ".pth"):
            return Source(name, "nanogpt")
        raise ValueError(f"{name}: neither a .gguf file nor a nanoGPT checkpoint (.pt)")
    if path.suffix in (".gguf", ".pt", ".pth") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such file or folder")
    return Source(name, "hub")


def skeleton(source: Source) -> nn.Module:
    """The float model of a source without weights (on the meta device): its modules and sizes, for plans and estimates.

    Raises:
        ValueError: a packed folder, a damaged file, or transformers is needed and not installed.
        OSError: the hub or the folder does not give it.
    """
    if source.kind == "packed":
        raise ValueError(f"{source.name}: already quantized; name the float model that it came from")
    if source.kind == "nanogpt":
        return load_nanogpt(source.path).to("meta")
    transformers = _transformers(source)
    place, gguf = _place(source)
    try:
        config = transformers.AutoConfig.from_pretrained(place, **gguf)
    except OSError as error:
        if source.kind != "hub":
            raise
        raise OSError(f"{source.name}: not a file or folder here, and the hub does not give it: {error}") from None
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def load_float(
    source: Source, plan: nn.Module, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """The float model of a source in eval mode, and its tokenizer or None.

    Args:
        plan: its ``skeleton``.

    Raises:
        as ``skeleton``.
    """
    if source.kind == "nanogpt":
        return load_nanogpt(source.path).to(dtype), None
    transformers = _transformers(source)
    place, gguf = _place(source)
    # The configuration is that of the plan: to read it from a GGUF file again takes seconds.
    model = transformers.AutoModelForCausalLM.from_pretrained(place, config=plan.config, dtype=dtype, **gguf)
    return model.eval(), _tokenizer(place, **gguf)


def load(source: Source, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """The model of any source, packed or float, in eval mode, and its tokenizer or None; errors of the two loaders."""
    if source.kind == "packed":
        return load_packed(source.path)
    return load_float(source, skeleton(source), dtype)


def load_packed(folder: str | Path) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """The packed model of a folder in eval mode, memory-mapped, and its tokenizer or None.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
        ValueError: the folder holds a float model, or transformers is needed and not installed.
        PoTFormatError: files that cannot be trusted.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder}: a file; name the folder that potqat quantize wrote")
    config = checkpoint.read_config(folder)
    if "quantization_config" not in config:
        raise ValueError(f"{folder}: a float model; quantize it first: potqat quantize {folder} --out DIR")
    manifest.parse(config["quantization_config"], str(folder / checkpoint.CONFIG))
    if config.get("model_type") == GPT_TYPE:
        try:
            fields = {key: config[key] for key in GPTConfig.__dataclass_fields__}
            with torch.device("meta"), _NoInit():
                model = GPT(GPTConfig(**fields))
        except (KeyError, TypeError, ValueError) as error:
            where = folder / checkpoint.CONFIG
            raise potqat.PoTFormatError(f"{where}: does not describe a GPT: {error}") from None
        return potqat.load(folder, model).eval(), _tokenizer(folder)
    source = Source(str(folder), "packed")
    transformers = _transformers(source)
    from potqat import hf  # noqa: F401  registers the quantizer (import potqat.hf would make potqat a local name)

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), _tokenizer(folder)


class _NoInit(TorchFunctionMode):
    """Leaves out torch.nn.init: on the meta device it sets nothing, but its first normal_ imports PyTorch's compiler
    (1.7 s and 70 MB)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def _place(source: Source) -> tuple[str, dict[str, str]]:
    """(what from_pretrained is given, its ``gguf_file`` argument)."""
    if source.kind == "gguf":
        return str(source.path.parent), {"gguf_file": source.path.name}
    return source.name, {}


def _transformers(source: Source):
    needed = ("transformers", "gguf", "accelerate") if source.kind == "gguf" else ("transformers",)
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{source.name}: reading it needs {package}; pip install 'potqat[hf]'")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _tokenizer(place: str | Path, **gguf: str):
    """The tokenizer beside a model, or None if it has none."""
    folder = Path(place)
    if (
        folder.is_dir()
        and not gguf
        and not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json"))
    ):
        return None
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    return transformers.AutoTokenizer.from_pretrained(place, **gguf)


def tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that a user names: of a hub model or folder, or, for a text file (.txt), its characters in sorted
    order, which is how nanoGPT numbers character-level data.

    Raises:
        ValueError: transformers is not installed, or the text is empty or not UTF-8.
        OSError: the hub or the folder does not give it.
    """
    transformers = _transformers(Source(name, "hub"))
    if not name.endswith(".txt"):
        return transformers.AutoTokenizer.from_pretrained(name)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: i for i, character in enumerate(sorted(set(read_text(name))))}
    characters = Tokenizer(models.WordLevel(vocabulary))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=characters)


def max_context(model: nn.Module) -> int:
    """Tokens that a loaded model takes at most."""
    config = model.config
    return config.block_size if isinstance(model, GPT) else config.max_position_embeddings


def logits_of(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A loaded model as token ids int64 [B, T] -> logits [B, T, V]."""
    return model if isinstance(model, GPT) else lambda ids: model(input_ids=ids, use_cache=False).logits
