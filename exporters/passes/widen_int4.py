"""Rewrite INT4 weight initializers for runtimes whose integer layers read INT8.

Needs: weights as initializers read by DequantizeLinear with an explicit zero-point of zeros.
Guarantees: every DequantizeLinear reads INT8; the values are unchanged.

1. ``cast_at_runtime=False``: the initializer itself becomes INT8 (twice the size).
2. ``cast_at_runtime=True``: the initializer stays INT4 and a Cast widens it, which OpenVINO folds
   when it compiles.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of
from exporters.passes.contract import dequantizers, guarantee, need


class WidenInt4(ir.passes.InPlacePass):
    def __init__(self, *, cast_at_runtime: bool) -> None:
        self.cast_at_runtime = cast_at_runtime

    def requires(self, model: ir.Model) -> None:
        for node in _packed(model):
            codes, zero = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
            constant = codes is not None and codes.is_initializer()
            need(constant, f"{node.name}: its codes must be a constant")
            zeros = zero is not None and zero.is_initializer() and not array_of(zero).any()
            need(zeros, f"{node.name}: its zero-points must be constant zeros")

    def ensures(self, model: ir.Model) -> None:
        left = [str(node.name) for node in _packed(model)]
        guarantee(not left, f"{', '.join(left[:3])} still read INT4")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        editor = Editor(model.graph)
        nodes = _packed(model)
        for node in nodes:
            codes, _, zero = node.inputs
            assert codes is not None
            assert zero is not None
            node.replace_input_with(0, self._widened(editor, codes))
            node.replace_input_with(
                2, editor.constant(f"{zero.name}_int8", array_of(zero).astype(np.int8))
            )
            editor.insert_before(node)
            for old in (codes, zero):
                if not old.uses() and old.name is not None:
                    model.graph.initializers.pop(old.name, None)
        return ir.passes.PassResult(model, modified=bool(nodes))

    def _widened(self, editor: Editor, codes: ir.Value) -> ir.Value:
        if self.cast_at_runtime:
            return editor.op(
                "Cast",
                [codes],
                f"{codes.name}_int8",
                dtype=ir.DataType.INT8,
                shape=codes.shape,
                to=ir.DataType.INT8.value,
            )
        return editor.constant(f"{codes.name}_int8", array_of(codes).astype(np.int8))


def _packed(model: ir.Model) -> list[ir.Node]:
    return [
        node
        for node in dequantizers(model)
        if node.inputs[0] is not None and node.inputs[0].dtype is ir.DataType.INT4
    ]
