"""prepare and convert: one call from a float model to QAT on its exported graphs, and one to the packed model."""

from __future__ import annotations

import copy
import warnings
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from potqat.config import PoTConfig
from potqat.pt2e.fake_quant import TARGETS, PoTPerChannelFakeQuantize
from potqat.pt2e.quantizer import PoTQuantizer
from potqat.report import Report


def prepare(model: nn.Module, example_inputs: tuple, cfg: PoTConfig, *, dynamic_shapes: Any = None) -> PreparedModel:
    """Export ``model`` and put a fake quantizer on every weight that ``cfg`` quantizes.

    Train the result as any module: ``train()``, ``eval()``, an optimizer from its ``parameters()``, checkpoints by
    ``state_dict``. It holds the Parameters of ``model`` itself (as eager QAT does): training it trains ``model``.

    Args:
        model: a float module that ``torch.export.export`` accepts. It is exported twice, in training and in evaluation
            form, so that dropout and everything else that depends on the mode behaves as in ``model``.
        example_inputs: positional inputs. Make dynamic dimensions at least 2 here: export fixes a dimension of 1.
        cfg: what to quantize and how.
        dynamic_shapes: as in ``torch.export.export``, for instance
            ``({0: Dim("batch", min=1), 1: Dim("time", min=1, max=block_size)},)``. None fixes all shapes.

    Returns:
        a PreparedModel in the mode (training or evaluation) of ``model``; ``report`` says what was quantized, what
        was not and why.

    Raises:
        ValueError: nothing to quantize, a pattern that matches nothing, a weight with NaN or infinity, or a graph
            that cannot be converted later (vmap). Errors of ``torch.export.export`` pass through.
    """
    quantizer = PoTQuantizer(cfg)
    modes = [(module, module.training) for module in model.modules()]
    graphs = {}
    try:
        for training in (True, False):
            model.train(training)
            exported = torch.export.export(model, example_inputs, dynamic_shapes=dynamic_shapes)
            graphs[training] = prepare_qat_pt2e(exported.module(check_guards=False), quantizer)
    finally:
        for module, training in modes:
            module.training = training
    return PreparedModel(model, graphs, quantizer.report).train(model.training)


def convert(qat: PreparedModel, target: str = "packed") -> GraphModule:
    """The inference form of a prepared model; ``qat`` is left as it was.

    Args:
        qat: from ``prepare``.
        target: ``"packed"`` calls ``torch.ops.potqat.linear`` and ``embedding`` on packed weights, each packed once
            however often it is used. ``"int8"`` holds the levels as int8 and calls the standard dequantize ops of
            ``torch.ops.quantized_decomposed``, which any PT2E backend runs; activations stay float and outputs equal
            those of ``qat.eval()`` exactly (under ``torch.no_grad``: autograd makes matmul choose other kernels).

    Returns:
        a GraphModule in evaluation form (``train()`` does not bring dropout back) without gradients. Its weights
        equal the fake-quantized ones bit for bit. To save it, ``torch.export`` it again (and ``import potqat`` before
        ``torch.export.load``).

    Raises:
        TypeError: ``qat`` is not a PreparedModel.
        ValueError: an unknown target, or a weight on a grid without a packed form (``pot(k)``).
    """
    if not isinstance(qat, PreparedModel):
        raise TypeError(
            f"potqat.pt2e.convert: needs the module that potqat.pt2e.prepare returned, got {type(qat).__name__}"
        )
    if target not in TARGETS:
        raise ValueError(f"potqat.pt2e.convert: target must be one of {', '.join(TARGETS)}; got {target!r}")
    graph = copy.deepcopy(qat).graphs[False]  # convert_pt2e changes its argument
    for module in graph.modules():
        if isinstance(module, PoTPerChannelFakeQuantize):
            module.target = target
    bodies = _hide_bodies(graph)
    converted = convert_pt2e(graph)
    for name, body in bodies.items():
        setattr(converted, name, body)
    # A fresh GraphModule: torchao makes train() and eval() of its own raise.
    return GraphModule(converted, converted.graph).requires_grad_(False).eval()


