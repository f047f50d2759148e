"""Let the closing QuantizeLinear round, as it does by its definition, instead of a Round before it.

    QuantizeLinear(Min(Max(Round(x), low), high), 1, 0)  ->  QuantizeLinear(Min(Max(x, low), high),
    1, 0)

Needs: quantizers as ExpandTimestepQuantize writes them, whose bounds are integers also where a
table holds them. ONNX's QuantizeLinear rounds half to even, as TensorRT does.
Guarantees: the same codes. Clamping to integers and rounding commute.

1. A scale that is not the constant one, a zero point that is not zero, and constant bounds that are
   no integers leave it as it is.
2. A Round whose clamped result QuantizeLinear reads alone is gone; one that an offset is added to
   stays.
3. The bounds stay, those of int8 too: how an infinity saturates is left to the runtime.

Not for runtimes that put QuantizeLinear into other arithmetic: OpenVINO adds 128 before it rounds.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.editor import array_of, replace_value
from exporters.passes.contract import guarantee, need_expanded


class RoundInQuantizeLinear(ir.passes.InPlacePass):
    def requires(self, model: ir.Model) -> None:
        need_expanded(model)

    def ensures(self, model: ir.Model) -> None:
        left = [str(node.name) for node in model.graph if _needless_round(node) is not None]
        guarantee(not left, f"a Round is left before {', '.join(left[:3])}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for rounded in [x for node in model.graph if (x := _needless_round(node)) is not None]:
            source = rounded.inputs[0]
            assert source is not None
            replace_value(rounded.outputs[0], source)
            model.graph.remove(rounded, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _needless_round(quantize: ir.Node) -> ir.Node | None:
    """The Round whose clamped result ``quantize`` alone reads, and rounds again."""
    if quantize.op_type != "QuantizeLinear" or not _only_changes_type(quantize):
        return None
    clipped = _sole_producer(quantize, "Min")
    raised = None if clipped is None else _sole_producer(clipped, "Max")
    if clipped is None or raised is None:
        return None
    whole = _may_be_integers(raised.inputs[1]) and _may_be_integers(clipped.inputs[1])
    return _sole_producer(raised, "Round") if whole else None


def _only_changes_type(quantize: ir.Node) -> bool:
    """Whether its scale is the constant one, and its zero point, if it has one, the constant
    zero.
    """
    return all(
        value is None or (value.const_value is not None and bool((array_of(value) == wanted).all()))
        for value, wanted in zip(quantize.inputs[1:], (1, 0), strict=False)
    )


def _may_be_integers(bound: ir.Value | None) -> bool:
    """Whether a bound, where it is constant, is integers or infinite."""
    if bound is None or bound.const_value is None:
        return True
    values = array_of(bound)
    return bool((values == np.rint(values)).all())


def _sole_producer(node: ir.Node, op_type: str) -> ir.Node | None:
    """The node of ``op_type`` whose result ``node`` reads first, and nobody else."""
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != op_type or producer.outputs[0].is_graph_output():
        return None
    return producer if len(producer.outputs[0].uses()) == 1 else None
