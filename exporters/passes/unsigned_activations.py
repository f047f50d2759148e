"""Store activation codes as UINT8, 128 above the code, for runtimes whose integer matrix product
wants an unsigned first operand.

Needs: TimestepQuantize expanded; each site's codes read by DequantizeLinear with a zero-point of 0.
Guarantees: the same numbers; the codes keep their name.

1. A site that a layer reads, or a product as its first operand: UINT8, with a zero-point of 128
   wherever it is dequantized.
2. A site that is a product's second operand stays INT8 (but see AvoidSaturation).

onnxruntime on x86 fuses DequantizeLinear and MatMul into its integer kernel only for unsigned
activations. It converts signed ones by itself, but not where several layers read one site: those
ran in float.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor
from exporters.exactness import MIDDLE
from exporters.graph_info import graph_info


class UnsignedActivations(ir.passes.InPlacePass):
    """See the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        info = graph_info(model)
        second = {product.sites[1] for product in info.products.values()}
        values = ir.convenience.create_value_mapping(model.graph)
        editor = Editor(model.graph)
        chosen = [
            values[site.codes]
            for site in info.sites.values()
            if site.integer
            and site.name not in second
            and values[site.codes].dtype is ir.DataType.INT8
        ]
        for codes in chosen:
            raise_codes(editor, codes)
        return ir.passes.PassResult(model, modified=bool(chosen))


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
