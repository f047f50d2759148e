from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.editor import array_of
from exporters.graph_info import graph_info
from exporters.lowering import tensorrt
from exporters.ops import timestep_quantize
from exporters.passes.cut import cut_codes
from exporters.passes.gather_quantize_scale import GatherQuantizeScale
from quest_deploy.artifacts.checkpoint import Checkpoint
from tests.helpers import (
    Array,
    Feeds,
    hand_feeds,
    hand_graph,
    kinds_checkpoint,
    kinds_feeds,
    kinds_graph,
    op_counts,
    proto_of,
    quantizer_codes,
    relative_error,
    run,
    run_reference,
)

ONE_BUCKET = {0: [0.0, 100.0, 499.0], 1: [500.0, 999.0, 700.0]}
MIXED = [999.0, 0.0, 500.0]
EVALUATORS = {"onnxruntime": run, "the specification's": run_reference}


def quantizer_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == timestep_quantize.DOMAIN]


def gathered(model: ir.Model) -> dict[str, ir.Node]:
    """The QuantizeLinear of each quantizer that the pass has written."""
    before = {str(node.outputs[0].name) for node in quantizer_nodes(model)}
    assert GatherQuantizeScale()(model).modified
    return {
        str(node.outputs[0].name).removesuffix(".codes"): node
        for node in model.graph
        if node.op_type == "QuantizeLinear" and node.outputs[0].name in before
    }


