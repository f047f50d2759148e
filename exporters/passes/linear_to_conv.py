"""Rewrite integer linears as 1x1 convolutions over the tokens, for a runtime that has a fast
integer kernel for these alone.

Without VNNI, OpenVINO's integer linears take as long as float ones, its 1x1 convolutions half as
long (docs/processors.md). It keeps images with their channels last, as tokens are, so that it moves
nothing for the transposes.

Needs: expanded quantizers; weights around zero, not yet widened (CenterWeights, WidenInt4), where
no signed one saturates (AvoidSaturation). Guarantees: no MatMul of codes [B, N, C] by signed
constant weights [C, O] that the runtime's convolutions compute exactly; the same integer sums; the
Conv has the MatMul's name, and its weight [O, C, 1, 1] the type that it had.

    y = Squeeze(Transpose(Conv(Transpose(Unsqueeze(DequantizeLinear(codes))), ...)))

1. A linear on tokens: the convolution of an image one row high.
2. One on vectors [B, C] or on images [B, H, W, C], of unsigned weights, or on float operands: left
   alone. OpenVINO multiplies unsigned weights in float, and vectors are too few to matter.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of, replace_value
from exporters.exactness import (
    CONV,
    LINEAR,
    SIGNED,
    Exactness,
    IntegerProduct,
    integer_products,
    kernel,
)
from exporters.passes.contract import dequantizers, guarantee, need, need_expanded
from exporters.passes.conv_to_matmul import TO_FIRST, TO_LAST
from quest_deploy.artifacts.checkpoint import pack_4bit

_TOKENS = 3
"""The rank of [B, N, C]."""


class LinearToConv(ir.passes.InPlacePass):
    """See the module's docstring.

    Args:
        exactness: what the runtime's integer kernels compute exactly.
    """

    def __init__(self, exactness: Exactness) -> None:
        self.exactness = exactness

    def requires(self, model: ir.Model) -> None:
        need_expanded(model)
        for node in dequantizers(model):
            codes = node.inputs[0]
            widened = codes is not None and (cast := codes.producer()) and cast.op_type == "Cast"
            need(not widened, f"{node.name}: make convolutions before weights are widened")

    def ensures(self, model: ir.Model) -> None:
        left = [str(product.node.name) for product in self._on_tokens(model)]
        guarantee(not left, f"{', '.join(left[:3])} are still matrix products")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        products = self._on_tokens(model)
        editor = Editor(model.graph)
        for product in products:
            _rewrite(editor, product)
        return ir.passes.PassResult(model, modified=bool(products))

    def _on_tokens(self, model: ir.Model) -> list[IntegerProduct]:
        """The products of case 1."""
        return [
            product
            for product in integer_products(model)
            if (product.kind, product.weight) == (LINEAR, SIGNED)
            and _rank(product.node.inputs[0]) == _TOKENS
            and self.exactness.holds(kernel(CONV, product.activation, SIGNED), product.magnitude)
        ]


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _rewrite(editor: Editor, linear: IntegerProduct) -> None:
    node, name = linear.node, (linear.node.name or "").removesuffix(".product")
    tokens, old = node.inputs[0], node.outputs[0]
    codes, scale, zero = linear.dequantize.inputs
    assert codes is not None
    row = editor.constant("axis_of_row", np.asarray([1]))
    image = editor.op("Unsqueeze", [tokens, row], f"{name}.image")
    image = editor.op("Transpose", [image], f"{name}.channels_first", perm=TO_FIRST)
    weights = editor.constant(f"{codes.name}_of_conv", _as_kernel(codes))
    weight = editor.op(
        "DequantizeLinear",
        [weights, scale, zero],
        f"{name}.weight_of_conv_dequantized",
        dtype=ir.DataType.FLOAT,
        shape=weights.shape,
        axis=0,
    )
    product = editor.op("Conv", [image, weight], node.name or "", kernel_shape=[1, 1])
    image = editor.op("Transpose", [product], f"{name}.channels_last", perm=TO_LAST)
    result = editor.op("Squeeze", [image, row], f"{name}.tokens", shape=old.shape)
    # The product's value has its name too, unless a graph's output needs it.
    product.name, old.name = (
        (f"{name}.conv", old.name) if old.is_graph_output() else (old.name, f"{name}.linear")
    )
    editor.insert_before(node)
    replace_value(old, result)
    editor.graph.remove(node, safe=True)
    if not linear.dequantize.outputs[0].uses():
        editor.graph.remove(linear.dequantize, safe=True)
    if not codes.uses() and codes.name is not None:
        editor.graph.initializers.pop(codes.name, None)


def _as_kernel(codes: ir.Value) -> ir.TensorProtocol:
    """Weights [C, O] as [O, C, 1, 1], in the same type."""
    array = np.ascontiguousarray(array_of(codes).T)[:, :, None, None]
    name = f"{codes.name}_of_conv"
    if codes.dtype is ir.DataType.INT4:
        packed = pack_4bit(array.astype(np.int8))
        return ir.PackedTensor(packed, ir.DataType.INT4, shape=array.shape, name=name)
    return ir.tensor(array, name=name)
