from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from exporters.editor import array_of
from exporters.passes.balance_scales import BalanceScales
from exporters.passes.to_low_precision import ToLowPrecision
from tests.helpers import (
    Array,
    Feeds,
    float32,
    graph_from_text,
    hand_feeds,
    kinds_checkpoint,
    kinds_feeds,
    kinds_graph,
    lowering_begins_with,
    op_counts,
    proto_of,
    relative_error,
    run,
    run_reference,
)

FLOAT, FP16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
each_type = pytest.mark.parametrize("dtype", [FP16, BF16], ids=lambda x: x.name.lower())
UNIT = {FP16: 2.0**-11, BF16: 2.0**-8}
"""The relative error of rounding to the type."""


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    """The type of every value that a node computes, by name."""
    return {str(value.name): value.dtype for node in model.graph for value in node.outputs}


def halved(text: str, dtype: ir.DataType = FP16, **initializers: Array) -> ir.Model:
    model = graph_from_text(text, **initializers)
    model.functions.clear()
    for domain in ("quest", "quest.export"):
        model.graph.opset_imports.pop(domain)

    common.ShapeInferencePass()(model)
    ToLowPrecision(dtype)(model)
    onnx.checker.check_model(proto_of(model), full_check=True)
    return model


def integer_linear(inputs: int, scale: float) -> tuple[ir.Model, Feeds]:
    """scale * codes @ weight with all codes 127 and all weight codes 127, whose sum of products is
    127 * 127 * inputs.
    """
    text = f"""
    g (float[batch,{inputs}] x, int64[batch] bucket) => (float[batch,2] y)
    <float one = {{1}}, int8 zero = {{0}}, int64[1] axes = {{1}}>
    {{
      codes = quest.TimestepQuantize <axis = 1> (x, bucket, s_scale, s_low, s_high, s_offset, s_channel)
      dequantized = DequantizeLinear(codes, one, zero)
      weight = DequantizeLinear <axis = 1> (w, w_scale, w_zero)
      product = MatMul(dequantized, weight)
      gathered = Gather(s_scale, bucket)
      factor = Unsqueeze(gathered, axes)
      y = Mul(product, factor)
    }}
    """
    tables = {
        "s.scale": float32(scale, 3 * scale),
        "s.low": float32(-127, -127),
        "s.high": float32(127, 127),
    }
    rest = {"s.offset": float32(0, 0), "s.channel": np.ones(inputs, np.float32)}
    weights = {
        "w": np.full((inputs, 2), 127, np.int8),
        "w.scale": float32(0.01, 0.02),
        "w.zero": np.zeros(2, np.int8),
    }
    model = graph_from_text(text, **tables, **rest, **weights)
    model.graph.opset_imports.pop("quest.export")
    for node in model.graph:
        known = {"codes": ir.DataType.INT8}.get(str(node.outputs[0].name), FLOAT)
        node.outputs[0].type = ir.TensorType(known)
    x = np.full((2, inputs), 127 * scale, np.float32)
    x[1] *= 3
    return model, {"x": x, "bucket": np.asarray([0, 1])}


@pytest.mark.parametrize("evaluate", [run, run_reference])
def test_sums_of_codes_beyond_the_largest_number_of_fp16_stay_finite_and_right(
    evaluate: Any,
) -> None:
    model, feeds = integer_linear(800, 1e-4)
    expected = run(model, feeds)[0]
    BalanceScales()(model)
    ToLowPrecision(FP16)(model)
    assert types(model)["product"] is FP16
    (found,) = evaluate(model, feeds)
    assert np.isfinite(found).all()
    assert relative_error(found, expected) < 4 * UNIT[FP16]


def test_without_balanced_scales_they_overflow() -> None:
    model, feeds = integer_linear(800, 1e-4)
    expected = run(model, feeds)[0]
    assert np.isfinite(expected).all()
    ToLowPrecision(FP16)(model)
    assert np.isinf(run_reference(model, feeds)[0]).all()


@each_type
def test_inputs_and_outputs_stay_fp32_and_products_and_what_follows_give_the_half_type(
    dtype: ir.DataType,
) -> None:
    model = halved(
        "g (float[b,4] x) => (float[b,3] y) { p = MatMul(x, w)\n y = Add(p, c) }",
        dtype,
        w=np.eye(4, 3, dtype=np.float32),
        c=float32(1, 2, 3),
    )
    assert [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)] == [FLOAT, FLOAT]
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert types(model)["p"] is dtype
    assert {value.dtype for value in model.graph.initializers.values() if value.uses()} == {dtype}
    assert op_counts(model) == {"Cast": 2, "MatMul": 1, "Add": 1}


def test_what_no_product_has_touched_stays_fp32() -> None:
    model = halved(
        "g (float[b,4] t) => (float[b,4] y) { f = Mul(t, c)\n s = Sin(f)\n y = Add(s, c) }",
        c=float32(1, 2, 3, 4),
    )
    assert set(types(model).values()) == {FLOAT}
    assert "Cast" not in op_counts(model)


