"""What MODEL means on the command line, and how it is loaded: a hub name, a Hugging Face folder, a GGUF file, a nanoGPT
checkpoint, or a folder that potqat wrote. ``find`` says what a name is before a weight is kept; ``load`` loads it."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import potqat
from potqat import checkpoint, container, manifest
from potqat.flows.text import read_text
from potqat.models.gpt import GPT, GPTConfig, load_nanogpt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GPT_TYPE = GPT.__name__.lower()  # config.json's model_type of potqat.models.gpt
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Source:
    """A model whose architecture is known and whose weights nobody has loaded.

    Attributes:
        name: as the user gave it.
        kind: "hub", "folder", "gguf" or "nanogpt".
        config: GPTConfig, or transformers' configuration of a causal language model.
        packed: it holds packed modules; otherwise it is float.
    """

    name: str
    kind: str
    config: Any
    packed: bool = False

    @property
    def path(self) -> Path:
        return Path(self.name)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return self._text_config.vocab_size

    @property
    def width(self) -> int:
        """Numbers of a token's hidden state."""
        return self.config.n_embd if isinstance(self.config, GPTConfig) else self._text_config.hidden_size

    @property
    def max_context(self) -> int:
        """Tokens that the model takes at most."""
        if isinstance(self.config, GPTConfig):
            return self.config.block_size
        # A model without positions, as Bloom or Mamba, sets no limit.
        return getattr(self._text_config, "max_position_embeddings", None) or sys.maxsize

    @property
    def _text_config(self) -> Any:
        return self.config if isinstance(self.config, GPTConfig) else self.config.get_text_config()

    def identity(self) -> str:
        """Its name and, of files here, their sizes and times: another model under the same name has another one."""
        folder = self.path.is_dir()
        files = sorted(self.path.iterdir()) if folder else [self.path] * self.path.is_file()
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return f"{self.name} {hashlib.sha256(repr(states).encode()).hexdigest()[:16]}" if files else self.name


def find(name: str) -> Source:
    """Tell what ``name`` is, and read its configuration.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no model that potqat reads: damaged, quantized by something else, no causal language model, or
            transformers is needed and not installed.
        OSError: neither this machine nor the hub has it.
    """
    path = Path(name)
    if name and path.is_dir():
        if not (path / checkpoint.CONFIG).is_file():
            raise ValueError(
                f"{name}: a folder without {checkpoint.CONFIG}; name a GGUF file or nanoGPT's ckpt.pt itself"
            )
        config = checkpoint.read_config(path)
        packed = _is_packed(name, config.get("quantization_config"))
        if config.get("model_type") == GPT_TYPE:
            return Source(name, "folder", _gpt_config(path / checkpoint.CONFIG, config), packed)
        return Source(name, "folder", _hf_config(name, "folder"), packed)
    if path.is_file():
        if path.suffix == ".gguf":
            return Source(name, "gguf", _hf_config(name, "gguf"))
        if path.suffix in (".pt", ".pth"):
            return Source(name, "nanogpt", load_nanogpt(path).config)
        raise ValueError(f"{name}: neither a .gguf file nor a nanoGPT checkpoint (.pt)")
    if not HUB_NAME.fullmatch(name) or path.suffix in (".gguf", ".pt", ".pth"):
        raise FileNotFoundError(f"{name or 'MODEL is empty'}: no such file or folder")
    config = _hf_config(name, "hub")
    return Source(name, "hub", config, _is_packed(name, getattr(config, "quantization_config", None)))


def _is_packed(name: str, quantization: dict[str, Any] | None) -> bool:
    if quantization is None:
        return False
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != manifest.QUANT_METHOD:
        raise ValueError(
            f"{name}: already quantized, by {method!r}, which potqat does not read; name the float model it came from"
        )
    manifest.parse(quantization, f"{name}/{checkpoint.CONFIG}")
    return True


def _gpt_config(path: Path, config: dict[str, Any]) -> GPTConfig:
    try:
        return GPTConfig(**{key: config[key] for key in GPTConfig.__dataclass_fields__})
    except (KeyError, TypeError, ValueError) as error:
        raise potqat.PoTFormatError(f"{path}: does not describe a GPT: {error}") from None


def _hf_config(name: str, kind: str):
    """transformers' configuration of a causal language model."""
    transformers = _transformers(name, gguf=kind == "gguf")
    place, gguf = _place(name, kind)
    with _reading(name, f"{name}: not a file or folder here, and the hub does not give it" if kind == "hub" else None):
        # False: never run code that came with a model, and do not ask whether to.
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, **gguf)
        models = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        made = models[type(config)].__name__ if type(config) in models else None
    # transformers makes a causal model of an encoder's weights, too.
    causal = (made, "ForCausalLM", "LMHeadModel")
    named = config.architectures or [made]
    if made is None or not any(architecture.endswith(causal) for architecture in named):
        raise ValueError(
            f"{name}: no causal language model ({config.model_type}: {', '.join(config.architectures or ['?'])}); "
            "potqat takes those that predict the next token"
        )
    return config


def skeleton(source: Source) -> nn.Module:
    """The float model of a source without weights (on the meta device): its modules and sizes, for plans and estimates.

    Raises:
        ValueError: the source is packed.
    """
    if source.packed:
        raise ValueError(f"{source.name}: already quantized; name the float model that it came from")
    with torch.device("meta"), _NoInit():
        if isinstance(source.config, GPTConfig):
            return GPT(source.config)
        import transformers

        with _reading(source.name):
            return transformers.AutoModelForCausalLM.from_config(source.config)


