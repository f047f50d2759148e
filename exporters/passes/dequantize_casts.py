"""Write as DequantizeLinear what the portable graph writes as Cast.

The portable graph must be right in any session, so it hides from runtimes what some of them would
turn into integers unasked (``insert_quantized_layers``, cases 8 and 9). A lowering knows its
runtime, and begins with this.

Needs: the portable graph, with its metadata.
Guarantees: every layer's weight, and every quantized operand of a product, comes from a
DequantizeLinear.

1. A weight whose codes are cast to float, less their zero-points, and whose scale is multiplied
   behind the product.
2. Codes of an activation that are cast to float: DequantizeLinear with scale 1 and zero-point 0,
   under the same name.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of, replace_value
from exporters.exactness import FOUR_BITS
from exporters.graph_info import LayerInfo, graph_info
from exporters.passes.contract import guarantee
from exporters.passes.insert_quantized_layers import (
    dequantized_codes,
    need_layers,
    product_name,
    stored,
)

EIGHT_BITS = 8
_SIGNED = (ir.DataType.INT4, ir.DataType.INT8)
_PACKED = (ir.DataType.INT4, ir.DataType.UINT4)


class DequantizeCasts(ir.passes.InPlacePass):
    def requires(self, model: ir.Model) -> None:
        need_layers(model)

    def ensures(self, model: ir.Model) -> None:
        nodes = {node.name: node for node in model.graph}
        for name in graph_info(model).layers:
            weight = nodes[product_name(name)].inputs[1]
            producer = None if weight is None else weight.producer()
            dequantized = producer is not None and producer.op_type == "DequantizeLinear"
            guarantee(dequantized, f"{name}: its weight is not dequantized")
        guarantee(not _casts(model), "codes are still cast")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        info, editor = graph_info(model), Editor(model.graph)
        nodes = {node.name: node for node in model.graph}
        chains = {name: _cast_chain(nodes[product_name(name)]) for name in info.layers}
        for name, chain in chains.items():
            if chain:
                _dequantize_weight(editor, nodes[product_name(name)], info.layers[name], chain)
        casts = _casts(model)
        for cast in casts:
            _dequantize_codes(editor, cast)
        return ir.passes.PassResult(model, modified=bool(casts) or any(chains.values()))


def _casts(model: ir.Model) -> list[ir.Node]:
    """The casts of quantizers' codes to float."""
    values = ir.convenience.create_value_mapping(model.graph)
    return [
        node
        for quantizer in graph_info(model).quantizers.values()
        if quantizer.integer
        for node in values[quantizer.codes].consumers()
        if node.op_type == "Cast"
    ]


def _cast_chain(product: ir.Node) -> list[ir.Node]:
    """The nodes between a product and its weight's codes, where those are cast to float: Cast, or
    Sub and Cast; else none.
    """
    chain: list[ir.Node] = []
    value = product.inputs[1]
    while (
        value is not None
        and (node := value.producer()) is not None
        and node.op_type in ("Sub", "Cast")
    ):
        chain.append(node)
        value = node.inputs[0]
    return chain


def _dequantize_weight(
    editor: Editor, product: ir.Node, layer: LayerInfo, chain: list[ir.Node]
) -> None:
    name, codes = layer.weight, chain[-1].inputs[0]
    assert codes is not None
    ((weighted, _),) = product.outputs[0].uses()
    scale = weighted.inputs[1]
    assert scale is not None
    scales = array_of(scale).reshape(-1)
    zeros = (
        array_of(chain[0].inputs[1]).reshape(-1)
        if chain[0].inputs[1:] and chain[0].inputs[1] is not None
        else np.zeros(len(scales))
    )
    bits = FOUR_BITS if codes.dtype in _PACKED else EIGHT_BITS
    zero = stored(
        bits, zeros.astype(np.int8 if codes.dtype in _SIGNED else np.uint8), f"{name}_zero"
    )
    editor.graph.initializers.pop(str(scale.name))
    operands = [
        codes,
        editor.constant(f"{name}_scale", scales),
        editor.constant(f"{name}_zero", zero),
    ]
    axis = 0 if product.op_type == "Conv" else 1
    weight = editor.op(
        "DequantizeLinear",
        operands,
        f"{name}_dequantized",
        dtype=ir.DataType.FLOAT,
        shape=codes.shape,
        axis=axis,
    )
    editor.insert_before(product)
    product.replace_input_with(1, weight)
    if weighted.outputs[0].name == layer.output:  # of a layer without bias
        weighted.outputs[0].name, product.outputs[0].name = f"{layer.output}_weighted", layer.output
    replace_value(weighted.outputs[0], product.outputs[0])
    for node in (weighted, *chain):
        editor.graph.remove(node, safe=True)


def _dequantize_codes(editor: Editor, cast: ir.Node) -> None:
    codes, old = cast.inputs[0], cast.outputs[0]
    assert codes is not None
    name, old.name = old.name, f"{old.name}_cast"
    value = dequantized_codes(editor, codes, str(name))
    editor.insert_before(cast)
    replace_value(old, value)
    editor.graph.remove(cast, safe=True)
