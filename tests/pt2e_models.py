"""A small GPT prepared by PT2E and by eager QAT, and its training."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim

import potqat
from potqat import PoTConfig, pt2e
from potqat.models.gpt import GPT, GPTConfig

# torch warns about its own deepcopy of an exported graph, and Inductor's imports about torch.jit.
WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
]

VOCABULARY, CONTEXT = 65, 16
SHAPES = ({0: Dim("batch", min=1), 1: Dim("time", min=1, max=CONTEXT)},)
WEIGHT_ONLY = PoTConfig(activations=None)
PAPER = PoTConfig(
    grid="pot(7)", embedding_grid="pot(7)", granularity="tensor", scale="paper", rounding="paper", ste="identity",
    eps=2.0**-12,
)  # fmt: skip


def gpt(dropout=0.0):
    return GPT(GPTConfig(VOCABULARY, CONTEXT, n_layer=1, n_head=2, n_embd=32, dropout=dropout))


def tokens(batch=2, time=8):
    return torch.randint(VOCABULARY, (batch, time))


def prepare(model, cfg=WEIGHT_ONLY):
    return pt2e.prepare(model, (tokens(),), cfg, dynamic_shapes=SHAPES)


@functools.cache
def _both(cfg, dropout):
    model = gpt(dropout)
    eager = copy.deepcopy(model)
    potqat.prepare_qat_(eager, cfg)
    return prepare(model, cfg), eager


def both(cfg=WEIGHT_ONLY, dropout=0.0):
    """One model twice: prepared by PT2E, and eagerly. Copies, because an export takes a second."""
    return copy.deepcopy(_both(cfg, dropout))


def prepared(cfg=WEIGHT_ONLY, dropout=0.0):
    return both(cfg, dropout)[0]


def loss_of(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(model, steps, lr=1e-3):
    data = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, torch.randint(VOCABULARY, (4, CONTEXT + 1), generator=data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)
