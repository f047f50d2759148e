"""Write the target of a Reshape that keeps its first axes as a constant, with ONNX's 0 for an axis
that is kept.

    Reshape(x, Concat(Slice(Shape(x), [0], [2]), [8], [-1]))  ->  Reshape(x, [0, 0, 8, -1])

Needs: any graph.
Guarantees: the same shapes; targets that are concatenated from constants and from sizes of what is
reshaped are constants. A dozen sizes are computed for every attention of a UNet otherwise,
which shape inference cannot follow.

1. All parts are constants other than 0, or sizes of x where x has them: a constant.
2. Anything else stays: a target of sizes that move, or of another tensor.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of
from exporters.passes.contract import guarantee

KEPT = 0


class ConstantReshapes(ir.passes.InPlacePass):
    def ensures(self, model: ir.Model) -> None:
        left = [
            str(node.name) for node in model.graph if node.op_type == "Reshape" and _target(node)
        ]
        guarantee(not left, f"{', '.join(left[:3])} still have targets that are computed")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        editor = Editor(model.graph)
        modified = False
        for node in [node for node in model.graph if node.op_type == "Reshape"]:
            target = _target(node)
            if target is not None:
                node.replace_input_with(
                    1,
                    editor.constant(
                        f"reshape_to_{'_'.join(map(str, target))}", np.asarray(target, np.int64)
                    ),
                )
                node.attributes.pop("allowzero", None)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _target(reshape: ir.Node) -> list[int] | None:
    x, shape = reshape.inputs[:2]
    concat = None if shape is None else shape.producer()
    if x is None or concat is None or concat.op_type != "Concat":
        return None
    target: list[int] = []
    for part in concat.inputs:
        sizes = None if part is None else _constants(part) or _kept(part, x, len(target))
        if sizes is None:
            return None
        target += sizes
    return target


def _constants(part: ir.Value) -> list[int] | None:
    if part.const_value is None:
        return None
    sizes = [int(size) for size in array_of(part).reshape(-1)]
    return None if KEPT in sizes else sizes


def _kept(part: ir.Value, x: ir.Value, axis: int) -> list[int] | None:
    """Zeros, if ``part`` holds the sizes of ``x`` from ``axis`` on."""
    bounds: list[int] = []
    node = part.producer()
    if node is not None and node.op_type == "Slice":
        constants = [bound.const_value for bound in node.inputs[1:] if bound is not None]
        if any(constant is None or constant.size != 1 for constant in constants):
            return None
        bounds = [int(constant.numpy().item()) for constant in constants if constant is not None]
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    source = None if node is None or node.op_type != "Shape" else node.inputs[0]
    if (
        node is None
        or source is None
        or source.shape is None
        or x.shape is None
        or bounds[2:] not in ([], [0], [0, 1])
    ):
        return None
    start, end = (
        node.attributes[name].as_int() if name in node.attributes else None
        for name in ("start", "end")
    )
    axes = range(len(source.shape))[slice(start, end)][
        slice(*bounds[:2]) if bounds else slice(None)
    ]
    if not axes or axis + len(axes) > len(x.shape):
        return None
    in_place = source is x and axes[0] == axis
    equal = all(
        _equal(source.shape[of_source], x.shape[axis + i]) for i, of_source in enumerate(axes)
    )
    return [KEPT] * len(axes) if in_place or equal else None


def _equal(size: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    """Whether two sizes are known to be the same: the same symbol stands for the same size
    throughout a graph.
    """
    return size == other and (isinstance(size, int) or size.value is not None)