def edges(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Array:
    """Values beside and on ties, beyond the bounds and at both ends of float32, for a quantizer."""
    quantizer = checkpoint.quantizers[name]
    rng = np.random.default_rng(0)
    halves = rng.integers(-300, 301, shape) / 2
    step = quantizer.scale[rng.integers(0, len(quantizer.scale), shape)]  # type: ignore[union-attr]
    ties = (halves * step).astype(np.float32)
    beside = np.nextafter(ties, rng.choice([-np.inf, np.inf], shape).astype(np.float32))
    return np.where(rng.random(shape) < 0.5, ties, beside).astype(np.float32)


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("bucket", ONE_BUCKET)
def test_a_batch_of_one_bucket_gets_the_very_codes_that_the_definition_gives(
    bucket: int, evaluator: str, hand: Checkpoint
) -> None:
    shapes = {"conv": (3, 2, 6, 6), "last": (3, 4, 3, 4), "to_q": (3, 3, 5)}
    model = hand_graph(hand)
    GatherQuantizeScale()(model)
    info, buckets = graph_info(model), np.full(3, bucket)
    for name, quantizer in info.quantizers.items():
        for x in (
            edges(hand, name, shapes[name]),
            np.random.default_rng(1).standard_normal(shapes[name]).astype(np.float32) * 9,
            np.full(shapes[name], 1e30, np.float32),
            np.full(shapes[name], -1e30, np.float32),
        ):
            feeds: Feeds = {quantizer.input: x, "bucket": buckets}
            (codes,) = EVALUATORS[evaluator](cut_codes(model, info, name), feeds)
            expected = quantizer_codes(hand.quantizers[name], x, buckets)
            np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("timesteps", ONE_BUCKET.values())
def test_a_lowered_graph_of_every_kind_computes_what_the_portable_one_does(
    timesteps: list[float],
) -> None:
    checkpoint = kinds_checkpoint()
    feeds = kinds_feeds([*timesteps, timesteps[0]])
    expected = run(kinds_graph(checkpoint), feeds)
    lowered = tensorrt.lower(kinds_graph(checkpoint), quantize="gathered")
    assert not any(node.domain for node in lowered.graph)
    onnx.checker.check_model(proto_of(lowered), full_check=True)
    for found, known in zip(run(lowered, feeds), expected, strict=True):
        assert relative_error(found, known) < 1e-6


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_rows_of_another_bucket_than_the_first_are_not_numbers_and_the_others_are_right(
    dtype: str, hand: Checkpoint
) -> None:
    feeds = hand_feeds(MIXED)  # buckets 1, 0 and 1
    expected = run(tensorrt.lower(hand_graph(hand), dtype=dtype), feeds)
    lowered = tensorrt.lower(hand_graph(hand), dtype=dtype, quantize="gathered")
    names = [value.name for value in lowered.graph.outputs]
    assert names == [value.name for value in hand_graph(hand).graph.outputs]
    for found, known in zip(run(lowered, feeds), expected, strict=True):
        assert np.isnan(found[1]).all()
        np.testing.assert_array_equal(found[[0, 2]], known[[0, 2]])


def test_case_1_a_smoothing_scale_is_a_number_a_channel_along_the_quantizers_axis_and_ones_none(
    hand: Checkpoint,
) -> None:
    for node in gathered(hand_graph(hand)).values():
        x, scale, zero = node.inputs
        axis = node.attributes["axis"].as_int()
        assert list(scale.shape) == list(zero.shape) == [x.shape[axis]]
    for quantizer in hand.quantizers.values():
        quantizer.channel[:] = 1  # type: ignore[union-attr]
    model = hand_graph(hand)
    for node in gathered(model).values():
        assert list(node.inputs[1].shape) == list(node.inputs[2].shape) == []
        assert node.inputs[1].producer().op_type == "Gather"


def test_case_2_a_low_precision_input_is_cast_before_it_is_quantized(hand: Checkpoint) -> None:
    lowered = tensorrt.lower(hand_graph(hand), dtype="fp16", quantize="gathered")
    quantizers = [node for node in lowered.graph if node.op_type == "QuantizeLinear"]
    assert {node.inputs[0].dtype for node in quantizers} == {ir.DataType.FLOAT}
    assert {node.inputs[1].dtype for node in quantizers} == {ir.DataType.FLOAT}


def test_case_3_all_bounds_stay_those_of_int8_too(hand: Checkpoint) -> None:
    hand.quantizers["last"].low[:] = -128  # type: ignore[union-attr]
    model = hand_graph(hand)
    for node in gathered(model).values():
        upper = node.inputs[0].producer()
        assert (upper.op_type, upper.inputs[0].producer().op_type) == ("Min", "Max")


def test_case_4_a_quantizer_whose_codes_are_offset_is_left_to_be_expanded() -> None:
    model = kinds_graph(kinds_checkpoint())
    offset = {
        str(node.outputs[0].name).removesuffix(".codes")
        for node in quantizer_nodes(model)
        if array_of(node.inputs[5]).any()
    }
    names = gathered(model).keys()
    assert offset
    assert names
    assert {
        str(node.outputs[0].name).removesuffix(".codes") for node in quantizer_nodes(model)
    } == offset
    assert not names & offset


def test_frozen_to_one_bucket_it_is_the_native_graph(hand: Checkpoint) -> None:
    feeds = hand_feeds(ONE_BUCKET[1])
    native, frozen = (
        tensorrt.lower(hand_graph(hand), quantize=quantize, frozen_bucket=1)  # type: ignore[arg-type]
        for quantize in ("native", "gathered")
    )
    assert op_counts(native) == op_counts(frozen)
    for found, known in zip(run(frozen, feeds), run(native, feeds), strict=True):
        np.testing.assert_array_equal(found, known)


def test_a_graph_without_quantizers_stays_as_it_is(hand: Checkpoint) -> None:
    model = tensorrt.lower(hand_graph(hand))
    before = op_counts(model)
    assert not GatherQuantizeScale()(model).modified
    assert op_counts(model) == before


def test_bounds_that_are_no_integers_are_refused(hand: Checkpoint) -> None:
    model = hand_graph(hand)
    low = quantizer_nodes(model)[0].inputs[3]
    low.const_value = ir.tensor(array_of(low) + np.float32(0.5), name=low.name)
    with pytest.raises(ir.passes.PreconditionError, match=str(quantizer_nodes(model)[0].name)):
        GatherQuantizeScale()(model)
