from __future__ import annotations

import onnx
import onnx_ir as ir

from exporters.graph_info import graph_info
from exporters.passes.dequantize_casts import DequantizeCasts
from exporters.passes.insert_quantized_layers import product_name
from tests.helpers import (
    assert_same,
    hand_feeds,
    kinds_checkpoint,
    kinds_expected,
    kinds_feeds,
    kinds_graph,
    proto_of,
    relative_error,
    run,
)

TIMESTEPS = [999.0, 0.0, 500.0, 499.0]


def second_operands(model: ir.Model) -> dict[str, str]:
    """By layer or product, the operator that its second operand comes from."""
    info = graph_info(model)
    nodes = {node.name: node for node in model.graph}
    return {
        name: nodes[product_name(name)].inputs[1].producer().op_type
        for name in (*info.layers, *info.matmuls)
    }  # type: ignore[union-attr]


def test_every_weight_and_every_quantized_operand_comes_from_a_dequantizer_and_the_numbers_stay() -> (
    None
):
    checkpoint, feeds = kinds_checkpoint(), kinds_feeds(TIMESTEPS)
    model = kinds_graph(checkpoint)
    assert {"Cast", "Sub"} <= set(second_operands(model).values())
    assert DequantizeCasts()(model).modified
    assert set(second_operands(model).values()) == {"DequantizeLinear"}
    onnx.checker.check_model(proto_of(model), full_check=True)
    names, expected = (
        [value.name for value in model.graph.outputs],
        kinds_expected(checkpoint, feeds),
    )
    for name, found in zip(names, run(model, feeds), strict=True):
        assert relative_error(found, expected[str(name)]) < 5e-6, name


def test_the_metadata_still_names_what_it_named() -> None:
    model = kinds_graph(kinds_checkpoint())
    DequantizeCasts()(model)
    info, values = graph_info(model), ir.convenience.create_value_mapping(model.graph)
    for entry in (*info.layers.values(), *info.matmuls.values()):
        assert entry.output in values, entry.name
    for quantizer in info.quantizers.values():
        assert {quantizer.input, quantizer.codes} <= set(values), quantizer.name


def test_a_graph_without_casts_and_a_second_run_stay_as_they_are(hand_model: ir.Model) -> None:
    feeds = hand_feeds(TIMESTEPS)
    before = run(hand_model, feeds)
    assert not DequantizeCasts()(hand_model).modified
    assert_same(run(hand_model, feeds), before)
    model = kinds_graph(kinds_checkpoint())
    DequantizeCasts()(model)
    assert not DequantizeCasts()(model).modified
