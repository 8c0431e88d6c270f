"""The modules that replace Linear and Embedding: QAT twins with a float master weight, and packed ones.

All are plain ``nn.Module``s with plain parameters and buffers, so state_dict, deepcopy, pickle and DDP work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from potqat import ops
from potqat.config import PoTConfig
from potqat.fake_quant import PoTFakeQuantize


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


class _Packed(nn.Module):
    """Buffers ``packed`` (uint8) and ``scale`` (float32 [G, N]); shape and format as attributes."""

    def __init__(self, packed: torch.Tensor, scale: torch.Tensor, cfg: PoTConfig, shape: tuple[int, int]):
        super().__init__()
        self.cfg, self.shape = cfg, tuple(shape)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    def _apply(self, fn, recurse=True):
        # .half(), .to(bfloat16): the model's floats change dtype, scales do not (a rounded scale moves every weight).
        exact = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != exact.dtype:
            self.scale = exact.to(self.scale.device)
        return self

    def dequantize(self) -> torch.Tensor:
        """The weight as float32 [N, K]."""
        return ops.unpack(self.packed, self.scale, self.cfg, self.shape)

    def extra_repr(self) -> str:
        n, k = self.shape
        return f"{n} x {k}, grid={self.cfg.grid}, granularity={self.cfg.granularity}"


class PackedLinear(_Packed):
    """Inference Linear on packed weights: ``potqat.linear``.

    Shapes: x [..., in_features] -> [..., out_features], in x's dtype; cfg.activations chooses int8 or float.
    """

    def __init__(self, packed, scale, bias, cfg, shape):
        super().__init__(packed, scale, cfg, shape)
        self.out_features, self.in_features = self.shape
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.packed, self.scale, self.bias, self.cfg, out_features=self.out_features)


class PackedEmbedding(_Packed):
    """Inference Embedding on a packed table: ``potqat.embedding``, cast to the float table's dtype.

    Shapes: ids [...] -> [..., embedding_dim].
    """

    def __init__(self, packed, scale, cfg, shape, dtype=torch.float32):
        super().__init__(packed, scale, cfg, shape)
        self.num_embeddings, self.embedding_dim = self.shape
        # An empty buffer follows .half() and .to(bfloat16) as the float table did.
        self.register_buffer("_dtype", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype.dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ops.embedding(ids, self.packed, self.scale, self.cfg, shape=self.shape).to(self.dtype)
