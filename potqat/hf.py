"""Hugging Face models: transformers' quantizer registry, and a form that torch.export takes.

Importing this module registers the method "potqat" with transformers, so that ``from_pretrained`` reads a folder that
``potqat.save`` or ``save_pretrained`` wrote, and, with ``quantization_config=PoTQuantizationConfig(cfg)``, quantizes a
float model as it loads. transformers 4.57 and 5.x.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from potqat import checkpoint, container, manifest, modules
from potqat.config import PoTConfig
from potqat.modules import Packed
from potqat.quantize import quantize_
from potqat.report import Report


@register_quantization_config(manifest.QUANT_METHOD)
class PoTQuantizationConfig(QuantizationConfigMixin):
    """transformers' view of a potqat model: what to do with a float one, or what a packed one holds.

    Args:
        cfg: quantize the float model that is loaded by this.

    Attributes:
        manifest: the ``quantization_config`` of a packed model (manifest.py), None before it is quantized.
    """

    def __init__(self, cfg: PoTConfig | None = None):
        self.quant_method = manifest.QUANT_METHOD
        self.cfg = cfg
        self.manifest: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs: bool = False, **kwargs):
        """Raises PoTFormatError: not a ``quantization_config`` that this potqat reads."""
        manifest.parse(config_dict, "config.json")
        config = cls()
        config.manifest = dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        if self.manifest is not None:
            return self.manifest
        return {"quant_method": self.quant_method, "config": None if self.cfg is None else self.cfg.to_dict()}


@register_quantizer(manifest.QUANT_METHOD)
class PoTHfQuantizer(HfQuantizer):
    """Called by ``from_pretrained``: packed modules before the weights are read, checks and mapped codes after.

    Attributes:
        report: of the quantization, if the model was float.
    """

    requires_parameters_quantization = False

    def __init__(self, quantization_config: PoTQuantizationConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.report: Report | None = None
        self._folder = Path()
        self._packed: dict[str, Packed] = {}

    def validate_environment(self, *args, **kwargs) -> None:
        if not self.pre_quantized and self.quantization_config.cfg is None:
            raise ValueError(
                "potqat: to quantize a float model as it loads, pass "
                "quantization_config=potqat.hf.PoTQuantizationConfig(potqat.PoTConfig(...))"
            )

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if not self.pre_quantized:
            return model
        self._folder = Path(checkpoint_files[0]).parent if checkpoint_files else _folder_of(model.config)
        where = str(self._folder / checkpoint.CONFIG)
        specs = manifest.parse(self.quantization_config.manifest, where)
        self._packed = manifest.build(model, specs, where)
        # A damaged file is refused before transformers reads it.
        checkpoint.check_tensors(
            self._folder, checkpoint.packed_tensors(self._packed), container.open_folder(self._folder)
        )
        for name, module in self._packed.items():
            if isinstance(module, modules.PackedEmbedding):  # the dtype that from_pretrained was asked for
                module.dtype = model.get_submodule(name).weight.dtype
            # transformers initializes some weights through the parent, as GPT-2's c_proj.weight; here there is none.
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True
        modules.replace(model, {model.get_submodule(name): module for name, module in self._packed.items()})
        _untie(model)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            self.report = quantize_(model, self.quantization_config.cfg)
            return model
        # transformers casts floats to the model's dtype and may copy; codes and scales come from the mapped file.
        stored = container.open_folder(self._folder)
        tensors = container.map_tensors(stored)
        checkpoint.check_values(self._packed, stored, tensors)
        for name, module in self._packed.items():
            if not isinstance(module, modules.Tied):
                device = module.packed.device  # that of the device_map; on the CPU nothing is copied
                module.packed = tensors[f"{name}.packed"].to(device)
                module.scale = tensors[f"{name}.scale"].to(device)
        _share_mapping(model, tensors)
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _folder_of(config) -> Path:
    """Where the files of a model lie, in Hugging Face's cache if it came from the hub. (4.57 gives no file names.)"""
    name, commit = config.name_or_path, getattr(config, "_commit_hash", None)
    return Path(cached_file(name, checkpoint.CONFIG, revision=commit)).parent


def _share_mapping(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Take the floats that transformers read without a change from ``tensors``, too: its own mapping of the file would
    stay for them beside that one, and its pages count twice in the process's memory."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        mapped = tensors.get(name)
        if mapped is None or (mapped.dtype, mapped.device) != (tensor.dtype, tensor.device):
            continue
        if isinstance(tensor, nn.Parameter) and torch.equal(mapped, tensor):
            tensor.data = mapped
        elif torch.equal(mapped, tensor):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, mapped)


def attach(model: PreTrainedModel) -> None:
    """Let transformers know that ``model`` holds packed modules: ``save_pretrained`` then writes them."""
    config = PoTQuantizationConfig()
    config.manifest = manifest.describe(model)
    model.config.quantization_config = config
    if not isinstance(getattr(model, "hf_quantizer", None), PoTHfQuantizer):
        model.hf_quantizer = PoTHfQuantizer(config, pre_quantized=True)
    model.hf_quantizer.quantization_config = config
    model.is_quantized, model.quantization_method = True, config.quant_method
    _untie(model)


def _untie(model: PreTrainedModel) -> None:
    """Stop transformers from tying what it knows as ``.weight``: a packed head reads its owner's codes by itself."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if any(isinstance(module, Packed) for module in ends):
        model.config.tie_word_embeddings = False
    ties = getattr(model, "all_tied_weights_keys", {})  # transformers 5
    for names in list(ties.items()):
        if any(isinstance(model.get_submodule(name.rpartition(".")[0]), Packed) for name in names):
            del ties[names[0]]


class CausalLogits(nn.Module):
    """A Hugging Face causal language model as token ids int64 [B, T] -> logits [B, T, V], which torch.export takes.

    It passes its own causal mask (that of transformers 4.57 holds vmap nodes, which torchao cannot convert) and no
    cache. It shares the submodules, and so the parameters and their names, of ``model``: training it trains ``model``.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self._model = (model,)  # in a tuple: not a submodule, names stay those of the model
        self._modules = model._modules
        self.training = model.training

    def train(self, mode: bool = True):
        self._model[0].train(mode)
        return super().train(mode)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        b, t = ids.shape
        mask = torch.ones(t, t, dtype=torch.bool, device=ids.device).tril()[None, None].expand(b, 1, t, t)
        return self._model[0](input_ids=ids, attention_mask=mask, use_cache=False).logits