def test_case_1_norms_and_softmax_compute_in_fp32_and_so_does_what_follows_until_it_meets_a_half_value() -> (
    None
):
    text = """
    g (float[b,4,4] x) => (float[b,4,4] y) {
      p = MatMul(x, w)
      n = LayerNormalization(p, c)
      s = Sigmoid(n)
      silu = Mul(n, s)
      m = Softmax(silu)
      y = Add(m, p)
    }
    """
    found = types(halved(text, w=np.eye(4, dtype=np.float32), c=float32(1, 2, 3, 4)))
    assert {found[name] for name in ("n", "s", "silu", "m")} == {FLOAT}
    assert found["p"] is FP16
    assert found["y_float16"] is FP16


def test_case_1_the_squares_of_a_mean_do_not_overflow() -> None:
    text = """
    g (float[b,4] x) => (float[b,4] y) <float two = {2}, float least = {1e-6}, int64[1] axes = {-1}>
    {
      p = MatMul(x, w)
      squares = Pow(p, two)
      mean = ReduceMean(squares, axes)
      positive = Add(mean, least)
      root = Sqrt(positive)
      inverse = Reciprocal(root)
      y = Mul(p, inverse)
    }
    """
    model = halved(text, w=np.eye(4, dtype=np.float32))
    assert {types(model)[name] for name in ("squares", "mean", "inverse")} == {FLOAT}
    assert types(model)["p"] is FP16
    (found,) = run_reference(model, {"x": np.full((1, 4), 1000, np.float32)})
    np.testing.assert_allclose(found, 1, rtol=4 * UNIT[FP16])


def test_case_1_an_exported_rms_norm_does_not_overflow() -> None:
    import torch
    from diffusers.models.normalization import RMSNorm

    from exporters import torch_to_qdq

    projection = torch.nn.Linear(8, 8, bias=False)
    torch.nn.init.eye_(projection.weight)
    module = torch.nn.Sequential(projection, RMSNorm(8, eps=1e-6)).eval()
    x = torch.full((3, 2, 8), 1000.0)
    sizes = {0: torch.export.Dim("batch", max=63)}
    exported = torch.export.export(module, (x,), dynamic_shapes=(sizes,))
    program = torch_to_qdq._to_onnx(exported, ["x"], {"x": sizes})
    assert program is not None
    torch_to_qdq._simplify(program.model)
    common.ShapeInferencePass()(program.model)
    ToLowPrecision(FP16)(program.model)
    computed = {node.op_type: node.outputs[0].dtype for node in program.model.graph}
    assert (computed["MatMul"], computed["ReduceMean"]) == (FP16, FLOAT)
    (found,) = run_reference(program.model, {"x": x.numpy()})
    np.testing.assert_allclose(found, 1, rtol=4 * UNIT[FP16])


def test_case_6_sums_that_divide_each_other_are_fp32() -> None:
    text = """
    g (float[b,4,4] x) => (float[b,3,4] y)
    <float least = {1e-15}, int64[1] axis = {1}, int64[1] start = {0}, int64[1] last = {-1}, int64[1] end = {9}>
    {
      k = MatMul(x, w)
      sums = MatMul(k, x)
      mixed = MatMul(sums, x)
      above = Slice(mixed, start, last, axis)
      row = Slice(mixed, last, end, axis)
      divisor = Add(row, least)
      y = Div(above, divisor)
    }
    """
    model = halved(text, w=np.eye(4, dtype=np.float32))
    assert {types(model)[name] for name in ("sums", "mixed", "divisor")} == {FLOAT}
    for x, expected in ((100.0, 1.0), (0.0, 0.0)):  # sums of 4e6, and of nothing
        (found,) = run_reference(model, {"x": np.full((1, 4, 4), x, np.float32)})
        np.testing.assert_allclose(found, np.full((1, 3, 4), expected))


def test_case_2_a_product_that_something_is_subtracted_from_is_fp32_with_what_it_reads() -> None:
    text = """
    g (float[b,4] x, int8[b,4] codes) => (float[b,3] y) <float one = {1}, int8 zero = {0}> {
      d = DequantizeLinear(codes, one, zero)
      v = DequantizeLinear <axis = 1> (w, s, z)
      p = MatMul(d, v)
      r = ReduceSum(x)
      y = Sub(p, r)
    }
    """
    model = halved(text, w=np.eye(4, 3, dtype=np.int8), s=float32(1, 2, 3), z=np.zeros(3, np.int8))
    assert {found for name, found in types(model).items()} == {FLOAT}


@pytest.mark.parametrize("masked", [False, True])
def test_case_3_a_product_of_integers_that_is_only_scaled_and_masked_before_a_softmax_is_fp32(
    masked: bool,
) -> None:
    text = f"""
    g (int8[b,2,4] q, int8[b,4,2] k, float[b,2,4] x, float[b,1,2] mask) => (float[b,2,2] y, float[b,2,2] z) <float one = {{1}}, int8 zero = {{0}}> {{
      dq = DequantizeLinear(q, one, zero)
      dk = DequantizeLinear(k, one, zero)
      p = MatMul(dq, dk)
      a = Mul(p, one)
      b2 = {"Add(a, mask)" if masked else "Mul(a, one)"}
      y = Softmax(b2)
      t = Transpose <perm = [0, 2, 1]> (x)
      f = MatMul(x, t)
      z = Softmax(f)
    }}
    """
    found = types(halved(text))
    assert {found[name] for name in ("dq", "dk", "p", "a", "b2")} == {FLOAT}
    assert found["f"] is FP16  # float attention: its operands are scaled before


