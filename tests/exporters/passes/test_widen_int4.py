from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.editor import array_of
from exporters.passes.widen_int4 import WidenInt4
from quest_deploy.artifacts.checkpoint import Checkpoint
from tests.helpers import assert_same, hand_feeds, op_counts, proto_of, run


def dequantizers(model: ir.Model) -> list[ir.Node]:
    """Those of weights."""
    return [
        node
        for node in model.graph
        if node.op_type == "DequantizeLinear" and (node.inputs[0].name or "").find(".weight") > 0
    ]  # type: ignore[union-attr]


@pytest.mark.parametrize("cast", [False, True])
def test_every_weight_is_read_as_8_bits_and_the_numbers_stay_the_same(
    hand_model: ir.Model, cast: bool
) -> None:
    feeds = hand_feeds([999.0, 0.0, 500.0])
    before = run(hand_model, feeds)
    assert WidenInt4(cast_at_runtime=cast)(hand_model).modified
    assert len(dequantizers(hand_model)) == 4
    for node in dequantizers(hand_model):
        assert {node.inputs[0].dtype, node.inputs[2].dtype} <= {ir.DataType.INT8, ir.DataType.UINT8}  # type: ignore[union-attr]
    assert_same(run(hand_model, feeds), before)
    onnx.checker.check_model(proto_of(hand_model), full_check=True)


def test_case_1_the_initializers_themselves_become_int8(
    hand: Checkpoint, hand_model: ir.Model
) -> None:
    WidenInt4(cast_at_runtime=False)(hand_model)
    assert not any(
        value.dtype is ir.DataType.INT4 for value in hand_model.graph.initializers.values()
    )
    codes = next(
        node.inputs[0]
        for node in dequantizers(hand_model)
        if node.outputs[0].name == "conv.weight_dequantized"
    )
    assert codes is not None
    np.testing.assert_array_equal(array_of(codes), hand.layers["conv"].weight_codes)
    assert op_counts(hand_model).get("Cast", 0) == 1  # the bucket's own


def test_case_2_the_initializers_stay_int4_and_a_cast_widens_them(hand_model: ir.Model) -> None:
    WidenInt4(cast_at_runtime=True)(hand_model)
    int4 = {
        name
        for name, value in hand_model.graph.initializers.items()
        if value.dtype is ir.DataType.INT4
    }
    assert int4 == {"conv.weight", "to_q.weight"}
    for name in int4:
        (cast,) = hand_model.graph.initializers[name].consumers()
        assert cast.op_type == "Cast"
        assert cast.outputs[0].dtype is ir.DataType.INT8


@pytest.mark.parametrize("cast", [False, True])
def test_a_second_run_changes_nothing(hand_model: ir.Model, cast: bool) -> None:
    WidenInt4(cast_at_runtime=cast)(hand_model)
    counts = op_counts(hand_model)
    assert not WidenInt4(cast_at_runtime=cast)(hand_model).modified
    assert op_counts(hand_model) == counts
