"""Let a linear layer whose output is split in two (GEGLU) compute the two halves by products of
their own.

A runtime that scales, splits, gates and quantizes in three passes over memory then does it in one:
each half goes from its product straight to the elementwise work that follows.

Needs: linear layers as ``insert_quantized_layers`` builds them, weights [I, O] as initializers read
by DequantizeLinear along axis 1. Guarantees: the layer's output keeps its name and its numbers: it
is the concatenation of the halves, each (MatMul * scale) + bias on its own columns of the weight.

1. MatMul -> Mul by the scale -> Add of the bias -> Split into two along the last axis: each step
   doubled, then Concat, then Split.
2. An output that is read by anything else, or split otherwise, stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of, replace_value
from exporters.graph_info import graph_info
from exporters.passes.contract import guarantee, need
from quest_deploy.artifacts.checkpoint import pack_4bit

if TYPE_CHECKING:
    from numpy.typing import NDArray

HALVES = ("first", "second")


class SplitGates(ir.passes.InPlacePass):
    """See the module's docstring; run before WidenInt4."""

    def requires(self, model: ir.Model) -> None:
        for chain in _chains(model):
            weight = chain[0].inputs[1]
            dequantize = None if weight is None else weight.producer()
            codes = None if dequantize is None else dequantize.inputs[0]
            constant = codes is not None and codes.is_initializer()
            need(constant, f"{chain[0].name}: split gates before weights are widened")

    def ensures(self, model: ir.Model) -> None:
        names = {value.name for node in model.graph for value in node.outputs}
        lost = [x.name for x in graph_info(model).layers.values() if x.output not in names]
        guarantee(not lost, f"the outputs of {', '.join(lost[:3])} are gone")
        guarantee(not _chains(model), "gates are still computed by one product")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        chains = _chains(model)
        editor = Editor(model.graph)
        for chain in chains:
            _split(editor, chain)
        return ir.passes.PassResult(model, modified=bool(chains))


def _chains(model: ir.Model) -> list[list[ir.Node]]:
    values = ir.convenience.create_value_mapping(model.graph)
    return [
        chain
        for layer in graph_info(model).layers.values()
        if (chain := _gated(values.get(layer.output))) is not None
    ]


def _gated(output: ir.Value | None) -> list[ir.Node] | None:
    """MatMul, Mul and Add of a layer whose ``output`` is only read by a Split in two; None for any
    other.
    """
    if output is None or [use.node.op_type for use in output.uses()] != ["Split"]:
        return None
    split = next(iter(output.uses())).node
    axis = split.attributes["axis"].as_int() if "axis" in split.attributes else 0
    rank = len(output.shape or [])
    if len(split.outputs) != 2 or axis % max(rank, 1) != rank - 1 or not _in_halves(split):
        return None
    nodes: list[ir.Node] = []
    value: ir.Value | None = output
    for op_type in ("Add", "Mul", "MatMul"):
        node = value.producer() if value is not None else None
        if node is None or node.op_type != op_type or len(node.outputs[0].uses()) != 1:
            return None
        nodes.insert(0, node)
        value = node.inputs[0]
    weight = nodes[0].inputs[1]
    dequantize = None if weight is None else weight.producer()
    return nodes if dequantize is not None and dequantize.op_type == "DequantizeLinear" else None


def _in_halves(split: ir.Node) -> bool:
    sizes = split.inputs[1] if len(split.inputs) > 1 else None
    return sizes is None or (sizes.is_initializer() and len(set(array_of(sizes).tolist())) == 1)


def _split(editor: Editor, chain: list[ir.Node]) -> None:
    product, scaled, biased = chain
    x, dequantized = product.inputs
    output = biased.outputs[0]
    assert dequantized is not None
    dequantize = dequantized.producer()
    assert dequantize is not None
    halves = []
    for i, half in enumerate(HALVES):
        weight = editor.op(
            "DequantizeLinear",
            [_half(editor, value, i, half) for value in dequantize.inputs],
            f"{dequantized.name}.{half}",
            dtype=ir.DataType.FLOAT,
            axis=1,
        )
        y = editor.op("MatMul", [x, weight], f"{product.name}.{half}")
        y = editor.op("Mul", [y, scaled.inputs[1]], f"{scaled.name}.{half}")
        halves.append(
            editor.op("Add", [y, _half(editor, biased.inputs[1], i, half)], f"{biased.name}.{half}")
        )
    joined = editor.op("Concat", halves, f"{biased.name}.joined", shape=output.shape, axis=-1)
    editor.insert_before(product)
    name, whole = output.name, (*dequantize.inputs, biased.inputs[1])
    replace_value(output, joined)
    for node in (biased, scaled, product, dequantize):
        editor.graph.remove(node, safe=True)
    joined.name = name
    for value in whole:
        if value is not None and value.name is not None and not value.uses():
            editor.graph.initializers.pop(value.name, None)


def _half(editor: Editor, value: ir.Value | None, i: int, half: str) -> ir.Value:
    assert value is not None
    array: NDArray[Any] = np.split(array_of(value), 2, axis=-1)[i]
    name = f"{value.name}.{half}"
    if value.dtype not in (ir.DataType.INT4, ir.DataType.UINT4):
        return editor.constant(name, array)
    packed = pack_4bit(
        array.astype(np.int8) if value.dtype is ir.DataType.INT4 else array.astype(np.uint8)
    )
    return editor.constant(name, ir.PackedTensor(packed, value.dtype, shape=array.shape, name=name))
