from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.editor import array_of
from exporters.passes.center_weights import CenterWeights
from quest_deploy.artifacts.checkpoint import Checkpoint, pack_4bit
from tests.helpers import Array, graph_from_text, op_counts, proto_of, run


def dequantized(bits: int, axis: int, seed: int) -> tuple[ir.Model, Array]:
    """A graph that dequantizes a weight [6, 4] of unsigned codes along ``axis``, and the weight,
    computed apart from it.
    """
    rng = np.random.default_rng(seed)
    codes, zero = (
        rng.integers(0, 2**bits, (6, 4), dtype=np.uint8),
        rng.integers(0, 2**bits, (6, 4)[axis], dtype=np.uint8),
    )
    codes.flat[:2], zero[:2] = (0, 2**bits - 1), (2**bits - 1, 0)
    scale = rng.uniform(0.01, 0.2, zero.size).astype(np.float32)
    model = graph_from_text(
        f"g () => (float[6,4] weight) {{ weight = DequantizeLinear <axis = {axis}> (codes, scale, "
        "zero) }",
        codes=codes,
        scale=scale,
        zero=zero,
    )
    if bits == 4:
        for name, values in (("codes", codes), ("zero", zero)):
            value = model.graph.initializers[name]
            value.const_value = ir.PackedTensor(
                pack_4bit(values), ir.DataType.UINT4, shape=values.shape, name=name
            )
            value.dtype = ir.DataType.UINT4
    shape = (-1, 1) if axis == 0 else (1, -1)
    return model, (
        codes.astype(np.float32) - zero.astype(np.float32).reshape(shape)
    ) * scale.reshape(shape)


@given(
    bits=st.sampled_from([4, 8]),
    axis=st.integers(0, 1),
    signed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_weights_stay_exactly_the_same_and_no_unsigned_initializer_is_left(
    bits: int, axis: int, signed: bool, seed: int
) -> None:
    model, expected = dequantized(bits, axis, seed)
    np.testing.assert_array_equal(run(model, {})[0], expected)
    assert CenterWeights(signed_zero_points=signed)(model).modified
    assert not {value.dtype for value in model.graph.initializers.values()} & {
        ir.DataType.UINT4,
        ir.DataType.UINT8,
    }
    assert [value.name for value in model.graph.outputs] == ["weight"]
    if len(
        model.graph
    ):  # a weight in float is an initializer that is the output, which onnxruntime does not need to compute
        onnx.checker.check_model(proto_of(model), full_check=True)
        np.testing.assert_array_equal(run(model, {})[0], expected)
    else:
        np.testing.assert_array_equal(array_of(model.graph.outputs[0]), expected)


@pytest.mark.parametrize("signed", [True, False])
def test_case_1_four_bit_codes_become_int8_with_zero_points_of_zero(signed: bool) -> None:
    model, _ = dequantized(4, 0, 0)
    before = [array_of(model.graph.initializers[name]).astype(int) for name in ("codes", "zero")]
    CenterWeights(signed_zero_points=signed)(model)
    (node,) = model.graph
    codes, _, zero = node.inputs
    assert (codes.dtype, zero.dtype) == (ir.DataType.INT8, ir.DataType.INT8)
    assert not array_of(zero).any()
    np.testing.assert_array_equal(array_of(codes), before[0] - before[1].reshape(-1, 1))


def test_case_2_eight_bit_codes_and_zero_points_move_down_by_128_together() -> None:
    model, _ = dequantized(8, 1, 0)
    before = [array_of(model.graph.initializers[name]).astype(int) for name in ("codes", "zero")]
    CenterWeights(signed_zero_points=True)(model)
    (node,) = model.graph
    for value, old in zip((node.inputs[0], node.inputs[2]), before, strict=True):
        assert value.dtype is ir.DataType.INT8
        np.testing.assert_array_equal(array_of(value), old - 128)


def test_case_3_without_signed_zero_points_an_eight_bit_weight_is_a_float_initializer() -> None:
    model, _ = dequantized(8, 1, 0)
    CenterWeights(signed_zero_points=False)(model)
    assert op_counts(model) == {}
    assert [value.dtype for value in model.graph.initializers.values()] == [ir.DataType.FLOAT]


def test_a_second_run_changes_nothing(hand_model: ir.Model) -> None:
    model, _ = dequantized(8, 0, 0)
    CenterWeights(signed_zero_points=True)(model)
    assert not CenterWeights(signed_zero_points=True)(model).modified
    CenterWeights(signed_zero_points=False)(hand_model)
    assert not CenterWeights(signed_zero_points=False)(hand_model).modified


@pytest.mark.parametrize("signed", [True, False])
def test_case_2_symmetric_weights_stored_as_uint8_become_the_checkpoints_int8(
    signed: bool, hand: Checkpoint, hand_model: ir.Model
) -> None:
    assert CenterWeights(signed_zero_points=signed)(hand_model).modified
    values = ir.convenience.create_value_mapping(hand_model.graph)
    for name in ("last", "to_k"):
        codes, _, zero = values[f"{name}.weight_dequantized"].producer().inputs  # type: ignore[union-attr]
        assert (codes.dtype, zero.dtype) == (ir.DataType.INT8, ir.DataType.INT8)  # type: ignore[union-attr]
        assert not array_of(zero).any()  # type: ignore[arg-type]
        expected = hand.layers[name].weight_codes
        np.testing.assert_array_equal(array_of(codes), expected if name == "last" else expected.T)  # type: ignore[arg-type]


def test_case_3_a_weight_has_the_type_of_its_scale() -> None:
    model, expected = dequantized(8, 1, 0)
    scale = model.graph.initializers["scale"]
    scale.const_value = ir.tensor(array_of(scale).astype(np.float16), name="scale")
    CenterWeights(signed_zero_points=False)(model)
    weight = array_of(model.graph.outputs[0])
    assert weight.dtype == np.float16
    np.testing.assert_allclose(weight, expected, rtol=2e-3)