def load(source: Source, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in eval mode. A packed one is memory-mapped, and keeps the dtypes that it was saved with.

    Args:
        dtype: of a float model, whatever its files hold.

    Raises:
        ValueError: files that are damaged, or do not hold every weight of the model in its shape.
        PoTFormatError: files of a packed model that cannot be trusted.
        OSError: the hub or the folder does not give it.
    """
    if source.kind == "nanogpt":
        return load_nanogpt(source.path).to(dtype)
    if isinstance(source.config, GPTConfig):
        with torch.device("meta"), _NoInit():
            model = GPT(source.config)
        return potqat.load(source.path, model).eval()
    transformers = _transformers(source.name, gguf=source.kind == "gguf")
    place, options = _place(source.name, source.kind)
    # The configuration is given: to read it from a GGUF file again takes seconds.
    options |= {"config": source.config, "output_loading_info": True}
    if source.packed:
        if source.kind == "folder":
            container.open_folder(source.path)  # a damaged file is refused before transformers 4.57 opens it
        from potqat import hf  # noqa: F401  registers the quantizer (import potqat.hf would make potqat a local name)
    else:
        options |= {"dtype": dtype, "ignore_mismatched_sizes": True}  # they are reported, and refused below
    with _reading(source.name):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(place, **options)
    # transformers would fill these with random numbers, and say so in its log.
    for what, names in (("missing", found["missing_keys"]), ("of another shape", found["mismatched_keys"])):
        if names:
            first = min(name if isinstance(name, str) else name[0] for name in names)  # 5.x: (name, shapes)
            raise ValueError(
                f"{source.name}: {len(names)} of the weights that {checkpoint.CONFIG} asks for are {what}, as {first}; "
                "get the folder again, complete"
            )
    if source.kind == "gguf":
        _forget_gguf(model)
    return model.eval()


def _forget_gguf(model: PreTrainedModel) -> None:
    """transformers 5 reads the weights as floats, but takes the model for a packed one, which it does not write."""
    for name in ("hf_quantizer", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    model.is_quantized = False


class _NoInit(TorchFunctionMode):
    """Leaves out torch.nn.init: on the meta device it sets nothing, but its first normal_ imports PyTorch's compiler
    (1.7 s and 70 MB)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def _place(name: str, kind: str) -> tuple[str, dict[str, Any]]:
    """(what from_pretrained is given, its ``gguf_file`` argument)."""
    if kind == "gguf":
        return str(Path(name).parent), {"gguf_file": Path(name).name}
    return name, {}


def _transformers(name: str, gguf: bool = False):
    for package in ("transformers", *(("gguf", "accelerate") if gguf else ())):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{name}: reading it needs {package}; pip install 'potqat[hf]'")
    import huggingface_hub
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # of each weight; the hub's bars go, too
    huggingface_hub.utils.logging.set_verbosity_error()
    huggingface_hub.utils.enable_progress_bars()
    return transformers


@contextmanager
def _reading(name: str, failed: str | None = None) -> Iterator[None]:
    """A library lets anything out of files that it cannot read: here it becomes one line that names the model."""
    try:
        yield
    except potqat.PoTFormatError:
        raise
    except Exception as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        if isinstance(error, OSError):
            raise OSError(f"{failed or name}: {why}") from error
        if isinstance(error, ValueError):
            raise ValueError(f"{name}: transformers does not take it: {why}") from error
        why = f"{type(error).__name__}: {why}"
        raise ValueError(f"{name}: cannot be read, it may be damaged ({why}); get it again") from error


def tokenizer_of(source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, or None: there is none, or transformers is not installed.

    Raises:
        ValueError, OSError: it cannot be read.
    """
    if source.kind == "nanogpt" or importlib.util.find_spec("transformers") is None:
        return None
    place, gguf = _place(source.name, source.kind)
    return _tokenizer(source.name, place, **gguf)


def tokenizer_for(source: Source, name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that a user names (see ``tokenizer``), or else the one beside the model.

    Raises:
        ValueError: there is none, or it cannot be read.
        OSError: neither this machine nor the hub has the one that is named.
    """
    found = tokenizer(name) if name is not None else tokenizer_of(source)
    if found is None:
        raise ValueError(f"{source.name}: no tokenizer beside the model; name one with --tokenizer")
    return found


def _tokenizer(name: str, place: str, **gguf: str) -> PreTrainedTokenizerBase | None:
    folder = Path(place)
    if folder.is_dir() and not gguf and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return None
    transformers = _transformers(name)
    with _reading(f"the tokenizer {name}", f"{name}: no tokenizer of this name here, and the hub does not give one"):
        found = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False, **gguf)
    return found if found.vocab_size else None  # some are made without files, and know nothing


def tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that a user names: of a hub model or folder, or, for a text file (.txt), its characters in sorted
    order, which is how nanoGPT numbers character-level data.

    Raises:
        ValueError: transformers is not installed, or there is no tokenizer, or the text is empty or not UTF-8.
        OSError: neither this machine nor the hub has it.
    """
    transformers = _transformers(name)
    if not name.endswith(".txt"):
        if not name or Path(name).is_file() or not (Path(name).is_dir() or HUB_NAME.fullmatch(name)):
            raise ValueError(f"the tokenizer {name!r}: no such folder; name a folder, a hub model or a .txt file")
        if found := _tokenizer(name, name):
            return found
        raise ValueError(f"{name}: holds no tokenizer; name another folder or hub model, or a .txt file")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: i for i, character in enumerate(sorted(set(read_text(name))))}
    characters = Tokenizer(models.WordLevel(vocabulary))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=characters)


def logits_of(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A loaded model as token ids int64 [B, T] -> logits [B, T, V]."""
    return model if isinstance(model, GPT) else lambda ids: model(input_ids=ids, use_cache=False).logits
