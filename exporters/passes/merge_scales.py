"""Multiply a product of two activations once: y * (s_a * s_b) in place of (y * s_a) * s_b.

OpenVINO fuses attention from the first product to the last into one kernel as long as few enough
values enter it; two scales a product are too many. The product of two scales, [B, 1, 1, 1], costs
nothing.

Needs: scales as ``insert_quantized_layers`` builds them, gathered and shaped by Unsqueeze to [B, 1,
...], or constants of a frozen bucket.
Guarantees: the same numbers but for the rounding of one multiplication.

1. (y * a) * b, both scales of samples, the inner product read once: y * (a * b).
2. Anything else stays.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.editor import Editor


class MergeScales(ir.passes.InPlacePass):
    """See the module's docstring; run before GatherTablesOnce, which moves the scales."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        editor = Editor(model.graph)
        modified = False
        for outer in [node for node in model.graph if node.op_type == "Mul"]:
            inner = outer.inputs[0].producer() if outer.inputs[0] is not None else None
            if inner is None or inner.op_type != "Mul" or len(inner.outputs[0].uses()) != 1:
                continue
            scales = (inner.inputs[1], outer.inputs[1])
            if all(_is_scale(scale) for scale in scales):
                both = editor.op("Mul", scales, f"{outer.name}_by_both")
                editor.insert_before(outer)
                outer.replace_input_with(0, inner.inputs[0])
                outer.replace_input_with(1, both)
                model.graph.remove(inner, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


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
