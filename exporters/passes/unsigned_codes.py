"""Store codes 0..255 as UINT8, for runtimes that multiply unsigned by signed integers.

Such codes (an 8-bit softmax) reach the portable graph less 128, so that they fit INT8 with a
zero-point of 0, and every reader takes away again what the offset adds: a sum over the other
operand, subtracted from the product. As UINT8 they need neither.

Needs: expanded quantizers; corrections as ``insert_quantized_layers`` builds them, from a table
that is gathered by ``bucket``. Guarantees: UINT8 codes that are the INT8 ones plus 128, under the
same name; the same numbers but for rounding.

1. A quantizer whose lowest code is 0 and whose offset is -128 in every bucket: nothing is added to
   its codes, and nothing computed from its offset is subtracted from, or added to, a product.
2. Any other quantizer stays as it is.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from exporters.editor import Editor, array_of, replace_value
from exporters.graph_info import BUCKET, graph_info
from exporters.passes.contract import guarantee, guarantee_codes, need_bucket

OFFSET = -128


class UnsignedCodes(ir.passes.InPlacePass):
    """See the module's docstring; run after ExpandTimestepQuantize, before FreezeBucket."""

    def requires(self, model: ir.Model) -> None:
        need_bucket(model)

    def ensures(self, model: ir.Model) -> None:
        guarantee_codes(model)
        values = ir.convenience.create_value_mapping(model.graph)
        for quantizer in graph_info(model).quantizers.values():
            quantize = values[quantizer.codes].producer() if quantizer.integer else None
            left = quantize is not None and _unsigned(quantize) is not None
            guarantee(not left, f"{quantizer.name}: its codes are still stored less 128")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        editor, values = Editor(model.graph), ir.convenience.create_value_mapping(model.graph)
        offsets = {
            t.name: g
            for g in values[BUCKET].consumers()
            if g.op_type == "Gather" and (t := g.inputs[0]) is not None
        }
        modified = False
        for quantizer in graph_info(model).quantizers.values():
            quantize = values[quantizer.codes].producer() if quantizer.integer else None
            add = None if quantize is None else _unsigned(quantize)
            if quantize is not None and add is not None:
                _store_unsigned(editor, quantize, add)
                if f"{quantizer.name}.offset" in offsets:
                    _drop_corrections(model.graph, offsets[f"{quantizer.name}.offset"])
                modified = True
        common.RemoveUnusedNodesPass()(model)  # of the offsets
        return ir.passes.PassResult(model, modified=modified)


def _unsigned(quantize: ir.Node) -> ir.Node | None:
    """The Add of the offset in front of ``quantize`` where the codes are 0..255 less 128 in every
    bucket, else None.
    """
    add = _producer(quantize.inputs[0])
    clipped = _producer(add.inputs[0]) if add is not None and add.op_type == "Add" else None
    raised = (
        _producer(clipped.inputs[0]) if clipped is not None and clipped.op_type == "Min" else None
    )
    if add is None or raised is None or raised.op_type != "Max":
        return None
    bounds = (raised.inputs[1], add.inputs[1])
    constants = [
        array_of(value).item() for value in bounds if value is not None and value.is_initializer()
    ]
    return add if constants == [0, OFFSET] else None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _store_unsigned(editor: Editor, quantize: ir.Node, add: ir.Node) -> None:
    zero, codes = (
        editor.constant("zero_code_unsigned", np.asarray(0, np.uint8)),
        quantize.outputs[0],
    )
    quantize.replace_input_with(0, add.inputs[0])
    quantize.replace_input_with(2, zero)
    codes.type = ir.TensorType(ir.DataType.UINT8)
    for dequantize in codes.consumers():
        dequantize.replace_input_with(2, zero)
    editor.graph.remove(add, safe=True)


def _drop_corrections(graph: ir.Graph, offset: ir.Node) -> None:
    """Take out what is computed from a quantizer's offset: its products with sums, subtracted; with
    another offset, added.
    """
    pending = [offset.outputs[0]]
    while pending:
        for reader, index in list(pending.pop().uses()):
            kept = reader.inputs[0]
            if reader.op_type in ("Sub", "Add") and index == 1 and kept is not None:
                replace_value(reader.outputs[0], kept)
                graph.remove(reader, safe=True)
            else:
                pending.append(reader.outputs[0])
