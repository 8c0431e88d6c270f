"""Run a model over calibration data block by block, and hand out the second moments of its linear layers' inputs.

Only one block runs at a time, as it is now and in float: its inputs, two hidden states of every calibration token, are
kept, what its layers get in float, and the moments of one layer. So memory does not grow with the number of blocks.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from potqat.modules import kind_of, put

MOMENT_TOKENS = 65536  # tokens that moments are taken of: of longer data they are of every 2nd batch, or 3rd, ...


@dataclass(frozen=True)
class Inputs:
    """Linear layers with the same inputs, and what is known of these.

    Of data longer than MOMENT_TOKENS, whole batches from all over it stand for the rest.

    Attributes:
        names: of the layers, in the order of their calls.
        moment: mean of x x^T over the inputs x [K], float64 [K, K]; zeros if no input came.
        drift: mean of (x' - x) x^T, where x' is what the float model has in the place of x, float64 [K, K].
        count: number of inputs.
    """

    names: list[str]
    moment: torch.Tensor
    drift: torch.Tensor
    count: int


def check_batches(batches: object) -> list[torch.Tensor]:
    """Calibration data as a list.

    Raises:
        ValueError: no batch, or one that is not int64 [B, T] with at least one token.
    """
    if isinstance(batches, torch.Tensor):
        raise ValueError("potqat: calibration must be an iterable of token tensors, got one tensor; pass [tokens]")
    batches = list(batches)
    if not batches:
        raise ValueError("potqat: calibration is empty; give at least one int64 [B, T] tensor of tokens")
    for i, ids in enumerate(batches):
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
            got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ValueError(f"potqat: calibration[{i}] must be int64 token ids [B, T], got {got}")
    return batches


@torch.no_grad()
def walk(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    floats: Mapping[str, nn.Module],
    before: Callable[[str, Rows], None] | None = None,
    after: Callable[[str, Rows, list[torch.Tensor]], None] | None = None,
) -> Iterator[Inputs]:
    """Yield the inputs of each layer that is float as yet, in the order of their calls.

    The caller may replace the layers in ``model`` by others before it asks for the next inputs: these come from a model
    that holds the new ones. Put the model into eval mode first.

    Args:
        model: called with token ids; holds an nn.ModuleList of blocks, called one after another, each once and on what
            the one before it returned.
        batches: token ids, int64 [B, T] each.
        floats: the float layers by their names in ``model``, where some may be replaced already; their one input is
            [..., K]. One that is never called comes with a count of 0.
        before: called with the name of each block, and what runs it, before its first inputs; it may change the
            block's weights, but not what it returns.
        after: called with the name of each block, what runs it, and what the float model has in the place of its
            results, [1, T, C] for each row, after its last inputs; it may replace the block's layers once more.

    Raises:
        ValueError: the model does not run on the first batch, or has no such blocks.
    """
    chain = _Chain(model, batches, floats)
    names = {module: name for name, module in model.named_modules()}
    left = dict.fromkeys(floats)
    inside = []
    for block in chain.blocks:
        inside.append([names[m] for m in block.modules() if names[m] in left])
        for name in inside[-1]:
            del left[name]
    early = [name for name in left if name in chain.called_before]
    late = [name for name in left if name not in chain.called_before]
    with chain.patched():
        yield from chain.inputs(early, -1)
        chain.advance(early, -1)
        bar = tqdm(
            inside, "calibrate", unit="block", delay=2, leave=False, dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 5.0,
        )  # fmt: skip
        for i, members in enumerate(bar):
            if before is not None:
                before(names[chain.blocks[i]], Rows(chain, i))
            yield from chain.inputs(members, i)
            if after is not None:
                after(names[chain.blocks[i]], Rows(chain, i), chain.targets(members, i))
            if late or i + 1 < len(inside):
                chain.advance(members, i)
        yield from chain.inputs(late, len(inside))


class Rows:
    """Runs of one block, as it is when it is called, on rows of the calibration data, which has ``len()`` of them."""

    def __init__(self, chain: _Chain, at: int):
        self._chain, self._at = chain, at
        self._places = [(b, row) for b, ids in enumerate(chain.batches) for row in range(len(ids))]

    def __len__(self) -> int:
        return len(self._places)

    def __call__(self, rows: Sequence[int]) -> torch.Tensor:
        """The hidden states [R, T, C] that the block returns for these rows, which are of one length T."""
        with torch.autocast("cpu", enabled=False):  # which does not stack float16
            ids, hidden = (
                torch.stack([batches[b][row] for b, row in (self._places[i] for i in rows)])
                for batches in (self._chain.batches, self._chain.hidden)
            )
        return self._chain.run(self._at, ids, hidden)


class _Reached(Exception):
    """Thrown through the model's forward where the rest of it is of no use."""


class _Chain:
    """The blocks of a model, and the hidden states that enter the next one to run: those of the model as it is now, and
    those of the float one.

    Each block's forward is patched, so that the model itself prepares every argument but the hidden states: a run of
    block i passes the blocks before it, hands it the kept hidden states, and ends when it returns.
    """

    def __init__(self, model: nn.Module, batches: Sequence[torch.Tensor], floats: Mapping[str, nn.Module]):
        self.model, self.batches, self.floats = model, batches, floats
        self.options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        tokens = sum(ids.numel() for ids in batches)
        self._sampled = range(0, len(batches), -(-tokens // MOMENT_TOKENS))  # batches that moments are taken of
        self.hidden: list[torch.Tensor | None] = [None] * len(batches)
        self.hidden_float = list(self.hidden)
        self._float_outputs: dict[int, torch.Tensor | None] = {}  # of the block that runs, by batch
        self._find_blocks()

    def _find_blocks(self) -> None:
        """Run the row with the largest token id, and take the ModuleList that is a chain and holds most weights."""
        lists = {name: m for name, m in self.model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        seen: list[nn.Module] = []
        ends: dict[nn.Module, tuple[torch.Tensor, object]] = {}

        def before(module, args, kwargs):
            seen.append(module)

        def after(module, args, kwargs, output):
            ends[module] = _hidden_in(args, kwargs), output

        children = {child for modules in lists.values() for child in modules}
        hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in self.model.modules()]
        hooks += [m.register_forward_hook(after, with_kwargs=True) for m in children]
        batch = max(self.batches, key=lambda ids: int(ids.max()))
        row = int(batch.max(1).values.argmax())
        try:
            self.model(batch[row : row + 1], **self.options)
        except Exception as error:
            raise ValueError(
                f"potqat: the model does not run on calibration tokens {list(batch[row].shape)} up to "
                f"id {int(batch.max())}: {type(error).__name__}: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()

        def is_chain(modules: nn.ModuleList) -> bool:
            if any(seen.count(m) != 1 for m in modules) or sorted(modules, key=seen.index) != list(modules):
                return False
            inputs, outputs = zip(*(ends[m] for m in modules), strict=True)
            flow = zip([_hidden_of(out) for out in outputs[:-1]], inputs[1:], strict=True)
            return all(torch.is_tensor(a) and torch.is_tensor(b) and torch.equal(a, b) for a, b in flow)

        chains = [modules for modules in lists.values() if is_chain(modules)]
        if not chains:
            raise ValueError(
                f"potqat: {type(self.model).__name__} holds no nn.ModuleList of blocks that are called one "
                "after another, each on what the one before returned; calibration needs one, as in GPT-2 and Llama"
            )
        self.blocks = max(chains, key=lambda modules: sum(p.numel() for p in modules.parameters()))
        names = {module: name for name, module in self.model.named_modules()}
        self.called_before = {names[m] for m in seen[: seen.index(self.blocks[0])]}
        # What a block returns beside the hidden states (attention weights, where asked for) no other block reads.
        self._extra = [len(ends[m][1]) - 1 if isinstance(ends[m][1], tuple) else None for m in self.blocks]

    @contextmanager
    def patched(self) -> Iterator[None]:
        """While it lasts, a call of the model is a run of block ``self._at`` on ``self._now``."""
        before = [block.__dict__.get("forward") for block in self.blocks]
        for i, block in enumerate(self.blocks):
            block.forward = self._forward(i, block.forward)
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    def _forward(self, i: int, original: Callable) -> Callable:
        def forward(*args, **kwargs):
            if self._at < 0:
                self._now = _hidden_in(args, kwargs)
                raise _Reached
            if i == self._at:
                if args:
                    args = (self._now, *args[1:])
                else:
                    kwargs[next(iter(kwargs))] = self._now
                self._now = _hidden_of(original(*args, **kwargs))
                raise _Reached
            extra = self._extra[i]
            return self._now if extra is None else (self._now, *[None] * extra)

        return forward

    def run(self, at: int, ids: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """What block ``at`` returns for the tokens ``ids`` that enter it as ``hidden``; -1: what enters the first."""
        self._at, self._now = at, hidden
        with suppress(_Reached):
            self.model(ids, **self.options)
        return self._now

    def _run(self, at: int, b: int, hidden: list[torch.Tensor | None]) -> torch.Tensor | None:
        return self.run(at, self.batches[b], hidden[b])

    def targets(self, names: list[str], at: int) -> list[torch.Tensor]:
        """What the float model has after block ``at``, which holds the layers ``names``: [1, T, C] for each row."""
        return [
            rows[row : row + 1]
            for rows in (self._float_output(b, names, at) for b in range(len(self.batches)))
            for row in range(len(rows))
        ]

    def _float_output(self, b: int, names: list[str], at: int) -> torch.Tensor | None:
        if b not in self._float_outputs:
            with self._float(names):
                self._float_outputs[b] = self._run(at, b, self.hidden_float)
        return self._float_outputs[b]

    @contextmanager
    def _float(self, names: list[str]) -> Iterator[None]:
        """The float layers in their places, while it lasts."""
        now = {name: self.model.get_submodule(name) for name in names}
        try:
            for name in names:
                put(self.model, name, self.floats[name])
            yield
        finally:
            for name, module in now.items():
                put(self.model, name, module)

    def advance(self, names: list[str], at: int) -> None:
        """Replace the hidden states by those that block ``at``, which holds the layers ``names``, returns, or (-1) by
        those that enter the first block."""
        for b in range(len(self.batches)):
            self.hidden[b] = self._run(at, b, self.hidden)
            self.hidden_float[b] = self._float_output(b, names, at)
            del self._float_outputs[b]

    def inputs(self, names: list[str], at: int) -> Iterator[Inputs]:
        """The inputs of those of the layers ``names`` that are float, which block ``at`` calls (-1: what comes before
        the blocks; their number: what comes after)."""
        groups = self._groups([n for n in names if self.model.get_submodule(n) is self.floats[n]], at)
        with self._float(names):
            floats = {b: self._float_seen(groups, at, b) for b in self._sampled}
        for group, calls in groups:
            weight = self.floats[group[0]].weight
            k = weight.shape[0 if kind_of(self.floats[group[0]]) == "conv1d" else 1]
            moment, drift, count = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64), 0
            for b in self._sampled:
                now, float_ = self._seen(group, calls, at, b, self.hidden), floats[b].pop(group[0])
                for i, x in enumerate(now):
                    moment += x.t() @ x
                    count += len(x)
                    # A layer that sees some of the tokens only, as an expert does, may see others in the float model.
                    if len(x) == self.batches[b].numel() and i < len(float_):
                        drift += (float_[i] - x).t() @ x
            yield Inputs(group, moment.div_(max(1, count)), drift.div_(max(1, count)), count)

    def _seen(self, group: list[str], calls: int, at: int, b: int, hidden: list) -> list[torch.Tensor]:
        """What the first layer of a group is called with, float32 [inputs, K] for each call, in a run
        that ends with the group's last call."""
        seen, left = [], calls
        layers = [self.floats[name] for name in group]

        def note(module, args, kwargs):
            nonlocal left
            if module is layers[0]:
                seen.append(_rows_of(args, kwargs))
            left -= 1
            if left == 0:
                raise _Reached

        with _hooked(layers, note):
            self._run(at, b, hidden)
        return seen

    def _float_seen(self, groups: list[tuple[list[str], int]], at: int, b: int) -> dict[str, list[torch.Tensor]]:
        """What the first layers of all groups are called with in one run of the float model, by name; that of a block
        goes to its end, for ``advance``."""
        seen: dict[str, list[torch.Tensor]] = {group[0]: [] for group, _ in groups}
        name_of = {self.floats[name]: name for group, _ in groups for name in group}
        left = sum(calls for _, calls in groups)

        def note(module, args, kwargs):
            nonlocal left
            if name_of[module] in seen:
                seen[name_of[module]].append(_rows_of(args, kwargs))
            left -= 1
            if left == 0 and not 0 <= at < len(self.blocks):
                raise _Reached  # a head's logits are many, and nobody reads them

        if groups:
            with _hooked(name_of, note):
                output = self._run(at, b, self.hidden_float)
            if 0 <= at < len(self.blocks):
                self._float_outputs[b] = output
        return seen

    def _groups(self, names: list[str], at: int) -> list[tuple[list[str], int]]:
        """(float layers that are called on one tensor, number of their calls in a run), in call order, by the first
        batch; then those that it does not call, each by itself with 0."""
        calls: list[tuple[str, torch.Tensor]] = []
        name_of = {self.floats[name]: name for name in names}
        if names:
            with _hooked(
                name_of, lambda module, args, kwargs: calls.append((name_of[module], _hidden_in(args, kwargs)))
            ):
                self._run(at, 0, self.hidden)
        counts = Counter(name for name, _ in calls)
        groups: dict[object, list[str]] = {}
        for name, x in calls:
            if counts[name] == 1:
                groups.setdefault(id(x), []).append(name)  # calls keeps x, and so its id
            else:
                groups[name] = [name]
        made = [(group, sum(counts[name] for name in group)) for group in groups.values()]
        return made + [([name], 0) for name in names if not counts[name]]


@contextmanager
def _hooked(layers: Iterable[nn.Module], before: Callable) -> Iterator[None]:
    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hidden_in(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else next(iter(kwargs.values()), None)


def _rows_of(args: tuple, kwargs: dict) -> torch.Tensor:
    x = _hidden_in(args, kwargs)
    return x.reshape(-1, x.shape[-1]).float()


def _hidden_of(output: object) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
