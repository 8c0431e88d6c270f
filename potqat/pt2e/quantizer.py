"""PoTQuantizer: finds the weights in an exported graph, resolves their configuration, annotates, and reports."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import FakeQuantizeBase
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from potqat.config import PoTConfig
from potqat.plan import check_patterns, resolve
from potqat.pt2e.fake_quant import PoTPerChannelFakeQuantize
from potqat.report import Entry, Report, sqnr_db

aten = torch.ops.aten
# Operator -> (kind, which argument is the weight).
OPERATORS = {
    aten.linear.default: ("linear", 1),
    aten.addmm.default: ("linear", 2),
    aten.embedding.default: ("embedding", 0),
}


@dataclass(frozen=True)
class Use:
    """One use of a Parameter as a weight: ``fqn`` is the Parameter's name in the module that uses it."""

    node: Node
    source: Node
    parameter: torch.nn.Parameter
    fqn: str

    @property
    def name(self) -> str:
        """Module path, as skip patterns and overrides know it."""
        return self.fqn.removesuffix(".weight")

    @property
    def kind(self) -> str:
        return OPERATORS[self.node.target][0]

    @property
    def transposed(self) -> bool:
        return self.node.target is aten.addmm.default

    @property
    def weight(self) -> torch.Tensor:
        """[N, K], as the packer sees it."""
        return self.parameter.t() if self.transposed else self.parameter


class PoTQuantizer(Quantizer):
    """torchao Quantizer for ``prepare_qat_pt2e``: power-of-two weights of linear, addmm (Conv1D) and embedding.

    Tied weights share one fake quantizer, which takes the embedding's configuration; activations are left alone
    (``cfg.activations`` decides what the packed op does with them). One quantizer may prepare several graphs of one
    model, for instance its training and its evaluation form: they share the fake quantizers.

    Args:
        cfg: what to quantize and how; module names are those of the model that was exported (``strict=True`` export
            forgets all names but one of a tied weight: there a head goes by its embedding's).

    Attributes:
        report: after ``prepare_qat_pt2e``, the Report on the latest graph.
        fake_quants: Parameter -> its fake quantizer.

    Raises:
        ValueError: (from ``prepare_qat_pt2e``) nothing to quantize, a pattern that matches nothing, a weight with
            NaN or infinity, or functorch nodes in the graph.
    """

    def __init__(self, cfg: PoTConfig):
        super().__init__()
        self.cfg = cfg
        self.report = Report()
        self.fake_quants: dict[torch.nn.Parameter, PoTPerChannelFakeQuantize] = {}

    def annotate(self, model: GraphModule) -> GraphModule:
        uses = find_uses(model)
        check_patterns(self.cfg, [use.name for use in uses])
        tables = {use.parameter: use for use in uses if use.kind == "embedding"}
        self.report = Report()
        counted: set[torch.nn.Parameter] = set()
        for use in uses:
            table = tables.get(use.parameter)
            cfg, reason = resolve(use.name, self.cfg, table and table.name)
            reason = reason or self._obstacle(use)
            try:
                if not reason:
                    self._annotate(use, cfg)
                self.report.entries.append(self._entry(use, reason, first=use.parameter not in counted))
            except ValueError as error:
                raise ValueError(f"{use.name}: {error}") from None
            counted.add(use.parameter)
        if not self.report.quantized:
            why = "; ".join(f"{e.name}: {e.reason}" for e in self.report.skipped[:4])
            raise ValueError(f"potqat: nothing to quantize in the exported graph ({why or 'it has no linear layer'})")
        for use, entry in zip(uses, self.report.entries, strict=True):
            if entry.action == "skipped" and use.parameter in self.fake_quants:
                note = f"{use.name} is tied to a quantized weight but was skipped: its float copy stays"
                self.report.notes.append(note)
        self.report.entries += _left_float(model, uses, counted)
        return model

    def _obstacle(self, use: Use) -> str:
        """Why this use cannot be quantized whatever the configuration says, or an empty string."""
        if use.node.kwargs or (use.transposed and use.node.args[0].meta["val"].dim() != 1):
            return f"{use.node.target} with scaled or two-dimensional addend"
        readers = [reader for user in use.source.users for reader in (user, *user.users)]
        if any(reader.target is aten.embedding_renorm_.default for reader in readers):
            return "max_norm rewrites the table at each lookup"
        made = self.fake_quants.get(use.parameter)
        if made is not None and made.transposed != use.transposed:
            return f"tied to {made.name}, which uses the weight transposed"
        return ""

    def _annotate(self, use: Use, cfg: PoTConfig) -> None:
        if use.parameter not in self.fake_quants:
            made = PoTPerChannelFakeQuantize(use.parameter, cfg, use.fqn, use.transposed)
            self.fake_quants[use.parameter] = made
        made = self.fake_quants[use.parameter]
        if use.fqn not in made.fqns:
            made.fqns.append(use.fqn)
        # Export keeps any one name of a tied weight; ours is that of its first use, in a language model the embedding.
        use.source.target = made.fqns[0]
        spec = QuantizationSpec(torch.int8, _Placeholder, qscheme=torch.per_channel_symmetric, ch_axis=0)
        use.node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
            {use.source: spec}, allow_implicit_sharing=False, _annotated=True
        )

    def _entry(self, use: Use, reason: str, first: bool) -> Entry:
        weight = use.weight.detach()
        size = weight.numel() * weight.element_size() if first else 0
        entry = {"name": use.name, "kind": use.kind, "shape": tuple(weight.shape), "bytes_before": size}
        if reason:
            return Entry(**entry, action="skipped", reason=reason, bytes_after=size)
        made = self.fake_quants[use.parameter]
        error = sqnr_db(weight, made.scale(weight), made.cfg)
        return Entry(
            **entry, action="quantized", reason="" if first else "tied: packed once", grid=made.cfg.grid,
            granularity=made.cfg.granularity, bytes_after=size, sqnr_db=error,
        )  # fmt: skip

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict) -> None:
        """Put each weight's own fake quantizer on its edges (torchao builds them from the spec alone)."""
        for edge, made in edge_or_node_to_obs_or_fq.items():
            if isinstance(made, _Placeholder):
                parameter = model.get_parameter(edge[0].target)
                edge_or_node_to_obs_or_fq[edge] = self.fake_quants[parameter]

    def validate(self, model: GraphModule) -> None:
        for node in model.graph.nodes:
            if "functorch" in (getattr(node.target, "__module__", None) or ""):
                raise ValueError(
                    "potqat.pt2e: the exported graph holds functorch nodes (vmap, mostly from building an attention "
                    "mask), which torchao cannot convert; give the model a ready boolean mask instead: "
                    "torch.ones(t, t, dtype=torch.bool).tril()[None, None].expand(b, 1, t, t)"
                )