def test_case_4_zero_points_of_per_channel_quantizers_beyond_fp16_change_nothing() -> None:
    text = """
    g (float[b,4] x0) => (float[b,4] y) {
      x = MatMul(x0, w)
      ratio = Div(x, scale)
      rounded = Round(ratio)
      raised = Add(rounded, zero_point)
      codes = Sub(raised, zero_point)
      y = Mul(codes, scale)
    }
    """
    model = halved(
        text, w=np.eye(4, dtype=np.float32), scale=float32(0.5), zero_point=float32(100000)
    )
    assert {types(model)[name] for name in ("ratio", "rounded", "raised", "codes")} == {FLOAT}
    np.testing.assert_array_equal(
        run(model, {"x0": float32(1, 2, 3.4, -4).reshape(1, 4)})[0], [[1, 2, 3.5, -4]]
    )


def test_case_5_the_scales_of_a_resize_stay_fp32() -> None:
    text = """
    g (float[b,2,3,3] x) => (float[b,2,6,6] y) {
      p = Conv <kernel_shape = [1, 1]> (x, w)
      y = Resize <mode = "nearest"> (p, , scales)
    }
    """
    model = halved(text, w=np.ones((2, 2, 1, 1), np.float32), scales=float32(1, 1, 2, 2))
    (resize,) = (node for node in model.graph if node.op_type == "Resize")
    assert [x.dtype for x in resize.inputs if x is not None] == [FP16, FLOAT]


def test_a_table_is_gathered_in_the_type_that_its_readers_want_and_no_row_is_cast(
    hand_model: ir.Model,
) -> None:
    ToLowPrecision(FP16)(hand_model)
    factors = [node for node in hand_model.graph if node.op_type == "Mul"]
    assert factors
    for node in factors:
        assert all(x.dtype is FP16 for x in node.inputs)
        assert {x.producer().op_type for x in node.inputs} <= {"Conv", "MatMul", "Unsqueeze"}


def test_a_weights_scale_that_fp16_would_round_to_zero_stays_positive(hand_model: ir.Model) -> None:
    scale = hand_model.graph.initializers["to_q.weight_scale"]
    scale.const_value = ir.tensor(np.full(7, 1e-12, np.float32), name=scale.name)
    ToLowPrecision(FP16)(hand_model)
    assert (array_of(hand_model.graph.initializers["to_q.weight_scale_float16"]) > 0).all()


@each_type
def test_the_graph_is_valid_and_every_value_has_the_type_that_its_operator_gives(
    hand_model: ir.Model, dtype: ir.DataType
) -> None:
    BalanceScales()(hand_model)
    ToLowPrecision(dtype)(hand_model)
    proto = proto_of(hand_model)
    onnx.checker.check_model(proto, full_check=True)
    # What shape inference finds for itself is what is written in the graph.
    declared = {info.name: info.type.tensor_type.elem_type for info in proto.graph.value_info}
    del proto.graph.value_info[:]
    inferred = {
        i.name: i.type.tensor_type.elem_type
        for i in onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph.value_info
    }
    both = declared.keys() & inferred.keys()
    assert len(both) > 10
    assert {name: declared[name] for name in both} == {name: inferred[name] for name in both}


def test_every_kind_of_layer_and_product_computes_the_same_within_the_rounding_of_fp16() -> None:
    feeds = kinds_feeds([999.0, 0.0, 500.0, 499.0])
    names = [value.name for value in kinds_graph(kinds_checkpoint()).graph.outputs]
    expected = dict(zip(names, run(kinds_graph(kinds_checkpoint()), feeds), strict=True))
    model = lowering_begins_with(kinds_graph(kinds_checkpoint()))
    BalanceScales()(model)
    ToLowPrecision(FP16)(model)
    assert [value.name for value in model.graph.outputs] == names
    found = dict(zip(names, run(model, feeds), strict=True))
    for name in names:
        if name != "image":  # behind a second quantizer, whose codes may differ
            assert relative_error(found[name], expected[name]) < 4 * UNIT[FP16], name


def test_the_hand_made_graph_computes_the_same_within_the_rounding_of_bf16(
    hand_model: ir.Model,
) -> None:
    feeds = hand_feeds([999.0, 0.0, 500.0])
    expected = run(hand_model, feeds)
    BalanceScales()(hand_model)
    ToLowPrecision(BF16)(hand_model)
    _, first, second = run_reference(hand_model, feeds)
    assert relative_error(first, expected[1]) < 6 * UNIT[BF16]
    assert relative_error(second, expected[2]) < 6 * UNIT[BF16]