def _hide_bodies(graph: GraphModule) -> dict[str, GraphModule]:
    """Take the bodies of grad-mode and autocast regions (rotary embeddings have both) out of torchao's sight: of a
    region within a region fx deletes the inner body as unused (torch 2.13). Returns attribute -> body."""
    names = {node.target for node in graph.graph.find_nodes(op="get_attr")}
    bodies = {name: body for name, body in graph.named_children() if name in names and isinstance(body, GraphModule)}
    for name, body in bodies.items():
        setattr(graph, name, _Body(body))
    return bodies


class _Body(nn.Module):
    """A graph that is called, and that nobody looks into."""

    def __init__(self, body: GraphModule):
        super().__init__()
        self.forward = body.forward


class PreparedModel(nn.Module):
    """A model in QAT: two exported graphs, training and evaluation, over one set of parameters.

    Submodules, parameters and buffers have the names of the eager model, and each fake quantizer sits beside its
    weight as ``<name of the weight>_fake_quant``: a state_dict is interchangeable with that of eager QAT
    (``potqat.prepare_qat_``).

    Attributes:
        report: what was quantized, what was not and why.
        graphs: mode (``training``) -> GraphModule. ``forward`` runs that of the current mode.
    """

    def __init__(self, model: nn.Module, graphs: dict[bool, GraphModule], report: Report):
        super().__init__()
        self.report, self.graphs = report, graphs  # a dict: the graphs are views, not submodules
        tree = _same_tensors(model, {})
        self._parameters, self._buffers, self._modules = tree._parameters, tree._buffers, tree._modules
        self._non_persistent_buffers_set = tree._non_persistent_buffers_set
        for training, gm in graphs.items():
            self._move_in(gm, "_train_" if training else "_eval_")
        self._share()

    def _move_in(self, gm: GraphModule, prefix: str) -> None:
        """Take over what the graph refers to and the eager model does not have, and rename its references."""
        own = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        own |= {name for name, _ in self.named_buffers(remove_duplicate=False)}
        for node in gm.graph.nodes:
            if node.op not in ("call_module", "get_attr"):
                continue
            value = attrgetter(node.target)(gm)
            if isinstance(value, PoTPerChannelFakeQuantize):
                for fqn in value.fqns:
                    owner, _, leaf = fqn.rpartition(".")
                    self.get_submodule(owner).add_module(f"{leaf}_fake_quant", value)
                node.target = f"{value.fqns[0]}_fake_quant"
            elif node.target not in own:
                node.target = prefix + node.target.replace(".", "_")
                if isinstance(value, nn.Module):
                    self.add_module(node.target, value)
                else:  # a constant of the forward, no state of the model
                    self.register_buffer(node.target, value, persistent=False)
        gm.recompile()

    def _share(self) -> None:
        for gm in self.graphs.values():
            gm._parameters, gm._buffers, gm._modules = self._parameters, self._buffers, self._modules

    def __deepcopy__(self, memo: dict) -> PreparedModel:
        new = memo[id(self)] = PreparedModel.__new__(PreparedModel)
        with warnings.catch_warnings():  # of torch, about its own exported graphs
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
            new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        new._share()  # the copied graphs came with trees of their own
        return new

    def __reduce__(self):
        raise TypeError(
            "potqat: exported graphs cannot be pickled; save state_dict() and load it into prepare() of the same model"
        )

    def forward(self, *args, **kwargs):
        return self.graphs[self.training](*args, **kwargs)


def _same_tensors(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """A tree of plain modules with the same Parameters and buffers under the same names."""
    if module not in copies:
        copies[module] = plain = nn.Module()
        plain._parameters, plain._buffers = dict(module._parameters), dict(module._buffers)
        plain._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            plain._modules[name] = None if child is None else _same_tensors(child, copies)
    return copies[module]
