"""Store activation codes as UINT8, 128 above the code, for runtimes whose integer matrix product
wants an unsigned first operand.

Needs: TimestepQuantize expanded; each quantizer's codes read by DequantizeLinear with a zero-point
    of 0.
Guarantees: the same numbers; the codes keep their name.

1. A quantizer that a layer reads, or a product as its first operand: UINT8, with a zero-point of
   128 wherever it is dequantized.
2. A quantizer that is a product's second operand stays INT8 (but see AvoidSaturation).

onnxruntime on x86 fuses DequantizeLinear and MatMul into its integer kernel only for unsigned
activations. It converts signed ones by itself, but not where several layers read one quantizer:
those ran in float.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor
from exporters.exactness import MIDDLE
from exporters.graph_info import graph_info
from exporters.passes.contract import guarantee, need_expanded


class UnsignedActivations(ir.passes.InPlacePass):
    def requires(self, model: ir.Model) -> None:
        need_expanded(model)

    def ensures(self, model: ir.Model) -> None:
        left = [str(codes.name) for codes in _signed(model)]
        guarantee(not left, f"{', '.join(left[:3])} are still signed")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        editor, signed = Editor(model.graph), _signed(model)
        for codes in signed:
            raise_codes(editor, codes)
        return ir.passes.PassResult(model, modified=bool(signed))


def _signed(model: ir.Model) -> list[ir.Value]:
    """The codes of case 1 that are INT8."""
    info, values = graph_info(model), ir.convenience.create_value_mapping(model.graph)
    second = {product.sites[1] for product in info.matmuls.values()}
    return [
        values[quantizer.codes]
        for quantizer in info.quantizers.values()
        if quantizer.integer
        and quantizer.name not in second
        and values[quantizer.codes].dtype is ir.DataType.INT8
    ]


def raise_codes(editor: Editor, codes: ir.Value) -> None:
    """Store an activation's INT8 codes as UINT8, 128 above."""
    zero = editor.constant("middle_code", np.asarray(MIDDLE, np.uint8))
    quantize = codes.producer()
    readers = [node for node, _ in codes.uses()]
    if (
        quantize is None
        or quantize.op_type != "QuantizeLinear"
        or any(node.op_type != "DequantizeLinear" for node in readers)
    ):
        raise ir.passes.PreconditionError(
            f"{codes.name}: expected codes between QuantizeLinear and DequantizeLinear"
        )
    for node in (quantize, *readers):
        node.replace_input_with(2, zero)
    codes.type = ir.TensorType(ir.DataType.UINT8)
