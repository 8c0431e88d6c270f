"""The modules that replace Linear, Conv1D and Embedding: QAT twins with a float master weight, and packed ones.

All are plain ``nn.Module``s with plain parameters and buffers, so state_dict, deepcopy, pickle and DDP work.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from potqat import ops
from potqat.config import PoTConfig
from potqat.fake_quant import PoTFakeQuantize

KINDS = {nn.Linear: "linear", nn.Embedding: "embedding"}


def kind_of(module: nn.Module) -> str | None:
    """The kind of a module that holds a quantizable weight, or None. (Conv1D is told by name: most users of potqat
    have no reason to import transformers.)"""
    if (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return "conv1d"
    return next((kind for cls, kind in KINDS.items() if isinstance(module, cls)), None)


class QATLinear(nn.Linear):
    """Linear whose weight passes a PoTFakeQuantize; keeps the float module's Parameter objects."""

    def __init__(self, linear: nn.Linear, weight_fake_quant: PoTFakeQuantize, observe: bool = True):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_fake_quant, self.observe = weight_fake_quant, observe
        self.training = linear.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight_fake_quant(self.weight, self.observe), self.bias)


class QATConv1D(nn.Module):
    """Hugging Face's Conv1D (GPT-2), a Linear whose weight is stored [in_features, out_features], fake-quantized."""

    def __init__(self, conv: nn.Module, weight_fake_quant: PoTFakeQuantize, observe: bool = True):
        super().__init__()
        self.nx, self.nf = conv.weight.shape
        self.weight, self.bias = conv.weight, conv.bias
        self.weight_fake_quant, self.observe = weight_fake_quant, observe
        self.training = conv.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight_fake_quant(self.weight.t(), self.observe).t()
        return torch.addmm(self.bias, x.reshape(-1, self.nx), weight).view(*x.shape[:-1], self.nf)


class QATEmbedding(nn.Embedding):
    """Embedding whose table passes a PoTFakeQuantize; a tied head shares the Parameter and the fake quantizer."""

    def __init__(self, embedding: nn.Embedding, weight_fake_quant: PoTFakeQuantize, observe: bool = True):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = embedding.padding_idx, None, embedding.norm_type
        self.scale_grad_by_freq, self.sparse = embedding.scale_grad_by_freq, False
        self.weight = embedding.weight
        self.weight_fake_quant, self.observe = weight_fake_quant, observe
        self.training = embedding.training

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight_fake_quant(self.weight, self.observe), self.padding_idx)


TWINS = {"linear": QATLinear, "conv1d": QATConv1D, "embedding": QATEmbedding}


class Packed(nn.Module):
    """What packed modules share: buffers ``packed`` (uint8) and ``scale`` (float32 [G, N]), and how to read them.

    Attributes:
        cfg: the PoTConfig of this weight.
        shape: (out_features, in_features), or (num_embeddings, embedding_dim).
        sqnr_db: error of quantization against the float weight, in dB; None if nobody measured it.
    """

    def __init__(self, packed: torch.Tensor, scale: torch.Tensor, cfg: PoTConfig, shape: tuple[int, int]):
        super().__init__()
        self.cfg, self.shape, self.sqnr_db = cfg, tuple(shape), None
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    def _apply(self, fn, recurse=True):
        # .half(), .to(bfloat16): the model's floats change dtype, scales do not (a rounded scale moves every weight).
        exact = self._buffers.get("scale")
        super()._apply(fn, recurse)
        if exact is not None and self.scale.dtype != exact.dtype:
            self._buffers["scale"] = exact.to(self.scale.device)
        return self

    @property
    def packed_bytes(self) -> int:
        """Bytes of the codes and scales."""
        return self.packed.nbytes + self.scale.nbytes

    def dequantize(self) -> torch.Tensor:
        """The weight as float32 [N, K]."""
        return ops.unpack(self.packed, self.scale, self.cfg, self.shape)

    def extra_repr(self) -> str:
        n, k = self.shape
        return f"{n} x {k}, grid={self.cfg.grid}, granularity={self.cfg.granularity}"


class PackedLinear(Packed):
    """Inference Linear on packed weights: ``potqat.linear``.

    Shapes: x [..., in_features] -> [..., out_features], in x's dtype; cfg.activations chooses int8 or float.
    """

    def __init__(self, packed, scale, bias, cfg, shape):
        super().__init__(packed, scale, cfg, shape)
        self._set_bias(bias)

    def _set_bias(self, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = self.shape
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point() or x.shape[-1:] != (self.in_features,):
            raise ValueError(f"potqat.linear: x must be float [..., {self.in_features}], got {x.dtype} {list(x.shape)}")
        cfg = self.cfg
        return ops.run_linear(
            x, self.packed, self.scale, self.bias, cfg.grid, self.out_features, cfg.group_size,
            ops.activation_mode(cfg), 1.0, 0,
        )  # fmt: skip


class PackedEmbedding(Packed):
    """Inference Embedding on a packed table: ``potqat.embedding``, cast to the float table's dtype.

    Shapes: ids [...] -> [..., embedding_dim].
    """

    def __init__(self, packed, scale, cfg, shape, dtype=torch.float32):
        super().__init__(packed, scale, cfg, shape)
        self._set_dtype(dtype)

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self.num_embeddings, self.embedding_dim = self.shape
        self.dtype = dtype

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # as the float table's would have changed
        return super()._apply(fn, recurse)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ops.embedding(ids, self.packed, self.scale, self.cfg, shape=self.shape).to(self.dtype)


class Tied:
    """A module whose weight is that of another packed module, its ``owner``: it holds no codes, so a state_dict, and a
    file, has them once."""

    def _tie(self, owner: Packed, cfg: PoTConfig) -> None:
        nn.Module.__init__(self)
        self.cfg, self.shape, self.sqnr_db = cfg, owner.shape, owner.sqnr_db
        self._owner = (owner,)  # in a tuple: not a submodule, which state_dict would list a second time

    @property
    def owner(self) -> Packed:
        return self._owner[0]

    @property
    def packed(self) -> torch.Tensor:
        return self.owner.packed

    @property
    def scale(self) -> torch.Tensor:
        return self.owner.scale


class TiedLinear(Tied, PackedLinear):
    """A PackedLinear, mostly a model's head, on the weight of its ``owner``, mostly the token embedding."""

    def __init__(self, owner: Packed, bias: torch.Tensor | None, cfg: PoTConfig):
        self._tie(owner, cfg)
        self._set_bias(bias)


class TiedEmbedding(Tied, PackedEmbedding):
    """A PackedEmbedding on the weight of its ``owner``."""

    def __init__(self, owner: Packed, cfg: PoTConfig, dtype: torch.dtype = torch.float32):
        self._tie(owner, cfg)
        self._set_dtype(dtype)


def replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module in the place of its old one, under every name that the old one has in ``model``."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            put(model, name, replacements[module])


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Make ``module`` the submodule ``name`` of ``model``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
