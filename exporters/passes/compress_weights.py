"""Store the weights of a float graph as INT8, and dequantize them where they are read: a quarter of
the bytes. What is computed stays in float.

Needs: a graph without quantizers.

Guarantees: every weight of the cases below is int8, symmetric, with one FP32 scale for each output
channel, the largest magnitude over 127; no other value changes. Codes are computed when they are
read, so that one weight is in memory.

Cases:

1. ``Conv(x, w)``, w [out, in, ...]: a scale for each row.
2. ``MatMul(x, w)``, w [in, out], and ``Gemm(x, w)``, also transposed: a scale for each output.
3. ``Gather(w, ids)``, w [words, width], an embedding: a scale for each word.
4. Weights of fewer than ``LEAST`` numbers, those whose readers disagree on the axis, tables that
   are read at constant places, such as those of positions, and all other initializers stay.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of, lazy
from exporters.graph_info import has_quantizers
from exporters.passes.contract import guarantee, need
from quest_deploy.artifacts.lazy_tensors import LazyArray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

LEAST = 1024
_LIMIT = 127


class CompressWeights(ir.passes.InPlacePass):
    """See the module."""

    def requires(self, model: ir.Model) -> None:
        need(not has_quantizers(model), "the graph has quantizers")

    def ensures(self, model: ir.Model) -> None:
        left = [str(value.name) for value, _ in _weights(model)]
        guarantee(not left, f"{', '.join(left[:3])} still hold floats")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = list(_weights(model))
        for value, axis in found:
            weight = array_of(value)
            others = tuple(i for i in range(weight.ndim) if i != axis)
            largest = np.abs(weight).max(axis=others, keepdims=True)
            # Of zeros, or of the least subnormal numbers, the quotient is 0.
            scale = np.maximum(largest / _LIMIT, np.finfo(np.float32).tiny).astype(np.float32)
            codes = LazyArray(weight.shape, np.dtype(np.int8), partial(_codes, value, scale))
            editor, name = Editor(model.graph), str(value.name)
            stored = [
                editor.constant(f"{name}.codes", lazy(f"{name}.codes", codes)),
                editor.constant(f"{name}.scale", scale.reshape(-1)),
                editor.constant(f"{name}.zero", np.zeros(scale.size, np.int8)),
            ]
            dequantized = editor.op(
                "DequantizeLinear",
                stored,
                f"{name}.dequantized",
                dtype=ir.DataType.FLOAT,
                shape=value.shape,
                axis=axis,
            )
            value.replace_all_uses_with(dequantized)
            editor.insert_before(model.graph[0])
            del model.graph.initializers[name]
        return ir.passes.PassResult(model, modified=bool(found))


def _codes(value: ir.Value, scale: NDArray[np.float32]) -> NDArray[np.int8]:
    codes: NDArray[np.int8] = np.rint(array_of(value) / scale).astype(np.int8)
    return codes


def _weights(model: ir.Model) -> Iterator[tuple[ir.Value, int]]:
    """The initializers to compress, each with the axis of its output channels."""
    for value in list(model.graph.initializers.values()):
        axes = {_axis(node, index) for node, index in value.uses()}
        axis = axes.pop() if len(axes) == 1 else None
        size = 0 if value.const_value is None else value.const_value.size
        if axis is not None and value.dtype is ir.DataType.FLOAT and size >= LEAST:
            yield value, axis


def _axis(node: ir.Node, index: int) -> int | None:
    """The axis of the output channels of a node's input; None where it is not a weight."""
    if (node.op_type, index) == ("Conv", 1):
        return 0
    if (node.op_type, index) == ("Gemm", 1):
        transposed = node.attributes.get("transB")
        return 0 if transposed is not None and transposed.as_int() else 1
    weight, axis = node.inputs[index], {("MatMul", 1): 1, ("Gather", 0): 0}
    shape = None if weight is None else weight.shape
    is_matrix = shape is not None and len(shape) == 2
    places = node.inputs[1] if node.op_type == "Gather" else None
    is_constant = places is not None and places.const_value is not None
    return axis.get((node.op_type, index)) if is_matrix and not is_constant else None
