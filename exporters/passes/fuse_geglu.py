"""Fuse GEGLU with the quantizer that reads it into ``quest::GegluTimestepQuantize``, which
TensorRT's plugin computes in one pass.

TensorRT fuses nothing into a plugin: it would write the product, and the plugin read it again
(trt_plugins/README.md counts the bytes).

Needs: any graph. Fuses only the quantizers that KeepTimestepQuantize kept for the plugin.
Guarantees: the codes keep their name. What is fused, the quantizer's input among it, leaves the
    graph: fuse last, after all that looks for quantizers, and cut parts out of a graph that is not
    fused.

1. Split into two along the last axis -> Gelu of the second part, by the error function -> Mul by
   the first -> TimestepQuantize along the last axis: one node.
2. Where anything else reads one of these values, or a quantizer is not the plugin's: nothing
   changes.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.editor import array_of, replace_value
from exporters.ops import geglu_timestep_quantize, timestep_quantize
from exporters.passes.contract import guarantee_codes, is_kept


class FuseGeglu(ir.passes.InPlacePass):
    def ensures(self, model: ir.Model) -> None:
        guarantee_codes(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        fused = [_fuse(model.graph, node) for node in list(model.graph) if is_kept(node)]
        return ir.passes.PassResult(model, modified=any(fused))


def _fuse(graph: ir.Graph, quantizer: ir.Node) -> bool:
    product = _only_producer(quantizer.inputs[0], "Mul")
    if (
        product is None
        or quantizer.attributes[timestep_quantize.AXIS].as_int()
        != len(quantizer.outputs[0].shape or []) - 1
    ):
        return False
    gelu = _only_producer(product.inputs[1], "Gelu")
    values = product.inputs[0]
    if (
        gelu is None
        or values is None
        or (
            "approximate" in gelu.attributes
            and gelu.attributes["approximate"].as_string() != "none"
        )
    ):
        return False
    split = values.producer()
    if split is None or not _halves(split) or list(split.outputs) != [values, gelu.inputs[0]]:
        return False
    if any(len(half.uses()) != 1 or half.is_graph_output() for half in split.outputs):
        return False
    codes = quantizer.outputs[0]
    attributes = [
        attribute
        for name, attribute in quantizer.attributes.items()
        if name != timestep_quantize.AXIS
    ]
    output = ir.Value(name=codes.name, type=codes.type, shape=codes.shape)
    fused = ir.Node(
        timestep_quantize.DOMAIN,
        geglu_timestep_quantize.OP_TYPE,
        [split.inputs[0], *quantizer.inputs[1:]],
        attributes,
        outputs=[output],
        name=quantizer.name,
    )
    graph.insert_before(quantizer, fused)
    replace_value(codes, output)
    for node in (quantizer, product, gelu, split):
        graph.remove(node, safe=True)
    return True


def _only_producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The ``op_type`` node behind ``value``, if nothing else reads it."""
    producer = (
        None
        if value is None or value.is_graph_output() or len(value.uses()) != 1
        else value.producer()
    )
    return producer if producer is not None and producer.op_type == op_type else None


def _halves(node: ir.Node) -> bool:
    """Whether this is a Split into two equal parts along the last axis."""
    if node.op_type != "Split" or len(node.outputs) != 2:
        return False
    axis, rank = (
        node.attributes["axis"].as_int() if "axis" in node.attributes else 0,
        len(node.outputs[0].shape or []),
    )
    sizes = node.inputs[1] if len(node.inputs) > 1 else None
    return axis in (-1, rank - 1) and (
        sizes is None or (sizes.is_initializer() and len(set(array_of(sizes).tolist())) == 1)
    )
