"""Let the closing QuantizeLinear round, as it does by its definition, instead of a Round before it.

    QuantizeLinear(Min(Max(Round(x), low), high), 1, 0)  ->  QuantizeLinear(Min(Max(x, low), high), 1, 0)

Needs: quantizers as ExpandTimestepQuantize writes them: bounds that are integers, a scale of one. ONNX's QuantizeLinear rounds half to
even, as TensorRT does.
Guarantees: the same codes. Clamping to integers and rounding commute.

1. A Round whose clamped result QuantizeLinear reads alone is gone; one that an offset is added to stays.
2. The bounds stay, those of int8 too: how an infinity saturates is left to the runtime.

Not for runtimes that put QuantizeLinear into other arithmetic: OpenVINO adds 128 before it rounds.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.editor import replace_value


class RoundInQuantizeLinear(ir.passes.InPlacePass):
    """See the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for quantize in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
            clipped = _sole_producer(quantize, "Min")
            raised = None if clipped is None else _sole_producer(clipped, "Max")
            rounded = None if raised is None else _sole_producer(raised, "Round")
            if clipped is None or raised is None or rounded is None:
                continue
            source = rounded.inputs[0]
            assert source is not None
            replace_value(rounded.outputs[0], source)
            model.graph.remove(rounded, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _sole_producer(node: ir.Node, op_type: str) -> ir.Node | None:
    """The node of ``op_type`` whose result ``node`` reads first, and nobody else."""
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != op_type or producer.outputs[0].is_graph_output():
        return None
    return producer if len(producer.outputs[0].uses()) == 1 else None
