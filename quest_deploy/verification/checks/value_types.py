"""Which values of a graph are FP16 or bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.passes.to_dtype import LOW_PRECISION_TYPES

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

HALF = {dtype: name for name, dtype in LOW_PRECISION_TYPES.items()}


class ValueTypes:
    """The types of a graph's values, and the low-precision type that it computes in, if any: its
    own, or one that the runtime was told.
    """

    def __init__(self, lowered: ir.Model, dtype: str) -> None:
        values = [
            x for node in lowered.graph for x in (*node.inputs, *node.outputs) if x is not None
        ]
        self._types = {str(x.name): x.dtype for x in (*lowered.graph.inputs, *values)}
        casts = [
            (node.inputs[0], str(node.outputs[0].name))
            for node in lowered.graph
            if node.op_type == "Cast"
        ]
        self._was = {output: x.dtype for x, output in casts if x is not None}
        self._hidden = (
            dtype if dtype in HALF.values() and not set(HALF) & set(self._types.values()) else None
        )

    def half(self, *values: str) -> str | None:
        """The low-precision type, fp16 or bf16, that any of ``values`` may be rounded to, or was;
        None where all are FP32.
        """
        found = (
            dtype
            for value in values
            for dtype in (self._types.get(value), self._was.get(value))
            if dtype in HALF
        )
        return self._hidden or next((HALF[dtype] for dtype in found), None)

    def is_low_precision(self, value: str) -> bool:
        """Whether the graph itself gives ``value`` a low-precision type."""
        return self._types.get(value) in HALF

    def cast(self, value: str, x: NDArray[Any]) -> NDArray[Any]:
        """x as FP32, rounded to the type of ``value`` if that is a low-precision type: a cut is
        FP32 outside.
        """
        dtype = self._types.get(value)
        return x.astype(dtype.numpy()).astype(np.float32) if dtype in HALF else x
