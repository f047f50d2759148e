"""What precision each multiplication was asked for and what it really runs in, and how large the
files are.

Multiply-adds are those of one sample of the exported size: the quantized layers', the quantized
attention products', and those of the products that the scheme leaves in float, so that the shares
are of the whole model's.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from exporters.exactness import SATURATING_KEY
from exporters.graph_info import graph_info, load_graph
from exporters.multiplications import multiplications
from exporters.ops.timestep_quantize import TABLES
from exporters.passes.insert_quantized_layers import product_name
from quest_deploy.artifacts.checkpoint import DOWN, RESIDUAL, UP
from quest_deploy.backends.base import LOWERED, file_bytes, input_shapes
from quest_deploy.errors import InputError
from quest_deploy.quantization.layer_kinds import PRODUCTS, group_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from exporters.graph_info import AttentionMatmulInfo, GraphInfo, LayerInfo
    from exporters.multiplications import Multiplication
    from quest_deploy.backends.base import Backend
    from quest_deploy.backends.options import EngineOptions

INTEGER, FLOAT, UNKNOWN = "int8", "float", "unknown"
FLOAT_BITS = 32
SATURATES = "signed 8-bit ones may saturate on this processor (docs/processors.md)"
_NAMED = 5
"""How many layers a warning names."""


@dataclass(frozen=True)
class LayerPrecision:
    """One multiplication.

    Attributes:
        nodes: the names of the nodes that make it. operator: Conv or MatMul, as the inspected graph
            has it.
        weight_bits: None for a product of two activations. activation_bits: of the wider one; 32
            where it stays in float.
        asked: "int8" or "float": what the checkpoint wants it to run in.
        runs_in: "int8", "fp32", "fp16" or "bf16"; "unknown" where the runtime does not tell; None
            for a graph, which nothing runs.
        reason: why it does not run in what was asked for, where known.
        saturating: whether signed 8-bit operands may saturate in it on this processor, so that it
            has another form.
    """

    name: str
    nodes: tuple[str, ...]
    group: str
    operator: str
    weight_bits: int | None
    activation_bits: int
    macs: int
    asked: str
    runs_in: str | None = None
    reason: str = ""
    saturating: bool = False

    @property
    def bits(self) -> str:
        """The bits asked for, such as w4a4, a8 or float."""
        activation = f"a{self.activation_bits}" if self.activation_bits < FLOAT_BITS else "float"
        return activation if self.weight_bits is None else f"w{self.weight_bits}{activation}"

    @property
    def fell_back(self) -> bool:
        """Whether it was asked to run on integers and is known to run in float."""
        return self.asked == INTEGER and self.runs_in not in (INTEGER, UNKNOWN, None)


@dataclass(frozen=True)
class Sizes:
    """In bytes.

    Attributes:
        graph: the ONNX file with its weights. engine: see
            :func:`quest_deploy.backends.base.file_bytes`; None for a graph.
        fp16: every parameter of the float model, which has no branches, in two bytes.
        ideal: the layers' weights at the bits asked for (half a byte at 4 bits, one at 8), every
            other parameter in two bytes, and no scales.
    """

    graph: int
    engine: int | None
    fp16: int
    ideal: int


@dataclass(frozen=True)
class PrecisionReport:
    """All of it; ``unavailable`` says why a built engine cannot tell what it runs in, and is empty
    where it can.
    """

    layers: list[LayerPrecision]
    sizes: Sizes
    unavailable: str = ""

    @property
    def asked_share(self) -> float:
        """The share of multiply-adds, in [0, 1], that were asked to run on integers."""
        return self._share(lambda layer: layer.asked == INTEGER)

    @property
    def shares(self) -> dict[str, float]:
        """The share of multiply-adds, in [0, 1], by what they run in, the largest first; empty for
        a graph.
        """
        kinds = Counter[str]()
        for layer in self.layers:
            if layer.runs_in is not None:
                kinds[layer.runs_in] += layer.macs
        total = sum(kinds.values())
        return {kind: macs / total for kind, macs in kinds.most_common()} if total else {}

    @property
    def fell_back(self) -> list[LayerPrecision]:
        """The layers that were asked to run on integers and run in float."""
        return [layer for layer in self.layers if layer.fell_back]

    @property
    def warnings(self) -> list[str]:
        """One for each reason of falling back, one for layers that the runtime says nothing about,
        one for products of unknown size.
        """
        found = []
        for reason, kind in dict.fromkeys(
            (layer.reason, layer.runs_in) for layer in self.fell_back
        ):
            layers = [
                layer for layer in self.fell_back if (layer.reason, layer.runs_in) == (reason, kind)
            ]
            found.append(
                f"{self._count(layers)} asked to run on integers, run in {kind}: "
                + (f"{reason} ({_names(layers)})" if reason else _names(layers))
            )
        unsigned = [layer for layer in self.layers if layer.saturating and not layer.fell_back]
        if unsigned:
            found.append(
                f"{self._count(unsigned)} multiply by unsigned weights: {SATURATES} "
                f"({_names(unsigned)})"
            )
        unknown = [
            layer for layer in self.layers if layer.runs_in == UNKNOWN and layer.asked == INTEGER
        ]
        if unknown and not self.unavailable:
            found.append(
                f"{self._count(unknown)} are missing from the runtime's report: {_names(unknown)}"
            )
        uncounted = [layer for layer in self.layers if not layer.macs]
        if uncounted:
            found.append(
                f"{len(uncounted)} products count as none, as the graph does not give their size: "
                f"{_names(uncounted)}"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON value."""
        layers = [
            {**asdict(layer), "bits": layer.bits, "fell_back": layer.fell_back}
            for layer in self.layers
        ]
        return {**self.summary(), "layers": layers}

    def summary(self) -> dict[str, Any]:
        """The report without its layers, but for those that fell back, as a JSON value."""
        return {
            "asked_int8_share": self.asked_share,
            "shares": self.shares,
            "int8_share": self.shares.get(INTEGER)
            if self.shares and not self.unavailable
            else None,
            "fell_back": [layer.name for layer in self.fell_back],
            "warnings": self.warnings,
            "unavailable": self.unavailable,
            "sizes": asdict(self.sizes),
        }

    def _share(self, chosen: Callable[[LayerPrecision], bool]) -> float:
        total = sum(layer.macs for layer in self.layers)
        return sum(layer.macs for layer in self.layers if chosen(layer)) / total if total else 0.0

    def _count(self, layers: list[LayerPrecision]) -> str:
        share = self._share(lambda layer: layer in layers)
        return (
            f"{len(layers)} of {len(self.layers)} layers and products, {share:.1%} of the "
            "multiply-adds,"
        )


