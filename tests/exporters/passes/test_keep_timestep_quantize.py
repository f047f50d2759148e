from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.editor import array_of
from exporters.graph_info import graph_info
from exporters.lowering import tensorrt
from exporters.ops import timestep_quantize
from exporters.passes.keep_timestep_quantize import KeepTimestepQuantize
from quest_deploy.artifacts.checkpoint import Checkpoint
from tests.helpers import (
    assert_same,
    hand_feeds,
    hand_graph,
    kinds_checkpoint,
    kinds_feeds,
    kinds_graph,
    proto_of,
    run,
)


def quantizer_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == timestep_quantize.DOMAIN]


def kept(model: ir.Model) -> list[ir.Node]:
    assert KeepTimestepQuantize()(model).modified
    return [node for node in quantizer_nodes(model) if "plugin_namespace" in node.attributes]


def with_function_instead_of_plugin(model: ir.Model) -> ir.Model:
    function = timestep_quantize.function_body()
    model.functions[function.identifier()] = function
    for node in quantizer_nodes(model):  # a function takes no other attributes than its own
        node.attributes.pop("plugin_namespace")
        node.attributes.pop("plugin_version")
    return model


def test_case_1_a_quantizer_names_the_plugin_that_computes_it_and_keeps_its_inputs_axis_and_codes(
    hand_model: ir.Model,
) -> None:
    before = [
        (list(node.inputs), node.outputs[0].name, node.attributes["axis"].value)
        for node in quantizer_nodes(hand_model)
    ]
    nodes = kept(hand_model)
    assert [
        (list(node.inputs), node.outputs[0].name, node.attributes["axis"].value) for node in nodes
    ] == before
    for node in nodes:
        named = {
            name: attribute.value for name, attribute in node.attributes.items() if name != "axis"
        }
        assert named == {"plugin_namespace": "quest", "plugin_version": "1"}


def test_case_2_operands_of_attentions_products_are_left_to_be_expanded() -> None:
    model = kinds_graph(kinds_checkpoint())
    products = graph_info(model).matmuls.values()
    operands = {
        quantizer for product in products for quantizer in product.sites if quantizer is not None
    }
    assert "attn.softmax" in operands
    quantizers = {
        str(node.outputs[0].name).removesuffix(".codes") for node in quantizer_nodes(model)
    }
    assert {
        str(node.outputs[0].name).removesuffix(".codes") for node in kept(model)
    } == quantizers - operands


def test_case_3_a_smoothing_scale_of_equal_numbers_becomes_one_number_and_any_other_stays(
    hand: Checkpoint,
) -> None:
    hand.quantizers["conv"].channel[:] = 0.5
    channels = {
        str(node.outputs[0].name): array_of(node.inputs[-1])
        for node in kept(hand_graph(hand))
        if node.inputs[-1] is not None
    }
    np.testing.assert_array_equal(channels["conv.codes"], np.float32([0.5]))
    np.testing.assert_array_equal(channels["last.codes"], hand.quantizers["last"].channel)


def test_case_4_no_function_of_ours_is_left_and_others_stay(hand_model: ir.Model) -> None:
    other = ir.Function(
        "other", "Op", graph=ir.Graph([], [], nodes=[], opset_imports={"": 21}), attributes=[]
    )
    hand_model.functions[other.identifier()] = other
    KeepTimestepQuantize()(hand_model)
    assert list(hand_model.functions) == [other.identifier()]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_lowered_for_the_plugin_a_graph_has_every_layers_quantizer_and_int8_weights(
    hand_model: ir.Model, dtype: str
) -> None:
    codes = [node.outputs[0].name for node in quantizer_nodes(hand_model)]
    lowered = tensorrt.lower(hand_model, dtype=dtype, quantize="plugin")
    assert [node.outputs[0].name for node in quantizer_nodes(lowered)] == codes
    assert not lowered.functions
    assert not [node for node in lowered.graph if node.op_type == "QuantizeLinear"]
    assert ir.DataType.INT4 not in [value.dtype for value in lowered.graph.initializers.values()]
    onnx.checker.check_model(proto_of(lowered))


def test_lowered_for_the_plugin_graphs_compute_what_the_native_ones_do(hand: Checkpoint) -> None:
    hand.quantizers["conv"].channel[:] = 0.5
    kinds, timesteps = kinds_checkpoint(), [999.0, 0.0, 500.0]
    for graph, checkpoint, feeds in (
        (hand_graph, hand, hand_feeds(timesteps)),
        (kinds_graph, kinds, kinds_feeds(timesteps)),
    ):
        plugin = tensorrt.lower(graph(checkpoint), quantize="plugin")
        assert quantizer_nodes(plugin)
        native = tensorrt.lower(graph(checkpoint), quantize="native")
        assert_same(run(with_function_instead_of_plugin(plugin), feeds), run(native, feeds))


def test_a_frozen_bucket_is_lowered_natively_since_there_is_nothing_to_pick(
    hand_model: ir.Model,
) -> None:
    assert not quantizer_nodes(tensorrt.lower(hand_model, frozen_bucket=1, quantize="plugin"))
