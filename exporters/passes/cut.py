"""Cut a part out of a graph into a model of its own, to be built and run alone.

Marking an inner value as an output would change what a backend fuses around it; a cut leaves the
graph as it is. What is FP16 or bf16 at its edge is FP32 outside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from exporters.editor import Editor
from exporters.graph_info import BUCKET
from exporters.passes.to_dtype import LOW_PRECISION_TYPES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from exporters.graph_info import GraphInfo


def cut_codes(model: ir.Model, info: GraphInfo, *quantizers: str) -> ir.Model:
    """Quantizers alone: (x of each, bucket) -> int8 codes of each."""
    entries = [info.quantizers[quantizer] for quantizer in quantizers]
    return _cut(model, [*(x.input for x in entries), BUCKET], [x.codes for x in entries])


def cut_layer(model: ir.Model, info: GraphInfo, *layers: str) -> ir.Model:
    """Layers with their quantizers: (x of each, bucket) -> y of each, the float output after scale
    and bias.
    """
    entries = [info.layers[layer] for layer in layers]
    inputs = [info.quantizers[entry.site].input for entry in entries]
    return _cut(model, [*inputs, BUCKET], [entry.output for entry in entries])


def cut_matmul(model: ir.Model, info: GraphInfo, *products: str) -> ir.Model:
    """Products with their operands' quantizers: (a and b of each, bucket) -> y of each, the float
    output.
    """
    entries = [info.matmuls[product] for product in products]
    inputs = [x for entry in entries for x in entry.inputs]
    return _cut(model, [*inputs, BUCKET], [entry.output for entry in entries])


def segment_starts(model: ir.Model, info: GraphInfo) -> list[str]:
    """The values that segments begin at: the model's inputs, and what layers and products give."""
    return [
        *(str(value.name) for value in model.graph.inputs),
        *(entry.output for entry in (info.layers | info.matmuls).values()),
    ]


def upstream(model: ir.Model, info: GraphInfo, wanted: Iterable[str]) -> dict[str, set[str]]:
    """For each of ``wanted``, the values that its segment reads, of those that segments begin at;
    itself, if it is one of them.
    """
    starts = set(segment_starts(model, info))
    values = {
        str(x.name): x
        for node in model.graph
        for x in (*node.inputs, *node.outputs)
        if x is not None
    }
    found: dict[str, set[str]] = {}
    for name in wanted:
        found[name] = set()
        left, seen = [values[name]], set()
        while left:
            value = left.pop()
            if value in seen:
                continue
            seen.add(value)
            producer = value.producer()
            if value.name in starts:
                found[name].add(str(value.name))
            elif producer is not None:
                left += [x for x in producer.inputs if x is not None]
    return found


def cut_segments(model: ir.Model, info: GraphInfo, wanted: Iterable[str] | None = None) -> ir.Model:
    """Return what layers and products leave: (the model's inputs, their outputs) -> quantizers'
    inputs, products' operands, the model's outputs.

    A value that is both, as a quantizer that reads the model's input itself, is left out: nothing
    is computed between.

    Args:
        wanted: those of the values where segments end; all if None.
    """
    given = segment_starts(model, info)
    if wanted is None:
        wanted = [quantizer.input for quantizer in info.quantizers.values()]
        wanted += [name for product in info.matmuls.values() for name in product.inputs]
        wanted += [str(value.name) for value in model.graph.outputs]
    cut = _cut(model, given, [name for name in dict.fromkeys(wanted) if name not in given])
    for value in list(cut.graph.inputs):
        if not value.uses():
            cut.graph.inputs.remove(value)
    return cut


def cut_bucket(model: ir.Model) -> ir.Model:
    """The choice of the bucket alone: timestep -> bucket."""
    return _cut(model, ["timestep"], [BUCKET])


def _cut(model: ir.Model, inputs: list[str], outputs: list[str]) -> ir.Model:
    graph = ir.convenience.extract(model.graph, [*dict.fromkeys(inputs)], outputs)
    graph.opset_imports.update(model.graph.opset_imports)
    cut = ir.Model(graph, ir_version=model.ir_version)
    for identifier, function in model.functions.items():
        cut.functions[identifier] = function
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(["batch", *list(value.shape)[1:]])
    _make_edges_float(graph)
    return cut


def _make_edges_float(graph: ir.Graph) -> None:
    editor, halves = Editor(graph), tuple(LOW_PRECISION_TYPES.values())
    for i, inner in enumerate(graph.inputs):
        if inner.dtype in halves:
            outer = ir.Value(
                name=inner.name, type=ir.TensorType(ir.DataType.FLOAT), shape=inner.shape
            )
            cast = editor.op(
                "Cast",
                [outer],
                f"{inner.name}_inside",
                dtype=inner.dtype,
                shape=inner.shape,
                to=inner.dtype.value,
            )
            graph.insert_before(graph[0], editor.take())
            ir.convenience.replace_all_uses_with(inner, cast)
            graph.inputs[i] = outer
    for i, inner in enumerate(graph.outputs):
        if inner.dtype in halves:
            name, inner.name = inner.name, f"{inner.name}_inside"
            outer = editor.op(
                "Cast",
                [inner],
                str(name),
                dtype=ir.DataType.FLOAT,
                shape=inner.shape,
                to=ir.DataType.FLOAT.value,
            )
            graph.insert_after(graph[-1], editor.take())
            graph.outputs[i] = outer
