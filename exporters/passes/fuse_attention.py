"""Write float attention as ONNX's Attention, which TensorRT computes in one kernel, or refuses.

    MatMul(Softmax(MatMul(q, k)), v)  ->  Attention(q, transposed k, v; scale = 1)

For a graph in a low-precision type (see ToLowPrecision): TensorRT has no such kernel in FP32.
Guarantees: the scaling of q and k stays, and is all there is. The node has the name of the first
product. What is fused leaves the graph, so fuse last, and cut parts out of a graph that is not
fused; :func:`float_attentions` tells the names of the products.

1. q [B, heads, N, size]; k transposed from [B, M, heads, size] to [B, heads, size, M] and, maybe,
   multiplied by a number; v [B, heads, M, size]. The casts around a Softmax in FP32 go: the kernel
   has it in FP32.
2. A head size that TensorRT for RTX 1.7 has no kernel for stays as it is: of those tried it takes
   16, 20, 24, 40, 64, 80, 160, 192 and 256, and refuses 4, 6, 264 and 512.
3. So does all else: quantized attention, a mask, scores or weights that anything else reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from exporters.editor import Editor, replace_value
from exporters.passes.contract import guarantee
from exporters.passes.to_dtype import LOW_PRECISION_TYPES

OPSET = 23
"""The first with Attention."""
HEAD_SIZES = range(16, 257)
TRANSPOSED, UNTRANSPOSED = (0, 2, 3, 1), (0, 2, 1, 3)
"""How [B, M, heads, size] becomes the right operand of the scores, and Attention's."""


@dataclass(frozen=True)
class _Attention:
    """The nodes of one, and its operands."""

    nodes: tuple[ir.Node, ...]
    q: ir.Value
    k: ir.Value
    factor: ir.Value | None
    v: ir.Value

    @property
    def scores(self) -> ir.Node:
        return self.nodes[0]

    @property
    def mix(self) -> ir.Node:
        return self.nodes[-1]


class FuseAttention(ir.passes.InPlacePass):
    def ensures(self, model: ir.Model) -> None:
        left = float_attentions(model)
        guarantee(not left, f"{', '.join(sorted(left)[:3])} are not fused")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = _attentions(model)
        for attention in found:
            _fuse(model.graph, attention)
        if found:
            model.graph.opset_imports[""] = max(model.graph.opset_imports[""], OPSET)
            common.RemoveUnusedNodesPass()(model)  # what transposed k, where nothing else reads it
        return ir.passes.PassResult(model, modified=bool(found))


def float_attentions(model: ir.Model) -> dict[str, str]:
    """The attentions that :class:`FuseAttention` fuses: the name of the second product by that of
    the first, which the fused node has.
    """
    return {str(each.mix.name): str(each.scores.name) for each in _attentions(model)}


def _attentions(model: ir.Model) -> list[_Attention]:
    found = (_matched(node) for node in model.graph if node.op_type == "Softmax")
    return [attention for attention in found if attention is not None]


def _matched(softmax: ir.Node) -> _Attention | None:
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    before, after = _behind(softmax.inputs[0]), _reader(softmax)
    casts = [node for node in (before, after) if node is not None and node.op_type == "Cast"]
    if before is not None and before.op_type == "Cast":
        before = _behind(before.inputs[0])
    if after is not None and after.op_type == "Cast":
        after = _reader(after)
    if before is None or after is None or {before.op_type, after.op_type} != {"MatMul"}:
        return None
    (q, k), (weights, v) = before.inputs, after.inputs
    scaled = None if k is None else k.producer()
    factor = None
    if scaled is not None and scaled.op_type == "Mul":
        k, factor = scaled.inputs
        if factor is None or factor.const_value is None or factor.const_value.size != 1:
            return None
    transpose = None if k is None else k.producer()
    if (
        q is None
        or v is None
        or weights is None
        or weights.producer() not in (softmax, *casts)
        or transpose is None
        or transpose.op_type != "Transpose"
        or tuple(transpose.attributes.get_ints("perm", [])) != TRANSPOSED
    ):
        return None
    types = {value.dtype for value in (q, v, after.outputs[0])}
    size = None if q.shape is None else q.shape[-1]
    if len(types) != 1 or not types <= set(LOW_PRECISION_TYPES.values()) or size not in HEAD_SIZES:
        return None
    source = transpose.inputs[0]
    assert source is not None
    return _Attention((before, *casts, softmax, after), q, source, factor, v)


def _behind(value: ir.Value | None) -> ir.Node | None:
    """The node that ``value`` comes from, where nothing else reads it."""
    alone = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
    return value.producer() if value is not None and alone else None


def _reader(node: ir.Node) -> ir.Node | None:
    """The node that reads a node's result, where it is the only one."""
    output = node.outputs[0]
    uses = list(output.uses())
    return uses[0].node if len(uses) == 1 and not output.is_graph_output() else None


def _fuse(graph: ir.Graph, attention: _Attention) -> None:
    editor, mix = Editor(graph), attention.mix
    name, output = str(attention.scores.name), mix.outputs[0]
    named = output.name
    k = editor.op("Transpose", [attention.k], f"{name}.k", perm=UNTRANSPOSED)
    if attention.factor is not None:
        k = editor.op("Mul", [k, attention.factor], f"{name}.scaled_k")
    operands = [attention.q, k, attention.v]
    fused = editor.op("Attention", operands, name, shape=output.shape, scale=1.0)
    editor.insert_before(mix)
    replace_value(output, fused)
    graph.remove(attention.nodes, safe=True)
    fused.name = named
