"""GPT with nanoGPT's architecture and parameter names (github.com/karpathy/nanoGPT, model.py).

It differs in one thing: ``forward`` gives the logits of every position and no loss, so that one graph serves training,
evaluation and generation; for decoding it takes a key/value cache (generate.py samples).
B = batch, T = time (tokens), C = channels (n_embd), V = vocabulary, S = block_size.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

KVCache: TypeAlias = list[
    tuple[torch.Tensor, torch.Tensor]
]  # keys and values of each layer, [B, heads, slots, C/heads]


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT; the field names are nanoGPT's ``model_args``.

    Raises:
        ValueError: a size below 1, a width that the heads do not divide, or a dropout outside [0, 1).
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"GPTConfig: n_head must divide n_embd, got {self.n_head} and {self.n_embd}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"GPTConfig: dropout must be in [0, 1), got {self.dropout}")


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, channels: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
        b, t, c = x.shape
        heads = (b, t, self.n_head, c // self.n_head)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))  # (B, heads, T, C/heads)
        dropout = self.dropout if self.training else 0.0
        mask = None
        if past is not None:
            # All slots and a mask: the shapes, and so the compiled graph, are the same at many positions.
            keys, values, positions, mask = past
            k = keys.index_copy_(2, positions, k.to(keys.dtype))  # autocast makes k bfloat16
            v = values.index_copy_(2, positions, v.to(values.dtype))
        if (
            past is not None and t == 1
        ):  # three small products, which torch.compile fuses: half the time of the general op
            scores = (q @ k.transpose(-1, -2) * k.shape[-1] ** -0.5).masked_fill(
                ~mask, -math.inf
            )  # (B, heads, 1, slots)
            y = scores.softmax(-1) @ v  # (B, heads, 1, C/heads)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=past is None)  # (B, heads, T, C/heads)
        y = y.transpose(1, 2).reshape(b, t, c)  # (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Decoder-only transformer; ``lm_head`` and the token table ``wte`` are one tensor.

    Shapes: token ids int64 [B, T], T at most ``block_size`` -> logits [B, T, V].

    With ``cache`` (of ``empty_cache``) the tokens follow those that the cache holds: their keys and values are written
    into it at ``positions``, int64 [T]; each token sees the cache up to its own position. A cache of fewer slots, views
    of the first ones, is read faster; every position must lie in it. ``potqat.models.generate.Decoder`` keeps count of
    the positions. For inference: call it under ``torch.no_grad()``.

    Raises:
        ValueError: more tokens than ``block_size``, or a cache without positions.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(_init_weights)
        # GPT-2: each block adds two terms to the residual stream; this keeps its variance at the start.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(
        self, idx: torch.Tensor, cache: KVCache | None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        t = idx.shape[1]
        if t > self.config.block_size:
            raise ValueError(f"GPT: at most block_size={self.config.block_size} tokens fit, got {t}; crop the input")
        if (cache is None) != (positions is None):
            raise ValueError("GPT: cache and positions go together; give both or none")
        pasts = [None] * self.config.n_layer
        if cache is None:
            positions = torch.arange(t, device=idx.device)  # (T)
        else:
            mask = torch.arange(cache[0][0].shape[2], device=idx.device) <= positions[:, None]  # (T, slots)
            pasts = [(keys, values, positions, mask) for keys, values in cache]
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))  # (B, T, C)
        for block, past in zip(self.transformer.h, pasts, strict=True):
            x = block(x, past)
        return self.lm_head(self.transformer.ln_f(x))  # (B, T, V)

    def empty_cache(self, batch_size: int) -> KVCache:
        """Keys and values of each layer, zeros [B, heads, S + 1, C/heads] in the model's float dtype, on its device.

        Raises:
            ValueError: a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"GPT: a cache needs a batch size of at least 1, got {batch_size}")
        config = self.config
        # One slot is never used: a view of all slots would be contiguous, for which torch.compile makes another graph.
        shape = (batch_size, config.n_head, config.block_size + 1, config.n_embd // config.n_head)
        like = self.transformer.ln_f.weight  # float in a packed model, too
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.n_layer)]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def load_nanogpt(path: str | Path) -> GPT:
    """The model of a nanoGPT checkpoint (``ckpt.pt`` of its train.py), on the CPU and in eval mode.

    Nothing in the file is executed (``weights_only=True``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a nanoGPT checkpoint, or its tensors do not fit its ``model_args``.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load lets anything out of a damaged or foreign file
        why = type(error).__name__
        raise ValueError(f"{path}: not a PyTorch checkpoint of plain tensors ({why}); save it again") from error
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= set(checkpoint):
        raise ValueError(f"{path}: not a nanoGPT checkpoint: it has no 'model' and 'model_args'; train.py writes both")
    known = {f.name for f in dataclasses.fields(GPTConfig)}
    try:
        model = GPT(GPTConfig(**{key: value for key, value in checkpoint["model_args"].items() if key in known}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: model_args do not describe a GPT: {error}") from None
    # torch.compile puts _orig_mod. before each name; attn.bias is the causal mask that old PyTorch versions needed.
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".attn.bias")}
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected:
            what = "lacks" if name not in state else "has the unknown tensor"
            raise ValueError(f"{path}: the checkpoint {what} {name!r}; its model_args are {checkpoint['model_args']}")
        if state[name].shape != expected[name].shape:
            shapes = f"{list(state[name].shape)}, its model_args need {list(expected[name].shape)}"
            raise ValueError(f"{path}: {name} is {shapes}")
    model.load_state_dict(state)
    return model.eval()
