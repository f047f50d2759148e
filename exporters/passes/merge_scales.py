"""Multiply a product of two activations once: y * (s_a * s_b) in place of (y * s_a) * s_b.

OpenVINO fuses attention from the first product to the last into one kernel as long as few enough
values enter it; two scales a product are too many. The product of two scales, [B, 1, 1, 1], costs
nothing.

Needs: expanded quantizers. Scales are as ``insert_quantized_layers`` builds them, gathered and
shaped by Unsqueeze to [B, 1, ...], or constants of a frozen bucket.
Guarantees: nothing is scaled twice; the same numbers but for the rounding of one multiplication.

1. (y * a) * b, both scales of samples, the inner product read once: y * (a * b).
2. Anything else stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from exporters.editor import Editor
from exporters.passes.contract import guarantee, need_expanded

if TYPE_CHECKING:
    from collections.abc import Iterator


class MergeScales(ir.passes.InPlacePass):
    """See the module's docstring; run before GatherTablesOnce, which moves the scales."""

    def requires(self, model: ir.Model) -> None:
        need_expanded(model)

    def ensures(self, model: ir.Model) -> None:
        left = [str(outer.name) for outer, _ in _scaled_twice(model)]
        guarantee(not left, f"{', '.join(left[:3])} are still scaled twice")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        editor = Editor(model.graph)
        modified = False
        for outer, inner in _scaled_twice(model):
            both = editor.op("Mul", [inner.inputs[1], outer.inputs[1]], f"{outer.name}_by_both")
            editor.insert_before(outer)
            outer.replace_input_with(0, inner.inputs[0])
            outer.replace_input_with(1, both)
            model.graph.remove(inner, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _scaled_twice(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Node]]:
    """The outer and the inner Mul of case 1, as the graph has them when each is asked for."""
    for outer in [node for node in model.graph if node.op_type == "Mul"]:
        inner = outer.inputs[0].producer() if outer.inputs[0] is not None else None
        if (
            inner is not None
            and inner.op_type == "Mul"
            and len(inner.outputs[0].uses()) == 1
            and _is_scale(inner.inputs[1])
            and _is_scale(outer.inputs[1])
        ):
            yield outer, inner


def _is_scale(value: ir.Value | None) -> bool:
    """Whether ``value`` is one number for each sample."""
    if value is None:
        return False
    unsqueeze = value.producer()
    if unsqueeze is None:
        return value.is_initializer() and (value.name or "").endswith(".scale_frozen")
    gather = (
        unsqueeze.inputs[0].producer()
        if unsqueeze.op_type == "Unsqueeze" and unsqueeze.inputs[0] is not None
        else None
    )
    return gather is not None and gather.op_type == "Gather"
