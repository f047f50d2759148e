"""Let whoever reads a slice of a concatenation read the part that was concatenated.

Needs: any graph. Guarantees: gone is a Slice, with constant starts, ends and axes, of exactly one
part of a Concat along the same axis whose parts have known sizes. A split shortcut then reads
the skip connection itself, which other layers may read too: one tensor, quantized once.
"""

from __future__ import annotations

import itertools

import onnx_ir as ir

from exporters.editor import array_of, replace_value
from exporters.passes.contract import guarantee


class ForwardSlices(ir.passes.InPlacePass):
    def ensures(self, model: ir.Model) -> None:
        left = [str(n.name) for n in model.graph if n.op_type == "Slice" and _part(n) is not None]
        guarantee(not left, f"{', '.join(left[:3])} still slice a concatenation's part")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in [node for node in model.graph if node.op_type == "Slice"]:
            part = _part(node)
            if part is not None:
                replace_value(node.outputs[0], part)
                model.graph.remove(node, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _part(node: ir.Node) -> ir.Value | None:
    source, *bounds = node.inputs
    concat = None if source is None else source.producer()
    if concat is None or concat.op_type != "Concat" or len(bounds) < 3:
        return None
    constants = [bound.const_value for bound in bounds if bound is not None]
    if len(constants) != len(bounds) or any(
        constant is None or constant.size != 1 for constant in constants
    ):
        return None
    start, end, axis, *step = (int(array_of(bound).item()) for bound in bounds if bound is not None)
    sizes = [
        None if part is None or part.shape is None else part.shape[axis] for part in concat.inputs
    ]
    if (
        axis != concat.attributes["axis"].as_int()
        or step not in ([], [1])
        or not all(isinstance(size, int) for size in sizes)
    ):
        return None
    edges = list(itertools.accumulate((size for size in sizes if isinstance(size, int)), initial=0))
    for part, (low, high) in zip(concat.inputs, itertools.pairwise(edges), strict=True):
        if (start, min(end, edges[-1])) == (low, high):
            return part
    return None
