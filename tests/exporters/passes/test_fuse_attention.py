from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.passes.fuse_attention import FuseAttention, float_attentions
from tests.helpers import Array, Feeds, graph_from_text, op_counts, proto_of, relative_error, run
from tests.helpers import run_reference as run_by_the_specification

SCALED = "k = Mul (transposed, root)"
SOFTMAX = """
  wide = Cast <to = 1> (scores)
  soft = Softmax <axis = -1> (wide)
  weights = Cast <to = 10> (soft)
"""


def attention_graph(
    *,
    scale: str = SCALED,
    middle: str = SOFTMAX,
    size: int = 16,
    outputs: str = "",
    kind: str = "float16",
) -> ir.Model:
    """Attention over five queries and seven keys, two heads, as the exporter and ToLowPrecision
    leave it; with further ``outputs``.
    """
    model = graph_from_text(
        f"""
one ({kind}[batch,2,5,{size}] q, {kind}[batch,7,2,{size}] keys, {kind}[batch,2,7,{size}] v,
     {kind}[batch,2,5,7] mask)
  => ({kind}[batch,2,5,{size}] y{outputs})
  <{kind}[batch,2,5,{size}] scaled, {kind}[batch,2,{size},7] transposed, {kind}[batch,2,{size},7] k,
   {kind}[batch,2,5,7] scores, {kind}[batch,2,5,7] masked, float[batch,2,5,7] wide,
   float[batch,2,5,7] soft, {kind}[batch,2,5,7] weights>
{{
  scaled = Mul (q, root)
  transposed = Transpose <perm = [0, 2, 3, 1]> (keys)
  {scale}
  scores = MatMul (scaled, k)
  {middle}
  y = MatMul (weights, v)
}}""",
        root=np.asarray(size**-0.25, np.float16 if kind == "float16" else np.float32),
    )
    model.functions.clear()
    for domain in ("quest", "quest.export"):
        model.graph.opset_imports.pop(domain)
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    return model


def feeds(size: int = 16, dtype: type = np.float16) -> Feeds:
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 5), "keys": (7, 2), "v": (2, 7)}
    found = {name: rng.standard_normal((3, *sides, size)) for name, sides in shapes.items()}
    return {name: value.astype(dtype) for name, value in found.items()} | {
        "mask": rng.standard_normal((3, 2, 5, 7)).astype(dtype)
    }


def expected(given: Feeds) -> Array:
    """Attention in float64."""
    q, keys, v = (given[name].astype(np.float64) for name in ("q", "keys", "v"))
    scores = np.einsum("bhnd,bmhd->bhnm", q, keys) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ v


@pytest.mark.parametrize("evaluate", [run, run_by_the_specification])
def test_case_1_two_products_with_a_softmax_between_become_one_node_that_computes_the_same(
    evaluate: object,
) -> None:
    model = attention_graph()
    assert float_attentions(model) == {"node_y": "node_scores"}
    assert FuseAttention()(model).modified
    counts = op_counts(model)
    assert counts == {"Mul": 2, "Transpose": 1, "Attention": 1}
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    assert (node.name, node.outputs[0].name) == ("node_scores", "y")
    onnx.checker.check_model(proto_of(model), full_check=True)
    (found,) = evaluate(model, feeds())  # type: ignore[operator]
    assert relative_error(found, expected(feeds())) < 3e-3


@pytest.mark.parametrize("scale", ["k = Identity (transposed)", SCALED])
def test_keys_need_not_be_multiplied_but_by_one_number(scale: str) -> None:
    model = attention_graph(scale=scale)
    if "Identity" in scale:  # what an exporter never leaves
        (identity,) = (node for node in model.graph if node.op_type == "Identity")
        ir.convenience.replace_all_uses_with(identity.outputs[0], identity.inputs[0])
        model.graph.remove(identity, safe=True)
    (before,) = run(model, feeds())
    assert FuseAttention()(model).modified
    (after,) = run(model, feeds())
    assert relative_error(after, before) < 3e-3
    assert not FuseAttention()(attention_graph(scale="k = Mul (transposed, transposed)")).modified


@pytest.mark.parametrize(("size", "fused"), [(4, False), (15, False), (16, True), (256, True)])
def test_case_2_head_sizes_without_a_kernel_stay(size: int, fused: bool) -> None:
    assert FuseAttention()(attention_graph(size=size)).modified is fused
    assert not FuseAttention()(attention_graph(size=264)).modified


@pytest.mark.parametrize(
    "changed",
    [
        {"middle": "masked = Add (scores, mask) " + SOFTMAX.replace("(scores)", "(masked)")},
        {"middle": SOFTMAX.replace("axis = -1", "axis = 2")},
        {"outputs": ", float16[batch,2,5,7] scores"},
        {"outputs": ", float[batch,2,5,7] soft"},
        {"outputs": ", float16[batch,2,5,7] weights"},
        {"kind": "float", "middle": "weights = Softmax <axis = -1> (scores)"},
    ],
    ids=["mask", "axis", "scores are read", "softmax is read", "weights are read", "FP32"],
)
def test_case_3_all_else_stays(changed: dict[str, str]) -> None:
    model = attention_graph(**changed)  # type: ignore[arg-type]
    before = op_counts(model)
    assert float_attentions(model) == {}
    assert not FuseAttention()(model).modified
    assert op_counts(model) == before
