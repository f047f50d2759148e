"""Store float weights in 16 bits where those hold their values, as they do those of models that
were published so: half the file, and nothing is rounded.

Guarantees: each FLOAT initializer of two dimensions or more and more than ``FEWEST`` elements, all
of which one of ``NARROW`` holds, is of the first such type and of the same name, and a single Cast
reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of, store_as
from exporters.passes.contract import guarantee

if TYPE_CHECKING:
    from numpy.typing import NDArray

FEWEST = 1024
NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


class NarrowWeights(ir.passes.InPlacePass):
    def ensures(self, model: ir.Model) -> None:
        initializers = model.graph.initializers.values()
        narrow = [value for value in initializers if value.dtype in NARROW]
        bare = [x.name for x in narrow if {node.op_type for node, _ in x.uses()} - {"Cast"}]
        guarantee(not bare, f"{', '.join(map(str, bare[:3]))} are read in 16 bits")
        wide = [str(value.name) for value in initializers if _narrow_type(value) is not None]
        guarantee(not wide, f"{', '.join(wide[:3])} could be in 16 bits")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        editor = Editor(model.graph)
        wide: dict[ir.Value, ir.Value] = {}
        types = {value: _narrow_type(value) for value in model.graph.initializers.values()}
        for node in list(model.graph):
            for i, value in enumerate(node.inputs):
                if value is None or (dtype := types.get(value)) is None:
                    continue
                if value not in wide:
                    wide[value] = _narrowed(editor, value, dtype)
                    editor.insert_before(node)
                node.replace_input_with(i, wide[value])
        return ir.passes.PassResult(model, modified=bool(wide))


def _narrow_type(value: ir.Value) -> ir.DataType | None:
    """What ``value`` is stored in; None where it stays as it is."""
    shape, size = value.shape or (), 0 if value.const_value is None else value.const_value.size
    if value.dtype is not ir.DataType.FLOAT or len(shape) < 2 or size <= FEWEST:
        return None
    return narrow_type(array_of(value))


def narrow_type(array: NDArray[np.float32]) -> ir.DataType | None:
    """The first type of ``NARROW`` that holds all of ``array``; None where neither does."""
    return next((dtype for dtype in NARROW if _holds(dtype, array.reshape(-1))), None)


def _holds(dtype: ir.DataType, array: NDArray[np.float32]) -> bool:
    """Whether ``dtype`` holds all of ``array`` [N]."""
    if array.size > FEWEST and not _holds(dtype, array[:FEWEST]):
        return False  # as a rule the first ones tell
    with np.errstate(over="ignore"):
        return np.array_equal(array.astype(dtype.numpy()).astype(np.float32), array)


def _narrowed(editor: Editor, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """``value`` in ``dtype``, and the value that casts it back."""
    store_as(value, dtype)
    float_type = ir.DataType.FLOAT
    return editor.op(
        "Cast",
        [value],
        f"{value.name}_float",
        dtype=float_type,
        shape=value.shape,
        to=float_type.value,
    )