def _names(layers: list[LayerPrecision]) -> str:
    rest = len(layers) - _NAMED
    return ", ".join(layer.name for layer in layers[:_NAMED]) + (
        f" and {rest} more" if rest > 0 else ""
    )


def graph_precision(path: Path) -> PrecisionReport:
    """Return what a graph asks for."""
    return PrecisionReport(*_asked(path))


def engine_precision(backend: Backend, folder: Path, options: EngineOptions) -> PrecisionReport:
    """Return what an engine's graph asks for and what the engine runs in; loads the engine, and for
    onnxruntime runs it once.
    """
    asked, sizes = _asked(folder / LOWERED)
    sizes = replace(sizes, engine=file_bytes(folder, options))
    try:
        backend.check_run(options)
        found = backend.realised_precision(folder, options)
    except InputError as e:
        return PrecisionReport([replace(layer, runs_in=UNKNOWN) for layer in asked], sizes, str(e))
    layers = [replace(layer, runs_in=_realised(layer, found)) for layer in asked]
    return PrecisionReport(
        [replace(x, reason=_reason(backend, x)) if x.fell_back else x for x in layers], sizes
    )


def _reason(backend: Backend, layer: LayerPrecision) -> str:
    return SATURATES if layer.saturating else backend.float_reason(layer.operator)


def _asked(path: Path) -> tuple[list[LayerPrecision], Sizes]:
    model = load_graph(path)
    info = graph_info(model)
    layers = {product_name(layer.name): layer for layer in info.layers.values()}
    products = {product_name(product.name): product for product in info.matmuls.values()}
    parts: dict[str, list[Multiplication]] = {}
    for node in multiplications(model, input_shapes(model, 1)):
        # A lowering may have made several nodes of one (see exporters.passes.split_gates).
        whole = node.node.rpartition(".")[0]
        parts.setdefault(whole if whole in layers or whole in products else node.node, []).append(
            node
        )
    found = []
    for name, nodes in (
        parts | {name: [] for name in (*layers, *products) if name not in parts}
    ).items():
        if name in layers:
            found.append(_layer(info, layers[name], nodes))
        elif name in products:
            found.append(_product(info, products[name], nodes))
        else:
            macs, branch_of = sum(node.macs or 0 for node in nodes), _branch_of(info, name)
            group = PRODUCTS if branch_of is None else group_of(branch_of)
            found.append(
                LayerPrecision(
                    name, (name,), group, nodes[0].operator, None, FLOAT_BITS, macs, FLOAT
                )
            )
    changed = json.loads(model.metadata_props.get(SATURATING_KEY, "{}"))
    found = [
        replace(layer, saturating=not changed.keys().isdisjoint(layer.nodes)) for layer in found
    ]
    return found, _sizes(
        model,
        info,
        {name: sum(node.weights for node in parts.get(name, [])) for name in layers},
        path,
    )


