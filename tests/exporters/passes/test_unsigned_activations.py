from __future__ import annotations

import onnx
import onnx_ir as ir

from exporters.editor import array_of
from exporters.passes.expand_timestep_quantize import ExpandTimestepQuantize
from exporters.passes.unsigned_activations import UnsignedActivations
from tests.helpers import (
    assert_same,
    hand_feeds,
    kinds_checkpoint,
    kinds_feeds,
    kinds_graph,
    lowering_begins_with,
    proto_of,
    run,
)


def types_of_codes(model: ir.Model) -> dict[str, tuple[ir.DataType | None, set[int]]]:
    """By quantizer: its codes' type, and the zero-points that they are dequantized with."""
    values = ir.convenience.create_value_mapping(model.graph)
    return {
        name.removesuffix(".codes"): (
            value.dtype,
            {int(array_of(node.inputs[2])) for node, _ in value.uses()},
        )  # type: ignore[arg-type]
        for name, value in values.items()
        if name.endswith(".codes") and value.dtype in (ir.DataType.INT8, ir.DataType.UINT8)
    }


def test_case_1_what_a_layer_reads_and_first_operands_are_unsigned_and_the_numbers_stay(
    hand_model: ir.Model,
) -> None:
    ExpandTimestepQuantize()(hand_model)
    feeds = hand_feeds([999.0, 0.0, 500.0])
    before = run(hand_model, feeds)
    assert UnsignedActivations()(hand_model).modified
    assert types_of_codes(hand_model) == dict.fromkeys(
        ("conv", "last", "to_q"), (ir.DataType.UINT8, {128})
    )
    onnx.checker.check_model(proto_of(hand_model), full_check=True)
    assert_same(run(hand_model, feeds), before)


def test_case_2_a_products_second_operand_stays_int8() -> None:
    model, feeds = lowering_begins_with(kinds_graph(kinds_checkpoint())), kinds_feeds([999.0, 0.0])
    ExpandTimestepQuantize()(model)
    before = run(model, feeds)
    UnsignedActivations()(model)
    found = types_of_codes(model)
    assert {name for name, (dtype, _) in found.items() if dtype is ir.DataType.INT8} == {
        "attn.k",
        "attn.v",
        "half.v",
    }
    assert {name for name, (dtype, _) in found.items() if dtype is ir.DataType.UINT8} == {
        "padded",
        "plain",
        "attn.q",
        "attn.softmax",
    }
    assert_same(run(model, feeds), before)


def test_a_second_run_changes_nothing(hand_model: ir.Model) -> None:
    ExpandTimestepQuantize()(hand_model)
    UnsignedActivations()(hand_model)
    assert not UnsignedActivations()(hand_model).modified
