from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters import timestep_quantize
from exporters.lower import tensorrt
from exporters.passes.keep_timestep_quantize import KeepTimestepQuantize
from tests.helpers import float32, graph_from_text, hand_feeds, hand_graph, proto_of, run

if TYPE_CHECKING:
    from quest_deploy.checkpoint import Checkpoint

TABLES = {"scale": float32(0.1, 0.7), "low": float32(-3, -8), "high": float32(12, 7), "offset": float32(0, 0), "channel": float32(1, 2)}


def quantizers(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == timestep_quantize.DOMAIN]


def two_quantizers() -> ir.Model:
    text = """
    two (float[batch,2] x, int64[batch] bucket) => (int8[batch,2] first, int8[batch,2] second)
    {
      first = quest.TimestepQuantize <axis = 1> (x, bucket, s_scale, s_low, s_high, s_offset, s_channel)
      second = quest.TimestepQuantize <axis = 1> (x, bucket, s_scale, s_low, s_high, s_offset, s_channel)
    }
    """
    model = graph_from_text(text, **{f"s.{name}": table for name, table in TABLES.items()})
    model.graph.opset_imports.pop("quest.export")
    return model


def test_case_1_every_quantizer_names_the_plugin_that_computes_it_and_keeps_its_inputs_axis_and_codes() -> None:
    model = two_quantizers()
    before = [(list(node.inputs), node.outputs[0].name) for node in quantizers(model)]
    assert KeepTimestepQuantize()(model).modified
    assert [(list(node.inputs), node.outputs[0].name) for node in quantizers(model)] == before
    for node in quantizers(model):
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        assert attributes == {"axis": 1, "plugin_namespace": "quest", "plugin_version": "1"}


def test_case_2_no_function_of_ours_is_left_and_others_stay() -> None:
    model = two_quantizers()
    other = ir.Function("other", "Op", graph=ir.Graph([], [], nodes=[], opset_imports={"": 21}), attributes=[])
    model.functions[other.identifier()] = other
    KeepTimestepQuantize()(model)
    assert list(model.functions) == [other.identifier()]


def test_a_graph_without_the_op_is_not_modified() -> None:
    model = graph_from_text("g (float[2] x) => (float[2] y) { y = Abs(x) }")
    model.functions.clear()
    assert not KeepTimestepQuantize()(model).modified


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_lowered_for_the_plugin_a_graph_has_every_quantizer_int8_weights_and_nothing_else_of_ours(
    hand_model: ir.Model, dtype: str
) -> None:
    sites = [node.outputs[0].name for node in quantizers(hand_model)]
    lowered = tensorrt.lower(hand_model, dtype=dtype, quantize="plugin")
    assert [node.outputs[0].name for node in quantizers(lowered)] == sites
    assert not lowered.functions
    assert not [node for node in lowered.graph if node.op_type == "QuantizeLinear"]
    assert ir.DataType.INT4 not in [value.dtype for value in lowered.graph.initializers.values()]
    onnx.checker.check_model(proto_of(lowered))


def test_lowered_for_the_plugin_a_graph_computes_what_the_native_one_does(hand: Checkpoint) -> None:
    plugin = tensorrt.lower(hand_graph(hand), quantize="plugin")
    native = tensorrt.lower(hand_graph(hand), quantize="native")
    function = timestep_quantize.function_body()  # what stands in for the plugin here
    plugin.functions[function.identifier()] = function
    for node in quantizers(plugin):  # a function takes no other attributes than its own
        node.attributes.pop("plugin_namespace")
        node.attributes.pop("plugin_version")
    feeds = hand_feeds([999.0, 0.0, 500.0])
    for found, expected in zip(run(plugin, feeds), run(native, feeds), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_frozen_bucket_is_lowered_natively_since_there_is_nothing_to_pick(hand_model: ir.Model) -> None:
    lowered = tensorrt.lower(hand_model, frozen_bucket=1, quantize="plugin")
    assert not quantizers(lowered)
