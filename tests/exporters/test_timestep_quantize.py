"""The op's function body, run by two independent runtimes, against numpy: code for code."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from exporters.ops import timestep_quantize
from tests.helpers import Array, Feeds, float32, graph_from_text, numpy_codes, proto_of, session

RUNTIMES = ("reference", "onnxruntime", "onnxruntime optimized")
RANKS_AND_AXES = ((2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3))
DTYPES = (np.float32, np.float16)


@functools.cache
def op_model(axis: int, dtype: type) -> onnx.ModelProto:
    """A graph of one TimestepQuantize, all seven operands its inputs, x of unknown rank."""
    types = [ir.DataType.from_numpy(np.dtype(dtype)), ir.DataType.INT64, *[ir.DataType.FLOAT] * 5]
    inputs = [
        ir.Value(name=n, type=ir.TensorType(t))
        for n, t in zip(timestep_quantize.INPUTS, types, strict=True)
    ]
    codes = ir.Value(name="codes", type=ir.TensorType(ir.DataType.INT8))
    node = ir.Node(
        "quest", "TimestepQuantize", inputs, [ir.AttrInt64("axis", axis)], outputs=[codes]
    )
    graph = ir.Graph(
        inputs,
        [codes],
        nodes=[node],
        opset_imports={"": timestep_quantize.OPSET, "quest": 1},
        name="op",
    )
    function = timestep_quantize.function_body()
    return proto_of(ir.Model(graph, ir_version=10, functions=[function]))


@functools.cache
def runner(runtime: str, axis: int, dtype: type) -> Callable[[Feeds], list[Array]]:
    if runtime == "reference":
        evaluator = ReferenceEvaluator(op_model(axis, dtype))
        return lambda feeds: list(evaluator.run(None, feeds))
    return session(op_model(axis, dtype), optimized=runtime.endswith("optimized"))


def tables(rng: np.random.Generator, buckets: int, channels: int, *, bits: int) -> Feeds:
    low = -rng.integers(0, 16, buckets) if bits == 4 else np.full(buckets, -127)
    high = low + (15 if bits == 4 else 254)
    return {
        "scale": rng.uniform(0.01, 0.5, buckets).astype(np.float32),
        "low": low.astype(np.float32),
        "high": high.astype(np.float32),
        "offset": rng.integers(-1, 2, buckets).astype(np.float32) * (bits == 4),
        "channel": rng.uniform(0.2, 3.0, channels).astype(np.float32),
    }


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("rank", "axis"), RANKS_AND_AXES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_codes_equal_numpys_code_for_code(
    runtime: str, rank: int, axis: int, dtype: type, data: st.DataObject
) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 5)] * rank))
    buckets, bits = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([4, 8]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = (rng.standard_normal(shape) * 4).astype(dtype)
    operands = tables(rng, buckets, shape[axis], bits=bits)
    bucket = rng.integers(0, buckets, shape[0])
    (found,) = runner(runtime, axis, dtype)({"x": x, "bucket": bucket, **operands})
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, numpy_codes(x, bucket, axis=axis, **operands))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(power=st.integers(-6, 3), seed=st.integers(0, 2**32 - 1))
def test_a_tie_goes_to_the_even_code(runtime: str, dtype: type, power: int, seed: int) -> None:
    halves = np.random.default_rng(seed).integers(-9, 9, (2, 4)) + 0.5
    operands = {
        "scale": [2.0**power],
        "low": [-15.0],
        "high": [15.0],
        "offset": [0.0],
        "channel": [1.0, 2.0, 0.5, 1.0],
    }
    feeds = {name: np.asarray(value, np.float32) for name, value in operands.items()}
    x = (halves * feeds["scale"] * feeds["channel"]).astype(dtype)
    (found,) = runner(runtime, 1, dtype)({"x": x, "bucket": np.zeros(2, np.int64), **feeds})
    assert (found % 2 == 0).all()
    np.testing.assert_array_equal(np.abs(found - halves), 0.5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_codes_stop_at_the_bounds_of_each_samples_bucket_even_for_infinities(runtime: str) -> None:
    feeds = {
        "scale": [1.0, 1.0],
        "low": [-3.0, -127.0],
        "high": [12.0, 127.0],
        "offset": [0.0, 0.0],
        "channel": [1.0, 1.0, 1.0, 1.0],
    }
    operands = {name: np.asarray(value, np.float32) for name, value in feeds.items()}
    x = np.tile(np.asarray([-np.inf, -1e30, 1e30, np.inf], np.float32), (3, 1))
    (found,) = runner(runtime, 1, np.float32)({"x": x, "bucket": np.asarray([1, 0, 1]), **operands})
    assert found.tolist() == [[-127, -127, 127, 127], [-3, -3, 12, 12], [-127, -127, 127, 127]]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_batch_that_mixes_buckets_equals_each_sample_alone(runtime: str) -> None:
    rng = np.random.default_rng(0)
    operands, x, bucket = (
        tables(rng, 5, 3, bits=4),
        rng.standard_normal((6, 3, 4, 4)).astype(np.float32),
        rng.permutation(6) % 5,
    )
    run = runner(runtime, 1, np.float32)
    (together,) = run({"x": x, "bucket": bucket, **operands})
    alone = [run({"x": x[i : i + 1], "bucket": bucket[i : i + 1], **operands})[0] for i in range(6)]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    moved = run({"x": x, "bucket": np.roll(bucket, 1), **operands})[0]
    assert (moved != together).any()


def test_low_precision_input_is_divided_in_float32() -> None:
    x = (np.random.default_rng(0).standard_normal((1, 4096)) * 20).astype(np.float16)
    scale, unit = float32(0.4), np.ones(4096, np.float32)
    exact = np.rint(x.astype(np.float32) / scale)
    assert (exact != np.rint(x / scale.astype(np.float16))).any()
    bounds = {"low": float32(-127), "high": float32(127), "offset": float32(0)}
    (found,) = runner("onnxruntime", 1, np.float16)(
        {"x": x, "bucket": np.zeros(1, np.int64), "scale": scale, "channel": unit, **bounds}
    )
    np.testing.assert_array_equal(found, np.clip(exact, -127, 127))


def test_the_function_declares_the_published_signature() -> None:
    function = timestep_quantize.function_body()
    assert (function.domain, function.name) == ("quest", "TimestepQuantize")
    assert [value.name for value in function.inputs] == [
        "x",
        "bucket",
        "scale",
        "low",
        "high",
        "offset",
        "channel",
    ]
    assert list(function.attributes) == ["axis"]


def test_a_model_with_the_function_passes_the_full_check_and_its_codes_are_inferred_as_int8() -> (
    None
):
    model = graph_from_text("""
    op (float16[N,3,H] x, int64[N] bucket, float[K] scale, float[K] low, float[K] high, float[K] offset, float[3] channel)
    => (int8[N,3,H] codes)
    { codes = quest.TimestepQuantize <axis = 1> (x, bucket, scale, low, high, offset, channel) }
    """)
    model.graph.opset_imports.pop("quest.export")
    onnx.checker.check_model(proto_of(model), full_check=True)
