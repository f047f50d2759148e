"""Rewrite weights stored as unsigned codes for runtimes whose integer layers want zero-points of
zero.

Needs: weights as UINT4 or UINT8 initializers read by DequantizeLinear with an explicit zero-point
per output channel. Guarantees: no unsigned initializer is read by DequantizeLinear; the values are
unchanged.

1. UINT4: code - zero-point fits INT8, with zero-points of zero.
2. UINT8, zero-points of 128 or ``signed_zero_points=True``: code - 128 and zero-point - 128 as
   INT8.
3. UINT8 otherwise: the weight itself in float, of its scale's type, since code - zero-point needs
   nine bits; its layer runs in float.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of, replace_value
from exporters.exactness import MIDDLE
from exporters.passes.contract import dequantizers, guarantee, need

UNSIGNED = (ir.DataType.UINT4, ir.DataType.UINT8)


class CenterWeights(ir.passes.InPlacePass):
    def __init__(self, *, signed_zero_points: bool) -> None:
        self.signed_zero_points = signed_zero_points

    def requires(self, model: ir.Model) -> None:
        for node in _unsigned_weights(model):
            zero = node.inputs[2] if len(node.inputs) > 2 else None
            explicit = zero is not None and zero.is_initializer()
            need(explicit, f"{node.name}: its zero-points must be a constant")

    def ensures(self, model: ir.Model) -> None:
        left = [str(node.name) for node in _unsigned_weights(model)]
        guarantee(not left, f"{', '.join(left[:3])} still read unsigned weights")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        editor = Editor(model.graph)
        nodes = _unsigned_weights(model)
        for node in nodes:
            self._rewrite(editor, node)
        return ir.passes.PassResult(model, modified=bool(nodes))

    def _rewrite(self, editor: Editor, node: ir.Node) -> None:
        codes, scale, zero = (value for value in node.inputs if value is not None)
        axis = node.attributes["axis"].as_int()
        values, zeros = array_of(codes).astype(np.int16), array_of(zero).astype(np.int16)
        shape = [1] * values.ndim
        shape[axis] = -1
        if codes.dtype is ir.DataType.UINT4:
            centered, zeros = values - zeros.reshape(shape), np.zeros_like(zeros)
        elif self.signed_zero_points or (zeros == MIDDLE).all():
            centered, zeros = values - MIDDLE, zeros - MIDDLE
        else:
            scales = array_of(scale)
            weight = (values - zeros.reshape(shape)).astype(np.float32) * scales.astype(
                np.float32
            ).reshape(shape)
            replace_value(
                node.outputs[0], editor.constant(f"{codes.name}_float", weight.astype(scales.dtype))
            )
            editor.graph.remove(node, safe=True)
            _drop_unread(editor.graph, codes, scale, zero)
            return
        node.replace_input_with(
            0, editor.constant(f"{codes.name}_centered", centered.astype(np.int8))
        )
        node.replace_input_with(2, editor.constant(f"{zero.name}_centered", zeros.astype(np.int8)))
        _drop_unread(editor.graph, codes, zero)


def _unsigned_weights(model: ir.Model) -> list[ir.Node]:
    """The DequantizeLinear of weights stored unsigned; activations may be unsigned too."""
    return [
        node
        for node in dequantizers(model)
        if (codes := node.inputs[0]) is not None
        and codes.is_initializer()
        and codes.dtype in UNSIGNED
    ]


def _drop_unread(graph: ir.Graph, *values: ir.Value) -> None:
    for value in values:
        if not value.uses() and value.name is not None:
            graph.initializers.pop(value.name, None)
