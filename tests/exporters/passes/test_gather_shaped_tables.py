from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.passes.expand_timestep_quantize import ExpandTimestepQuantize
from exporters.passes.freeze_bucket import FreezeBucket
from exporters.passes.gather_shaped_tables import GatherShapedTables
from exporters.passes.gather_tables_once import GatherTablesOnce
from tests.helpers import assert_same, graph_from_text, hand_feeds, op_counts, proto_of, run

TABLES = {
    name: np.random.default_rng(i).random(5).astype(np.float32) for i, name in enumerate("ab")
}
TEXT = """
g (int64[batch] start) => (float[batch,1] out2, float[batch,1] again2, float[batch,1,1] out3, float[batch] b1)
<int64[1] one = {1}, int64[2] two = {1, 2}, int64 zero = {0}>
{
  bucket = Add(start, zero)
  ga = Gather(a, bucket)
  b1 = Gather(b, bucket)
  a2 = Unsqueeze(ga, one)
  again = Unsqueeze(ga, one)
  a3 = Unsqueeze(ga, two)
  out2 = Neg(a2)
  again2 = Abs(again)
  out3 = Abs(a3)
}
"""


def test_a_table_is_gathered_once_for_each_rank_that_reads_it() -> None:
    model, bucket = graph_from_text(TEXT, **TABLES), np.asarray([4, 0, 2])
    assert GatherShapedTables()(model).modified
    assert op_counts(model) == {
        "Add": 1,
        "Gather": 3,
        "Neg": 1,
        "Abs": 2,
    }  # a at two ranks, and b, which nobody shapes
    onnx.checker.check_model(proto_of(model), full_check=True)
    for found, name, rank in zip(run(model, {"start": bucket}), "aaab", (2, 2, 3, 1), strict=True):
        assert found.ndim == rank
        np.testing.assert_array_equal(np.abs(found).reshape(-1), TABLES[name][bucket])


def test_the_numbers_stay_exactly_the_same_and_nothing_is_left_to_gather_at_once(
    hand_model: ir.Model,
) -> None:
    ExpandTimestepQuantize()(hand_model)
    feeds = hand_feeds([999.0, 0.0, 500.0, 3.0])
    before = run(hand_model, feeds)
    assert GatherShapedTables()(hand_model).modified
    assert_same(run(hand_model, feeds), before)
    assert op_counts(hand_model)["Unsqueeze"] == 1  # the timesteps' own
    assert not GatherTablesOnce()(hand_model).modified
    assert not GatherShapedTables()(hand_model).modified


@pytest.mark.parametrize("bucket", [0, 1])
def test_a_bucket_can_still_be_frozen(hand_model: ir.Model, bucket: int) -> None:
    ExpandTimestepQuantize()(hand_model)
    straight = hand_model.clone()
    GatherShapedTables()(hand_model)
    for model in (straight, hand_model):
        assert FreezeBucket(bucket)(model).modified
    assert "Gather" not in op_counts(hand_model)
    feeds = hand_feeds([999.0, 0.0])
    assert_same(run(hand_model, feeds), run(straight, feeds))