class _Placeholder(FakeQuantizeBase):
    """What torchao makes from the annotation; prepare_obs_or_fq_callback replaces it."""

    def __init__(self, **spec):
        super().__init__()

    def calculate_qparams(self):
        raise NotImplementedError

    def forward(self, x):
        raise RuntimeError("potqat: PoTQuantizer.prepare_obs_or_fq_callback was not called by the prepare step")


def find_uses(model: GraphModule) -> list[Use]:
    """Every linear, addmm and embedding whose weight is a two-dimensional float Parameter, in graph order."""
    names: dict[torch.nn.Parameter, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(parameter, []).append(name)
    uses = []
    for node in model.graph.nodes:
        if node.op != "call_function" or node.target not in OPERATORS:
            continue
        source = node.args[OPERATORS[node.target][1]]
        parameter = parameters.get(source.target)
        if source.op == "get_attr" and parameter is not None and _is_matrix(parameter) and parameter.dim() == 2:
            # Export keeps one name of a tied weight for all uses; the calling module knows its own.
            caller = next(reversed(node.meta.get("nn_module_stack", {"": ("", "")}).values()))[0]
            own = [name for name in names[parameter] if name.rpartition(".")[0] == caller]
            uses.append(Use(node, source, parameter, own[0] if own else source.target))
    return uses


def _is_matrix(parameter: torch.Tensor) -> bool:
    return parameter.dim() >= 2 and parameter.is_floating_point()


def _left_float(model: GraphModule, uses: list[Use], counted: set[torch.nn.Parameter]) -> list[Entry]:
    """Entries of the float Parameters with two or more dimensions that other operators read, or none."""
    edges = {(use.source, use.node) for use in uses}
    readers: dict[torch.nn.Parameter, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for source in model.graph.find_nodes(op="get_attr"):
        others = [str(user.target) for user in source.users if (source, user) not in edges]
        if others and source.target in parameters:
            readers.setdefault(parameters[source.target], []).extend(others)
    entries = []
    for name, parameter in model.named_parameters():
        if not _is_matrix(parameter) or (parameter in counted and parameter not in readers):
            continue
        size = 0 if parameter in counted else parameter.numel() * parameter.element_size()
        reason = f"read by {', '.join(readers[parameter])}" if parameter in readers else "the forward does not use it"
        entries.append(
            Entry(name.removesuffix(".weight"), "parameter", tuple(parameter.shape), "skipped", reason,
                  bytes_before=size, bytes_after=size)
        )  # fmt: skip
    return entries