def _branch_of(info: GraphInfo, node: str) -> str | None:
    """The layer beside which ``node`` is one of the two products of a branch of low rank."""
    layer, _, part = node.rpartition(".")
    return layer if part in (DOWN, UP) and f"{layer}.{RESIDUAL}" in info.layers else None


def _layer(info: GraphInfo, layer: LayerInfo, nodes: list[Multiplication]) -> LayerPrecision:
    quantizer = info.quantizers[layer.site]
    asked = INTEGER if quantizer.integer else FLOAT
    bits = (layer.weight_bits, quantizer.bits)
    return LayerPrecision(
        layer.name,
        _node_names(nodes),
        group_of(layer.name),
        _operator(nodes),
        *bits,
        layer.macs,
        asked,
    )


def _product(
    info: GraphInfo, product: AttentionMatmulInfo, nodes: list[Multiplication]
) -> LayerPrecision:
    quantizers = [None if name is None else info.quantizers[name] for name in product.sites]
    asked = (
        INTEGER
        if all(quantizer is not None and quantizer.integer for quantizer in quantizers)
        else FLOAT
    )
    bits = max(FLOAT_BITS if quantizer is None else quantizer.bits for quantizer in quantizers)
    return LayerPrecision(
        product.name,
        _node_names(nodes),
        group_of(product.name),
        _operator(nodes),
        None,
        bits,
        product.macs,
        asked,
    )


def _node_names(nodes: list[Multiplication]) -> tuple[str, ...]:
    return tuple(node.node for node in nodes)


def _operator(nodes: list[Multiplication]) -> str:
    return nodes[0].operator if nodes else ""


def _realised(layer: LayerPrecision, found: dict[str, str]) -> str:
    """Return what a layer runs in: if its parts differ, what is known least of, or else what is not
    integer.
    """
    kinds = {found.get(node, UNKNOWN) for node in layer.nodes} or {UNKNOWN}
    return (
        UNKNOWN
        if UNKNOWN in kinds
        else next((kind for kind in sorted(kinds) if kind != INTEGER), INTEGER)
    )


def _sizes(model: ir.Model, info: GraphInfo, weights: dict[str, int], path: Path) -> Sizes:
    bits = {product_name(layer.name): layer.weight_bits for layer in info.layers.values()}
    sizes = {
        value.name or "": value.const_value.size
        for value in _float_parameters(model, info)
        if value.const_value is not None
    }
    others = sum(sizes.values())
    branches = sum(
        size for name, size in sizes.items() if _branch_of(info, name.rpartition(".")[0])
    )
    graph = path.stat().st_size + (
        data.stat().st_size if (data := path.with_name(f"{path.name}.data")).exists() else 0
    )
    ideal = sum(count * bits[node] for node, count in weights.items()) // 8
    fp16 = 2 * (sum(weights.values()) + others - branches)
    return Sizes(graph, None, fp16, ideal + 2 * others)


def _float_parameters(model: ir.Model, info: GraphInfo) -> Iterable[ir.Value]:
    """The float initializers that are no scales, bounds or tables of the quantizers, and no
    scalars.
    """
    of_quantizers = tuple(
        f"{quantizer}.{table}"
        for quantizer in info.quantizers
        for table in (*TABLES, "channel", "zero_point")
    )
    of_weights = tuple(f"{layer.weight}_scale" for layer in info.layers.values())
    for value in model.graph.initializers.values():
        name = value.name or ""
        reads = {(node.op_type, index) for node, index in value.uses()}
        is_float = value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        if (
            not is_float
            or not value.shape
            or name.startswith((*of_quantizers, *of_weights, "tables_of_rank"))
        ):
            continue
        if not any(
            op_type in ("QuantizeLinear", "DequantizeLinear") and index for op_type, index in reads
        ):
            yield value
