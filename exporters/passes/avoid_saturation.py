"""Give an integer product whose kernel may saturate a form that the runtime computes exactly.

What a kernel computes exactly on a processor is the runtime's answer (``exporters.exactness``).

Needs: expanded quantizers; weights around zero (CenterWeights), not yet widened (WidenInt4); the
graph's metadata. Guarantees: the same numbers; the runtime computes every product of two
dequantized operands exactly. The metadata names those changed.

1. A product that is exact as it is: stays.
2. A weight: its codes plus 128 as UINT8, its zero-points plus 128. onnxruntime multiplies it by
   kernels for unsigned operands, OpenVINO in float.
3. The second operand of a product of two activations, where the kernel for unsigned ones is exact:
   its quantizer gives UINT8 codes, 128 above, under the same name.
4. Such a product where it is not: its operands' codes are cast to float, less their zero-points.
5. A layer that the runtime computes exactly in neither form: its weights dequantized, in float.
"""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of
from exporters.exactness import (
    ATTENTION,
    LEVELS,
    MIDDLE,
    SATURATING_KEY,
    SIGNED,
    UNSIGNED,
    Exactness,
    IntegerProduct,
    as_unsigned,
    constant_codes,
    integer_products,
    kernel,
)
from exporters.passes.contract import dequantizers, guarantee, need, need_expanded
from exporters.passes.unsigned_activations import raise_codes

FLOAT = "float"


class AvoidSaturation(ir.passes.InPlacePass):
    def __init__(self, exactness: Exactness) -> None:
        self.exactness = exactness

    def requires(self, model: ir.Model) -> None:
        need_expanded(model)
        for node in dequantizers(model):
            codes = node.inputs[0]
            widened = codes is not None and (cast := codes.producer()) and cast.op_type == "Cast"
            need(not widened, f"{node.name}: avoid saturation before weights are widened")

    def ensures(self, model: ir.Model) -> None:
        left = [str(product.node.name) for product in self._saturating(model)]
        guarantee(not left, f"{', '.join(left[:3])} still saturate")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        editor, forms = Editor(model.graph), {}
        for product in self._saturating(model):
            forms[str(product.node.name)] = form = self._form(product)
            if form == UNSIGNED:
                _store_unsigned(editor, product)
            elif product.kind == ATTENTION:
                _cast_operands(editor, product.node)
            else:
                _dequantize_weights(editor, product)
        if forms:
            model.metadata_props[SATURATING_KEY] = json.dumps(forms)
        return ir.passes.PassResult(model, modified=bool(forms))

    def _saturating(self, model: ir.Model) -> list[IntegerProduct]:
        return [
            product
            for product in integer_products(model)
            if product.weight == SIGNED
            and not self.exactness.holds(product.kernel, product.magnitude)
        ]

    def _form(self, product: IntegerProduct) -> str:
        unsigned = kernel(product.kind, product.activation, UNSIGNED)
        return UNSIGNED if self.exactness.holds(unsigned, LEVELS[0]) else FLOAT


def _store_unsigned(editor: Editor, product: IntegerProduct) -> None:
    codes, _, zero = product.dequantize.inputs
    assert codes is not None
    assert zero is not None
    if codes.dtype is ir.DataType.UINT8:  # raised for another product that reads it
        return
    if not codes.is_initializer():
        raise_codes(editor, codes)
        return
    for i, value in ((0, codes), (2, zero)):
        array = as_unsigned(array_of(value).astype(np.int8))
        product.dequantize.replace_input_with(
            i, editor.constant(f"{value.name}_plus_{MIDDLE}", array)
        )
        if not value.uses():
            editor.graph.initializers.pop(str(value.name))


def _cast_operands(editor: Editor, node: ir.Node) -> None:
    for i, operand in enumerate(list(node.inputs)):
        dequantize = None if operand is None else operand.producer()
        assert dequantize is not None
        codes, _, zero = dequantize.inputs
        assert zero is not None
        name, shape = f"{node.name}.operand_{i}", dequantize.outputs[0].shape
        value = editor.op(
            "Cast", [codes], name, dtype=ir.DataType.FLOAT, shape=shape, to=ir.DataType.FLOAT.value
        )
        if array_of(zero).any():
            value = editor.op(
                "Sub",
                [value, editor.constant(f"{zero.name}_float", array_of(zero).astype(np.float32))],
                f"{name}_centered",
            )
        node.replace_input_with(i, value)
    editor.insert_before(node)


def _dequantize_weights(editor: Editor, product: IntegerProduct) -> None:
    scale, zero = product.dequantize.inputs[1:3]
    assert product.dequantize.inputs[0] is not None
    assert scale is not None
    assert zero is not None
    codes = constant_codes(product.dequantize.inputs[0])
    assert codes is not None
    axis = product.dequantize.attributes.get_int("axis", 1)
    along = [-1 if i == axis else 1 for i in range(codes.ndim)]
    centered = codes.astype(np.float32) - array_of(zero).astype(np.float32).reshape(along)
    value = editor.constant(
        f"{product.node.name}.weights", centered * array_of(scale).reshape(along)
    )
    product.node.replace_input_with(1, value)
