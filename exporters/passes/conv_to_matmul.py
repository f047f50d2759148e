"""Rewrite integer convolutions as matrix products, for a runtime that has an integer kernel for
these alone.

Needs: expanded quantizers. Guarantees: no ungrouped Conv on DequantizeLinear'ed codes, UINT8 or
INT8, and DequantizeLinear'ed constant weights [O, I, kh, kw], scaled along axis 0; the same integer
sums; the MatMul has the Conv's name, and its weight [kh * kw * I, O] the type that it had.

    y = Transpose(MatMul(DequantizeLinear(columns), DequantizeLinear(weight)))

1. A 1x1 convolution: the columns are the codes with their channels last.
2. A larger one: for each tap of the kernel the shifted codes, side by side along the channels, as
   im2col has them. They are moved as 8-bit codes, before they are dequantized.
3. Padding: codes that mean 0.
4. Strides and dilations: those of the Slices.
5. A grouped convolution, or one on float operands: left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of, replace_value
from exporters.passes.contract import guarantee, need_expanded
from quest_deploy.artifacts.checkpoint import pack_4bit

if TYPE_CHECKING:
    from collections.abc import Sequence
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
_FOUR_BITS = (ir.DataType.INT4, ir.DataType.UINT4)


class ConvToMatMul(ir.passes.InPlacePass):
    def requires(self, model: ir.Model) -> None:
        need_expanded(model)

    def ensures(self, model: ir.Model) -> None:
        left = [str(n.name) for n in model.graph if n.op_type == "Conv" and _is_integer(n)]
        guarantee(not left, f"{', '.join(left[:3])} are still convolutions")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if node.op_type == "Conv" and _is_integer(node)]
        editor = Editor(model.graph)
        for node in nodes:
            _rewrite(editor, node)
        return ir.passes.PassResult(model, modified=bool(nodes))


def _is_integer(conv: ir.Node) -> bool:
    producers = [value.producer() for value in conv.inputs if value is not None]
    if len(producers) != 2 or any(
        node is None or node.op_type != "DequantizeLinear" for node in producers
    ):
        return False
    weight = producers[1].inputs[0] if producers[1] is not None else None
    return (
        weight is not None and weight.is_initializer() and conv.attributes.get_int("group", 1) == 1
    )


def _rewrite(editor: Editor, conv: ir.Node) -> None:
    codes, unit, zero = _operands(conv.inputs[0])
    weight, scale, weight_zero = _operands(conv.inputs[1])
    name = (conv.name or "").removesuffix(".product")
    columns = _columns(editor, conv, name, codes, zero)
    activation = editor.op(
        "DequantizeLinear", [columns, unit, zero], f"{name}.columns_dequantized", dtype=unit.dtype
    )
    flat = editor.constant(f"{weight.name}_of_matmul", _flattened(weight))
    operands = [flat, scale, weight_zero]
    matrix = editor.op(
        "DequantizeLinear",
        operands,
        f"{flat.name}_dequantized",
        dtype=scale.dtype,
        shape=flat.shape,
        axis=1,
    )
    old = conv.outputs[0]
    product_name, old.name = old.name, f"{name}.conv"
    product = editor.op("MatMul", [activation, matrix], product_name or "")
    result = editor.op(
        "Transpose", [product], f"{name}.channels_first", shape=old.shape, perm=TO_FIRST
    )
    editor.insert_before(conv)
    replace_value(old, result)
    dequantizers = [value.producer() for value in conv.inputs if value is not None]
    editor.graph.remove(conv, safe=True)
    for node in (node for node in dequantizers if node is not None and not node.outputs[0].uses()):
        editor.graph.remove(node, safe=True)
    if not weight.uses() and weight.name is not None:
        editor.graph.initializers.pop(weight.name, None)


def _columns(editor: Editor, conv: ir.Node, name: str, codes: ir.Value, zero: ir.Value) -> ir.Value:
    """[B, H, W, kh * kw * C] of output size, from codes [B, C, H, W]."""
    value = editor.op("Transpose", [codes], f"{name}.channels_last", perm=TO_LAST)
    kernel = _shape_of(conv.inputs[1])[2:]
    top, left, bottom, right = (int(x) for x in conv.attributes.get_ints("pads", [0, 0, 0, 0]))
    strides, dilations = (conv.attributes.get_ints(key, [1, 1]) for key in ("strides", "dilations"))
    if any((top, left, bottom, right)):
        pads = editor.constant(
            f"pads_{top}_{left}_{bottom}_{right}",
            np.asarray([0, top, left, 0, 0, bottom, right, 0]),
        )
        value = editor.op("Pad", [value, pads, zero], f"{name}.padded_codes")
    if kernel == [1, 1] and list(strides) == [1, 1]:
        return value
    taps = [
        _tap(editor, f"{name}.tap_{i}_{j}", value, (i, j), kernel, strides, dilations)
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return taps[0] if len(taps) == 1 else editor.op("Concat", taps, f"{name}.columns", axis=3)


def _tap(
    editor: Editor,
    name: str,
    value: ir.Value,
    tap: tuple[int, int],
    kernel: list[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> ir.Value:
    """Return what one element of the kernel is multiplied with, for any height and width."""
    starts = [t * d for t, d in zip(tap, dilations, strict=True)]
    behind = [(k - 1 - t) * d for t, k, d in zip(tap, kernel, dilations, strict=True)]
    ends = [-b if b else np.iinfo(np.int64).max for b in behind]
    operands = [
        editor.constant(
            f"slice_{kind}_{'_'.join(str(x) for x in numbers)}", np.asarray(numbers, np.int64)
        )
        for kind, numbers in (
            ("starts", starts),
            ("ends", ends),
            ("axes", [1, 2]),
            ("steps", strides),
        )
    ]
    return editor.op("Slice", [value, *operands], name)


def _flattened(weight: ir.Value) -> ir.TensorProtocol:
    """[O, I, kh, kw] as [kh * kw * I, O], in the same type."""
    codes = array_of(weight)
    dtype = weight.const_value.dtype if weight.const_value is not None else None
    name = f"{weight.name}_of_matmul"
    flat = np.ascontiguousarray(codes.transpose(2, 3, 1, 0).reshape(-1, codes.shape[0]))
    if dtype in _FOUR_BITS:
        packed = pack_4bit(
            flat.astype(np.uint8) if dtype is ir.DataType.UINT4 else flat.astype(np.int8)
        )
        return ir.PackedTensor(packed, dtype, shape=flat.shape, name=name)
    return ir.tensor(flat, name=name)


def _operands(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value]:
    producer = None if value is None else value.producer()
    assert producer is not None
    first, scale, zero = producer.inputs
    assert first is not None
    assert scale is not None
    assert zero is not None
    return first, scale, zero


def _shape_of(value: ir.Value | None) -> list[int]:
    weight, _, _ = _operands(value)
    assert weight.shape is not None
    return [int(x) for x in weight.shape if isinstance(x, int)]
