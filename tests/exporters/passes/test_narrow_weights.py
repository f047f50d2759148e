from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.editor import array_of
from exporters.passes.narrow_weights import NarrowWeights
from exporters.passes.to_dtype import LOW_PRECISION_TYPES, to_dtype
from exporters.passes.widen_weights import WidenWeights
from tests.helpers import Array, graph_from_text, op_counts, proto_of, run

TEXT = """g (float[n, 40] x) => (float[n, 40] y, float[n, 40] z) {
    a = MatMul(x, w)
    y = Add(a, b)
    t = Transpose <perm = [1, 0]> (w)
    z = MatMul(x, t)
}"""


BFLOAT16, FLOAT16 = ir.DataType.BFLOAT16, ir.DataType.FLOAT16
TYPES = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)


def published(*shape: int, seed: int = 0, dtype: ir.DataType = BFLOAT16) -> Array:
    """Values that ``dtype`` holds."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return values.astype(dtype.numpy()).astype(np.float32)


def two_products(w: Array, b: Array) -> ir.Model:
    model = graph_from_text(TEXT, w=w, b=b)
    model.functions.clear()
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto_of(model)))


FEEDS = {"x": np.random.default_rng(3).standard_normal((3, 40)).astype(np.float32)}


@TYPES
def test_weights_that_sixteen_bits_hold_take_half_the_bytes_and_give_the_same_numbers(
    dtype: ir.DataType,
) -> None:
    w = published(40, 40, dtype=dtype)
    model = two_products(w, published(40, seed=1))
    before = run(model, FEEDS, optimized=False)
    assert NarrowWeights()(model).modified
    weight = model.graph.initializers["w"]
    assert weight.dtype is dtype
    assert weight.const_value is not None
    assert weight.const_value.nbytes == w.nbytes // 2
    np.testing.assert_array_equal(array_of(weight).astype(np.float32), w)
    assert op_counts(model)["Cast"] == 1
    assert model.graph.initializers["b"].dtype is ir.DataType.FLOAT
    onnx.checker.check_model(proto_of(model), full_check=True)
    for found, expected in zip(run(model, FEEDS, optimized=False), before, strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)


@TYPES
@pytest.mark.parametrize("place", [(0, 0), (39, 39), (17, 5)])
def test_weights_one_of_which_would_be_rounded_stay(
    place: tuple[int, int], dtype: ir.DataType
) -> None:
    w = published(40, 40, dtype=dtype)
    w[place] = np.nextafter(w[place], np.float32(9))
    model = two_products(w, published(40, seed=1))
    assert not NarrowWeights()(model).modified
    np.testing.assert_array_equal(array_of(model.graph.initializers["w"]), w, strict=True)


@pytest.mark.parametrize("value", [65536.0, -1e6, 2**-26])
def test_weights_beyond_the_range_of_fp16_stay(value: float) -> None:
    w = published(40, 40, dtype=FLOAT16)
    w[3, 4] = value
    assert not NarrowWeights()(two_products(w, published(40, seed=1))).modified


@TYPES
def test_widened_again_the_graph_is_what_it_was(dtype: ir.DataType) -> None:
    w, b = published(40, 40, dtype=dtype), published(40, seed=1)
    model, expected = two_products(w, b), two_products(w, b)
    NarrowWeights()(model)
    assert WidenWeights()(model).modified
    assert op_counts(model) == op_counts(expected)
    np.testing.assert_array_equal(array_of(model.graph.initializers["w"]), w, strict=True)
    onnx.checker.check_model(proto_of(model), full_check=True)
    pairs = zip(
        run(model, FEEDS, optimized=False), run(expected, FEEDS, optimized=False), strict=True
    )
    for found, before in pairs:
        np.testing.assert_array_equal(found, before, strict=True)
    assert not WidenWeights()(model).modified


@pytest.mark.parametrize("dtype", LOW_PRECISION_TYPES)
def test_in_a_graph_of_a_low_precision_type_each_weight_is_stored_in_the_type_it_is_read_in(
    dtype: str,
) -> None:
    w, b = published(40, 40), published(40, seed=1)
    model, expected = two_products(w, b), two_products(w, b)
    NarrowWeights()(model)
    assert op_counts(to_dtype(model, dtype)) == op_counts(to_dtype(expected, dtype))
    for name, value in model.graph.initializers.items():
        assert value.dtype is expected.graph.initializers[name].dtype
        np.testing.assert_array_equal(
            array_of(value), array_of(expected.graph.initializers[name]), strict=True
        )
