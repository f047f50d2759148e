from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from exporters.passes.expand_timestep_quantize import ExpandTimestepQuantize
from exporters.passes.freeze_bucket import FreezeBucket
from tests.helpers import (
    assert_same,
    float32,
    hand_checkpoint,
    hand_feeds,
    hand_graph,
    op_counts,
    proto_of,
    refused,
    run,
)

TIMESTEPS = ([30.0, 200.0, 0.0], [400.0, 499.0, 333.5], [999.0, 700.0, 800.0])


def expanded() -> ir.Model:
    model = hand_graph(hand_checkpoint(3))
    ExpandTimestepQuantize()(model)
    return model


@pytest.mark.parametrize("bucket", range(3))
def test_the_frozen_graph_equals_the_whole_one_within_its_bucket_and_ignores_the_timestep(
    bucket: int,
) -> None:
    whole, frozen = expanded(), expanded()
    assert FreezeBucket(bucket)(frozen).modified
    feeds = hand_feeds(TIMESTEPS[bucket])
    for other in range(3):
        moved = {**feeds, "timestep": float32(*TIMESTEPS[other])}
        for ours, own, theirs in zip(
            run(frozen, moved), run(whole, feeds), run(whole, moved), strict=True
        ):
            np.testing.assert_array_equal(ours, own)
            assert (other == bucket) == np.array_equal(own, theirs)
    onnx.checker.check_model(proto_of(frozen), full_check=True)


def test_nothing_that_an_output_needs_reads_the_bucket() -> None:
    model = expanded()
    FreezeBucket(1)(model)
    common.RemoveUnusedNodesPass()(model)
    assert "Gather" not in op_counts(model)
    assert "bucket" not in ir.convenience.create_value_mapping(model.graph)


def test_nothing_reads_the_bucket_after_the_pass_alone() -> None:
    model = expanded()
    FreezeBucket(1)(model)
    assert not list(ir.convenience.create_value_mapping(model.graph)["bucket"].uses())


def test_a_graph_whose_op_is_not_expanded_is_refused(hand_model: ir.Model) -> None:
    with refused("TimestepQuantize", error=ir.passes.PreconditionError):
        FreezeBucket(0)(hand_model)


def test_a_second_run_changes_nothing() -> None:
    model = expanded()
    FreezeBucket(1)(model)
    common.RemoveUnusedNodesPass()(model)
    feeds = hand_feeds(TIMESTEPS[0])
    before = run(model, feeds)
    if "bucket" in ir.convenience.create_value_mapping(model.graph):
        assert not FreezeBucket(2)(model).modified
    assert_same(run(model, feeds), before)


@pytest.mark.parametrize("bucket", [-1, 3])
def test_a_bucket_that_the_tables_do_not_have_is_refused(bucket: int) -> None:
    with pytest.raises(ir.passes.PreconditionError):
        FreezeBucket(bucket)(expanded())
