from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.passes.expand_timestep_quantize import ExpandTimestepQuantize
from tests.helpers import (
    Array,
    float32,
    graph_from_text,
    numpy_codes,
    op_counts,
    proto_of,
    refused,
    run,
)

BUCKET = np.asarray([1, 0, 1])


def new_quantizer(
    shape: str = "batch,4,3",
    *,
    axis: int = 1,
    dtype: str = "float",
    low: tuple[float, float] = (-3, -8),
    channel: tuple[float, ...] = (0.5, 1, 2, 3),
    scale: tuple[float, float] = (0.1, 0.7),
    offset: tuple[float, float] = (0, 0),
) -> tuple[ir.Model, dict[str, Array]]:
    """A graph of one quantizer of the quantizer "s", and its tables."""
    tables = {
        "scale": float32(*scale),
        "low": float32(*low),
        "high": float32(*low) + 15,
        "offset": float32(*offset),
        "channel": float32(*channel),
    }
    text = f"""
    one ({dtype}[{shape}] x, int64[batch] bucket) => (int8[{shape}] codes)
    {{ codes = quest.TimestepQuantize <axis = {axis}> (x, bucket, s_scale, s_low, s_high, s_offset, s_channel) }}
    """
    model = graph_from_text(text, **{f"s.{name}": table for name, table in tables.items()})
    model.graph.outputs[0].name = "s.codes"
    model.graph.opset_imports.pop("quest.export")
    return model, tables


def values(shape: tuple[int, ...]) -> Array:
    return (np.random.default_rng(0).standard_normal(shape) * 3).astype(np.float32)


def expanded(model: ir.Model) -> ir.Model:
    assert ExpandTimestepQuantize()(model).modified
    return model


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 4), 1), ((3, 4, 3), 1), ((3, 3, 4), 2), ((3, 4, 2, 2), 1), ((3, 2, 2, 4), 3)],
)
def test_codes_stay_the_same_for_every_rank_and_axis_and_keep_their_name(
    shape: tuple[int, ...], axis: int
) -> None:
    model, tables = new_quantizer(",".join(["batch", *map(str, shape[1:])]), axis=axis)
    feeds = {"x": values(shape), "bucket": BUCKET}
    before = run(model, feeds)[0]
    after = expanded(model)
    assert [value.name for value in after.graph.outputs] == ["s.codes"]
    np.testing.assert_array_equal(run(after, feeds)[0], before)
    np.testing.assert_array_equal(before, numpy_codes(feeds["x"], BUCKET, axis=axis, **tables))


def test_no_node_function_or_import_of_our_domain_is_left_and_the_graph_is_valid() -> None:
    model = expanded(new_quantizer()[0])
    assert not any(node.domain for node in model.graph)
    assert not model.functions
    assert set(model.graph.opset_imports) == {""}
    onnx.checker.check_model(proto_of(model), full_check=True)


def test_case_1_tables_that_vary_are_gathered_by_each_samples_bucket() -> None:
    model = expanded(new_quantizer()[0])
    gathered = {
        node.inputs[0].name
        for node in model.graph
        if node.op_type == "Gather" and node.inputs[0] is not None
    }
    assert gathered == {"s.scale", "s.low", "s.high"}


def test_case_2_bounds_that_are_the_same_in_every_bucket_become_scalars() -> None:
    model, tables = new_quantizer(low=(-5, -5))
    expanded(model)
    gathered = {
        node.inputs[0].name
        for node in model.graph
        if node.op_type == "Gather" and node.inputs[0] is not None
    }
    assert gathered == {"s.scale"}
    feeds = {"x": values((3, 4, 3)), "bucket": BUCKET}
    np.testing.assert_array_equal(
        run(model, feeds)[0], numpy_codes(feeds["x"], BUCKET, axis=1, **tables)
    )


def test_case_2_a_scale_that_is_the_same_in_every_bucket_is_still_gathered() -> None:
    # A constant divisor becomes a multiplication by its reciprocal in OpenVINO, which moves ties.
    model = expanded(new_quantizer(scale=(0.3, 0.3))[0])
    assert any(
        node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].name == "s.scale"
        for node in model.graph
    )


def test_case_3_a_smoothing_scale_of_ones_is_left_out_and_any_other_is_multiplied() -> None:
    model, tables = new_quantizer(channel=(1, 1, 1, 1))
    expanded(model)
    assert "Mul" not in op_counts(model)
    feeds = {"x": values((3, 4, 3)), "bucket": BUCKET}
    np.testing.assert_array_equal(
        run(model, feeds)[0], numpy_codes(feeds["x"], BUCKET, axis=1, **tables)
    )
    assert op_counts(expanded(new_quantizer()[0]))["Mul"] == 1


def test_low_precision_input_is_computed_in_float32() -> None:
    model, tables = new_quantizer(dtype="float16")
    feeds = {"x": values((3, 4, 3)).astype(np.float16), "bucket": BUCKET}
    np.testing.assert_array_equal(
        run(expanded(model), feeds)[0], numpy_codes(feeds["x"], BUCKET, axis=1, **tables)
    )


def test_an_input_of_unknown_rank_is_refused() -> None:
    model, _ = new_quantizer()
    model.graph.inputs[0].shape = None
    with refused("rank", error=ir.passes.PreconditionError):
        ExpandTimestepQuantize()(model)


def test_a_graph_without_the_op_is_not_modified() -> None:
    model = graph_from_text("g (float[2] x) => (float[2] y) { y = Abs(x) }")
    assert not ExpandTimestepQuantize()(model).modified
    assert op_counts(model) == {"Abs": 1}
