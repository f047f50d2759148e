from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.graph_info import graph_info
from exporters.lowering import onnxruntime, openvino
from exporters.multiplications import Multiplication, multiplications
from exporters.passes.insert_quantized_layers import product_name
from quest_deploy.backends.base import input_shapes
from tests.helpers import graph_from_text

TEXT = """
g (float[batch,4,6,6] x, float[batch,2,3,5] a, float[batch,2,5,n] b)
  => (float[batch,8,h,w] y, float[batch,2,3,n] s, float[batch,2,3,7] t)
{
  wide = Cast <to = 1> (w)
  y = Conv <kernel_shape = [3, 3], group = 2, strides = [2, 2]> (x, wide)
  s = MatMul(a, b)
  scaled = Mul(a, a)
  t = MatMul(scaled, m)
}
"""


def of_text() -> list[Multiplication]:
    model = graph_from_text(TEXT, w=np.ones((8, 2, 3, 3), np.int8), m=np.ones((5, 7), np.float32))
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    return multiplications(model, {"x": (9, 4, 6, 6), "a": (9, 2, 3, 5), "b": (9, 2, 5, 11)})


def test_multiply_adds_are_those_of_one_sample_for_convolutions_and_products() -> None:
    conv, activations, linear = of_text()
    assert conv.macs == 8 * 2 * 2 * (2 * 3 * 3)
    assert activations.macs == 2 * 3 * 11 * 5
    assert linear.macs == 2 * 3 * 7 * 5


def test_weights_are_found_behind_what_widens_them_and_a_product_of_activations_has_none() -> None:
    conv, activations, linear = of_text()
    assert (conv.weights, activations.weights, linear.weights) == (8 * 2 * 3 * 3, 0, 35)
    assert conv.weight_names == {"w", "wide", "node_wide"}


def test_operands_are_followed_along_first_inputs() -> None:
    _, _, linear = of_text()
    assert linear.operands == (("node_scaled", "scaled", "a"), ("m",))


def test_in_lowered_unets_the_layers_multiply_adds_are_the_checkpoints(
    small_graph: ir.Model,
) -> None:
    for lower in (onnxruntime.lower, openvino.lower):
        lowered = lower(small_graph.clone())
        info = graph_info(lowered)
        found = {node.node: node for node in multiplications(lowered, input_shapes(lowered, 1))}
        others = set(found)
        for layer in info.layers.values():
            parts = {
                name
                for name in found
                if name == product_name(layer.name)
                or name.startswith(f"{product_name(layer.name)}.")
            }
            assert sum(found[name].macs or 0 for name in parts) == layer.macs, layer.name
            others -= parts
        assert len(others) == 12  # six attentions in float
        assert all(found[name].macs for name in others)


def test_products_behind_sizes_that_are_computed_by_division_are_counted() -> None:
    model = graph_from_text("""
        g (float[batch,4,height,width] x) => (float[batch,tokens,tokens] scores)
        <int64[1] one = {1}, int64[1] two = {2}, int64[1] channels = {4}, int64[1] rest = {-1}>
        {
          rows = Shape <start = 2, end = 3> (x)
          less = Sub(rows, one)
          half = Div(less, two)
          tokens = Mul(half, rest)
          positive = Mul(tokens, rest)
          batch = Shape <end = 1> (x)
          target = Concat <axis = 0> (batch, positive, rest, channels)
          again = Reshape(x, target)
          right = Transpose <perm = [0, 1, 3, 2]> (again)
          scores4 = MatMul(again, right)
          scores = Squeeze(scores4, one)
        }
    """)
    (product,) = multiplications(model, {"x": (1, 4, 5, 6)})
    assert product.macs == 2 * 15 * 15 * 4


def test_every_product_of_an_exported_unet_is_counted(small_graph: ir.Model) -> None:
    for model in (small_graph, openvino.lower(small_graph.clone())):
        uncounted = [
            node.node for node in multiplications(model, input_shapes(model, 1)) if not node.macs
        ]
        assert uncounted == []
