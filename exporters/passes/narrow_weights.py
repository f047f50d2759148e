"""Store float weights in bfloat16 where that holds their values, as it does those of models that
were published in it: half the file, and nothing is rounded.

Guarantees: each FLOAT initializer of two dimensions or more and more than ``FEWEST`` elements, all
of which bfloat16 holds, is a BFLOAT16 one of the same name, which a single Cast reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of
from exporters.passes.contract import guarantee

if TYPE_CHECKING:
    from numpy.typing import NDArray

FEWEST = 1024


class NarrowWeights(ir.passes.InPlacePass):
    """See the module's docstring."""

    def ensures(self, model: ir.Model) -> None:
        initializers = model.graph.initializers.values()
        narrow = [value for value in initializers if value.dtype is ir.DataType.BFLOAT16]
        bare = [x.name for x in narrow if {node.op_type for node, _ in x.uses()} - {"Cast"}]
        guarantee(not bare, f"{', '.join(map(str, bare[:3]))} are read in bfloat16")
        wide = [str(value.name) for value in initializers if _is_narrowable(value)]
        guarantee(not wide, f"{', '.join(wide[:3])} could be bfloat16")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        editor = Editor(model.graph)
        wide: dict[ir.Value, ir.Value] = {}
        left = {value for value in model.graph.initializers.values() if not _is_narrowable(value)}
        for node in list(model.graph):
            for i, value in enumerate(node.inputs):
                if value is None or not value.is_initializer() or value in left:
                    continue
                if value not in wide:
                    wide[value] = _narrowed(editor, value)
                    editor.insert_before(node)
                node.replace_input_with(i, wide[value])
        return ir.passes.PassResult(model, modified=bool(wide))


def _is_narrowable(value: ir.Value) -> bool:
    shape, size = value.shape or (), 0 if value.const_value is None else value.const_value.size
    if value.dtype is not ir.DataType.FLOAT or len(shape) < 2 or size <= FEWEST:
        return False
    return not (array_of(value).view(np.uint32) & 0xFFFF).any()


def _narrowed(editor: Editor, value: ir.Value) -> ir.Value:
    """``value`` in bfloat16, and the value that casts it back."""
    tensor: Any = value.const_value
    dtype = ir.DataType.BFLOAT16

    def upper() -> ir.TensorProtocol:
        halves: NDArray[np.uint16] = (tensor.numpy().view(np.uint32) >> 16).astype(np.uint16)
        return ir.tensor(halves.view(dtype.numpy()), name=value.name)

    value.const_value = ir.LazyTensor(upper, dtype, tensor.shape, name=value.name)
    value.type = ir.TensorType(dtype)
    float_type = ir.DataType.FLOAT
    return editor.op(
        "Cast",
        [value],
        f"{value.name}_float",
        dtype=float_type,
        shape=value.shape,
        to=float_type.value,
    )
