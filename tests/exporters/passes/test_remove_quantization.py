from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.graph_info import SAMPLE_MULTIPLE_KEY, SAMPLE_SHAPE_KEY
from exporters.passes.remove_quantization import RemoveQuantization
from quest_deploy.artifacts.checkpoint import Checkpoint
from tests.helpers import (
    BRANCHED_TEXT,
    Array,
    along,
    branch_weight,
    branched_checkpoint,
    float32,
    float_layer,
    graph_from_text,
    hand_feeds,
    inserted,
    op_counts,
    proto_of,
    refused,
    relative_error,
    run,
)


@pytest.fixture
def float_model(hand_model: ir.Model) -> ir.Model:
    assert RemoveQuantization()(hand_model).modified
    return hand_model


def unquantized(checkpoint: Checkpoint, name: str, x: Array) -> Array:
    """The layer on the float input: the smoothing scale divides x, as its quantizer would have."""
    layer, quantizer = checkpoint.layers[name], checkpoint.quantizer_of(name)
    y = float_layer(layer, x / along(quantizer.channel.astype(np.float64), quantizer.axis, x.ndim))
    return (
        y if layer.bias is None else y + along(layer.bias, 1 if layer.conv else y.ndim - 1, y.ndim)
    )


def test_the_float_graph_computes_the_layers_on_unquantized_input(
    hand: Checkpoint, float_model: ir.Model
) -> None:
    feeds = hand_feeds([999.0, 0.0])
    image, first, second = run(float_model, feeds)
    inner = unquantized(hand, "conv", feeds["sample"].astype(np.float64))
    assert relative_error(image, unquantized(hand, "last", inner)) < 1e-5
    assert (
        relative_error(-first, unquantized(hand, "to_q", feeds["tokens"].astype(np.float64))) < 1e-5
    )
    assert (
        relative_error(second, unquantized(hand, "to_k", feeds["tokens"].astype(np.float64))) < 1e-5
    )


def test_no_quantizer_integer_scale_or_trace_of_ours_is_left(float_model: ir.Model) -> None:
    assert op_counts(float_model) == {"Conv": 2, "MatMul": 2, "Add": 1, "Neg": 1, "Identity": 1}
    assert {value.dtype for value in float_model.graph.initializers.values()} == {ir.DataType.FLOAT}
    assert not float_model.functions
    assert set(float_model.graph.opset_imports) == {""}
    assert set(float_model.metadata_props) == {SAMPLE_SHAPE_KEY, SAMPLE_MULTIPLE_KEY}
    onnx.checker.check_model(proto_of(float_model), full_check=True)


def test_inputs_and_outputs_keep_their_names(float_model: ir.Model) -> None:
    assert [value.name for value in float_model.graph.inputs] == ["sample", "timestep", "tokens"]
    assert [value.name for value in float_model.graph.outputs] == ["image", "first", "second"]


def test_case_1_a_convs_bias_becomes_its_third_input(float_model: ir.Model) -> None:
    assert [len(node.inputs) for node in float_model.graph if node.op_type == "Conv"] == [3, 2]


def test_case_2_a_linears_bias_stays_an_add_behind_the_matmul(float_model: ir.Model) -> None:
    (add,) = [node for node in float_model.graph if node.op_type == "Add"]
    product = add.inputs[0].producer() if add.inputs[0] is not None else None
    assert product is not None
    assert product.op_type == "MatMul"


SPLIT_TEXT = """
split (float[batch,2,6,6] a, float[batch,4,6,6] b, float[batch] timestep)
  => (float[batch,3,6,6] image, float[batch,6,6,6] normed)
  <float[batch,6,6,6] whole, float[batch,3,6,6] y0, float[batch,3,6,6] y1>
{
  CONCAT
  y0 = quest.export.Layer <layer = "conv_shortcut.first"> (a)
  y1 = quest.export.Layer <layer = "conv_shortcut.second"> (b)
  image = Add (y0, y1)
}
"""


@pytest.mark.parametrize(
    "concat",
    [
        "whole = Concat <axis = 1> (a, b) normed = Relu (whole)",
        "whole = Concat <axis = 1> (b, a) normed = Relu (whole)",
    ],
    ids=["what was split is there", "another concatenation is there"],
)
def test_case_3_the_halves_of_a_split_shortcut_are_one_conv_of_the_concatenation(
    hand: Checkpoint, concat: str
) -> None:
    rng = np.random.default_rng(0)
    halves = {}
    for half, like, channels in (("first", "conv", 2), ("second", "last", 4)):
        codes = rng.integers(-8, 8, (3, channels, 1, 1), dtype=np.int8)
        layer = dataclasses.replace(hand.layers["last"], name=f"conv_shortcut.{half}", codes=codes)
        quantizer = dataclasses.replace(
            hand.quantizers[like], name=layer.name, layers=(layer.name,)
        )
        halves[layer.name] = (layer, quantizer)
    first = halves["conv_shortcut.first"]
    halves["conv_shortcut.first"] = (
        dataclasses.replace(first[0], bias=rng.standard_normal(3).astype(np.float32)),
        first[1],
    )
    checkpoint = dataclasses.replace(
        hand,
        layers={n: layer for n, (layer, _) in halves.items()},
        quantizers={n: quantizer for n, (_, quantizer) in halves.items()},
    )
    model = inserted(SPLIT_TEXT.replace("CONCAT", concat), checkpoint)
    RemoveQuantization()(model)
    onnx.checker.check_model(proto_of(model), full_check=True)
    assert (op_counts(model)["Conv"], op_counts(model).get("Add")) == (1, None)
    assert op_counts(model)["Concat"] == (1 if "(a, b)" in concat else 2)
    a, b = (rng.standard_normal((2, channels, 6, 6)).astype(np.float32) for channels in (2, 4))
    image = run(model, {"a": a, "b": b, "timestep": float32(999.0, 0.0)})[0]
    expected = [
        unquantized(checkpoint, name, x.astype(np.float64))
        for name, x in zip(checkpoint.layers, (a, b), strict=True)
    ]
    assert relative_error(image, expected[0] + expected[1]) < 1e-5


def test_a_foreign_graph_is_an_input_error() -> None:
    with refused("quest-deploy export"):
        RemoveQuantization()(graph_from_text("g (float[2] x) => (float[2] y) { y = Abs(x) }"))


def test_case_4_a_layer_and_its_branch_are_one_layer_again() -> None:
    checkpoint, feeds = branched_checkpoint(), hand_feeds([999.0, 0.0])
    model = inserted(BRANCHED_TEXT, checkpoint)
    assert RemoveQuantization()(model).modified

    def both(name: str, x: Array) -> Array:
        layer = checkpoint.layers[f"{name}.residual"]
        branch = float_layer(layer, x, branch_weight(checkpoint, name))
        return unquantized(checkpoint, layer.name, x) + branch

    image, first, _ = run(model, feeds)
    inner = unquantized(checkpoint, "conv", feeds["sample"].astype(np.float64))
    assert relative_error(image, both("last", inner)) < 1e-5
    assert relative_error(first, both("to_q", feeds["tokens"].astype(np.float64))) < 1e-5
    assert op_counts(model) == {"Conv": 2, "MatMul": 2, "Add": 1, "Identity": 1}
    assert {value.dtype for value in model.graph.initializers.values()} == {ir.DataType.FLOAT}
    onnx.checker.check_model(proto_of(model), full_check=True)
