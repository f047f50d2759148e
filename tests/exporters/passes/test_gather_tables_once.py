from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from exporters.passes.expand_timestep_quantize import ExpandTimestepQuantize
from exporters.passes.gather_tables_once import GatherTablesOnce
from tests.helpers import assert_same, graph_from_text, hand_feeds, op_counts, proto_of, run


def test_the_numbers_stay_exactly_the_same_for_a_batch_that_mixes_buckets(
    hand_model: ir.Model,
) -> None:
    ExpandTimestepQuantize()(hand_model)
    feeds = hand_feeds([999.0, 0.0, 500.0, 3.0])
    before = run(hand_model, feeds)
    assert GatherTablesOnce()(hand_model).modified
    assert_same(run(hand_model, feeds), before)
    onnx.checker.check_model(proto_of(hand_model), full_check=True)


def test_each_rank_has_one_gather_and_one_split_and_no_unsqueeze_of_a_table_is_left(
    hand_model: ir.Model,
) -> None:
    ExpandTimestepQuantize()(hand_model)
    GatherTablesOnce()(hand_model)
    counts = op_counts(hand_model)
    assert (counts["Gather"], counts["Split"]) == (2, 2)  # ranks 3 and 4
    assert counts["Unsqueeze"] == 1  # the timesteps' own


TABLES = {
    name: np.random.default_rng(i).random(5).astype(np.float32) for i, name in enumerate("abc")
}
TEXT = """
g (int64[batch] start) => (float[batch,1] a2, float[batch,1] b2, float[batch,1,1] c3)
<int64[1] one = {1}, int64[2] two = {1, 2}, int64 zero = {0}>
{
  bucket = Add(start, zero)
  ga = Gather(a, bucket)
  gb = Gather(b, bucket)
  gc = Gather(c, bucket)
  a2 = Unsqueeze(ga, one)
  b2 = Unsqueeze(gb, one)
  c3 = Unsqueeze(gc, two)
}
"""


def test_all_tables_of_a_rank_are_split_into_their_own_values() -> None:
    model, bucket = graph_from_text(TEXT, **TABLES), np.asarray([4, 0, 2, 2])
    GatherTablesOnce()(model)
    assert op_counts(model) == {"Add": 1, "Gather": 2, "Split": 2}
    for found, name in zip(run(model, {"start": bucket}), "abc", strict=True):
        np.testing.assert_array_equal(found.reshape(-1), TABLES[name][bucket])


def test_one_gather_may_be_unsqueezed_to_two_ranks() -> None:
    model, bucket = (
        graph_from_text(TEXT.replace("(gc, two)", "(ga, two)"), **TABLES),
        np.asarray([3, 1]),
    )
    GatherTablesOnce()(model)
    for found, name in zip(run(model, {"start": bucket}), "aba", strict=True):
        np.testing.assert_array_equal(found.reshape(-1), TABLES[name][bucket])


def test_a_graph_whose_tables_are_gathered_already_is_not_modified(hand_model: ir.Model) -> None:
    ExpandTimestepQuantize()(hand_model)
    GatherTablesOnce()(hand_model)
    counts = op_counts(hand_model)
    assert not GatherTablesOnce()(hand_model).modified
    assert op_counts(hand_model) == counts


def test_tables_of_different_types_are_kept_apart() -> None:
    text = TEXT.replace("float[batch,1] b2", "float16[batch,1] b2")
    tables = TABLES | {"b": TABLES["b"].astype(np.float16)}
    model, bucket = graph_from_text(text, **tables), np.asarray([4, 0, 2, 2])
    GatherTablesOnce()(model)
    assert op_counts(model) == {"Add": 1, "Gather": 3, "Split": 3}
    onnx.checker.check_model(proto_of(model), full_check=True)
    for found, name in zip(run(model, {"start": bucket}), "abc", strict=True):
        assert found.dtype == tables[name].dtype
        np.testing.assert_array_equal(found.reshape(-1), tables[name][bucket])
