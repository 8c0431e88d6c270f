"""PoTPerChannelFakeQuantize: PoTFakeQuantize as torchao's PT2E knows fake quantizers, with its lowering."""

from __future__ import annotations

import torch

# importing it registers the ops of torch.ops.quantized_decomposed
from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import FakeQuantizeBase
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from potqat import ops, reference
from potqat.config import PoTConfig
from potqat.fake_quant import PoTFakeQuantize

aten = torch.ops.aten
TARGETS = ("packed", "int8")


class PoTPerChannelFakeQuantize(PoTFakeQuantize, FakeQuantizeBase):
    """The fake quantizer of one weight in an exported graph, shared by all uses of that weight.

    It is a PoTFakeQuantize (same maths, same state_dict keys) of the class that torchao looks for; ``convert_pt2e``
    calls ``convert``, which puts ``torch.ops.potqat`` (or, with ``target = "int8"``, standard dequantize) nodes into
    the graph.

    Args:
        weight: the Parameter, [N, K], or [K, N] if ``transposed`` (``addmm``, Hugging Face's Conv1D).
        cfg: the resolved configuration of this weight.
        fqn: name of the Parameter, for instance ``"lm_head.weight"``.
        transposed: whether the Parameter is stored [K, N].

    Attributes:
        fqns: the names of the Parameter in the modules that use it, more than one if it is tied.
        target: ``"packed"`` or ``"int8"``, what ``convert`` lowers to.

    Raises:
        ValueError: as PoTFakeQuantize.
    """

    def __init__(self, weight: torch.Tensor, cfg: PoTConfig, fqn: str, transposed: bool = False):
        super().__init__(weight.t() if transposed else weight, cfg, fqn.removesuffix(".weight"))
        self.fqns = [fqn]
        self.transposed, self.observing, self.target = transposed, True, TARGETS[0]
        # torchao's flags stay out of the state_dict, whose keys are those of eager QAT. What forward reads are the
        # Python bools beside them: a tensor flag would break a compiled graph at each weight.
        self._non_persistent_buffers_set |= {"fake_quant_enabled", "observer_enabled"}

    def enable_fake_quant(self, enabled: bool = True) -> None:
        super().enable_fake_quant(enabled)
        self.enabled = bool(enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        """Whether training moves the average of ``scale="paper"``."""
        super().enable_observer(enabled)
        self.observing = bool(enabled)

    def calculate_qparams(self):
        raise NotImplementedError("potqat: the scale depends on the weight; use scale(weight)")

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The fake-quantized weight, stored as ``weight`` is."""
        if self.transposed:
            return super().forward(weight.t(), self.observing).t()
        return super().forward(weight, self.observing)

    def convert(self, gm: GraphModule, node: Node) -> None:
        """Replace ``node``, the call of this module, and for packed ops its users too (torchao's hook).

        Raises:
            ValueError: a grid without a packed form, NaN or infinity in the weight, or a user that is none of
                aten.linear, aten.addmm and aten.embedding.
        """
        source = node.args[0]
        weight = gm.get_parameter(source.target).detach()
        try:
            codes, scale = self.pack(weight.t() if self.transposed else weight)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        shape = tuple(reversed(weight.shape)) if self.transposed else tuple(weight.shape)
        lower = self._to_packed if self.target == "packed" else self._to_int8
        lower(gm, node, codes, scale, shape, weight.dtype)
        gm.graph.erase_node(node)

    def _to_packed(self, gm, node, codes, scale, shape, dtype) -> None:
        with gm.graph.inserting_before(node):
            codes, scale = _buffer(gm, node, "packed", codes), _buffer(gm, node, "scale", scale)
        for user in list(node.users):
            with gm.graph.inserting_before(user):
                new = self._packed_call(gm.graph, user, codes, scale, shape, dtype)
            new.meta = {key: value for key, value in user.meta.items() if key != Q_ANNOTATION_KEY}
            user.replace_all_uses_with(new)
            gm.graph.erase_node(user)

    def _packed_call(self, graph, user: Node, codes: Node, scale: Node, shape, dtype) -> Node:
        cfg, (n, k) = self.cfg, shape
        if user.target is aten.embedding.default:
            arguments = (user.args[1], codes, scale, cfg.grid, n, k, cfg.group_size)
            rows = graph.call_function(torch.ops.potqat.embedding.default, arguments)
            return rows if dtype == torch.float32 else graph.call_function(aten.to.dtype, (rows, dtype))
        if user.target is aten.linear.default:
            x, _, bias = (*user.args, None)[:3]
        elif user.target is aten.addmm.default:
            bias, x, _ = user.args
        else:
            raise ValueError(f"{self.name}: {user.target} uses the fake-quantized weight and has no packed form")
        mode = ops.activation_mode(cfg)
        arguments = (x, codes, scale, bias, cfg.grid, n, cfg.group_size, mode, 1.0, 0)
        return graph.call_function(torch.ops.potqat.linear.default, arguments)

    def _to_int8(self, gm, node, codes, scale, shape, dtype) -> None:
        cfg, (_, k) = self.cfg, shape
        top = reference.levels(cfg.grid)[-1]
        levels = ops.unpack(codes, torch.ones_like(scale), cfg, shape).to(torch.int8)
        zeros = torch.zeros(scale.shape, dtype=torch.int32, device=scale.device).t().contiguous()
        with gm.graph.inserting_before(node):
            if cfg.groups(k) == 1:
                tensors = [("int8", levels), ("scale", scale[0]), ("zero_point", zeros[:, 0])]
                op, rest = torch.ops.quantized_decomposed.dequantize_per_channel.default, (0, -top, top, torch.int8)
                kwargs = {} if dtype == torch.float32 else {"out_dtype": dtype}
            else:  # the op wants whole groups: a short last one is padded, and cut off again
                levels = torch.nn.functional.pad(levels, (0, -k % cfg.group_size))
                tensors = [("int8", levels), ("scale", scale.t().contiguous()), ("zero_point", zeros)]
                op = torch.ops.quantized_decomposed.dequantize_per_channel_group.default
                rest, kwargs = (-top, top, torch.int8, cfg.group_size, dtype), {}
            new = gm.graph.call_function(op, (*(_buffer(gm, node, *t) for t in tensors), *rest), kwargs)
            if levels.shape[1] != k:
                new = gm.graph.call_function(aten.slice.Tensor, (new, 1, 0, k))
            if self.transposed:
                new = gm.graph.call_function(aten.t.default, (new,))
        node.replace_all_uses_with(new)


def _buffer(gm: GraphModule, node: Node, what: str, value: torch.Tensor) -> Node:
    """A buffer beside the float weight (``a.b.weight`` -> ``a.b.packed``), as in the packed modules, and its node."""
    path, _, leaf = node.args[0].target.rpartition(".")
    name = leaf.removesuffix("weight") + what if leaf.endswith("weight") else f"{leaf}_{what}"
    gm.get_submodule(path).register_buffer(name, value)
    return gm.graph.get_attr(f"{path}.{name}" if path else name)
