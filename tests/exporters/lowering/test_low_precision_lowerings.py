"""A whole UNet lowered in FP16 or bf16 against the same one in FP32: each layer, product and
segment on the same inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from exporters.graph_info import graph_info
from exporters.lowering import onnxruntime, tensorrt
from exporters.passes.cut import cut_codes, cut_layer, cut_matmul, cut_segments
from tests.helpers import (
    Array,
    Feeds,
    kinds_checkpoint,
    kinds_feeds,
    kinds_graph,
    proto_of,
    relative_error,
    run,
    run_reference,
)

if TYPE_CHECKING:
    import torch

    from exporters.graph_info import GraphInfo

FP16_UNIT = 2.0**-11
BF16_UNIT = 2.0**-8


@pytest.fixture(scope="module")
def single(small_proto: onnx.ModelProto) -> ir.Model:
    """The UNet lowered in FP32."""
    return tensorrt.lower(ir.from_proto(small_proto))


@pytest.fixture(scope="module")
def half(small_proto: onnx.ModelProto) -> ir.Model:
    """The UNet lowered in FP16."""
    return tensorrt.lower(ir.from_proto(small_proto), dtype="fp16")


@pytest.fixture(scope="module")
def info(half: ir.Model) -> GraphInfo:
    return graph_info(half)


@pytest.fixture(scope="module")
def values(single: ir.Model, info: GraphInfo, small_inputs: dict[str, torch.Tensor]) -> Feeds:
    """Every value that a layer, a quantizer or a segment reads, as the UNet in FP32 computes it,
    rounded to FP16.
    """
    inputs = {name: value.numpy() for name, value in small_inputs.items()}
    wanted = [
        "bucket",
        *(quantizer.input for quantizer in info.quantizers.values()),
        *(layer.output for layer in info.layers.values()),
    ]
    wanted = [name for name in dict.fromkeys(wanted) if name not in inputs and name != "out_sample"]
    proto = proto_of(single)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    found = dict(zip(["out_sample", *wanted], run(proto, inputs), strict=True))
    rounded = {
        name: x.astype(np.float16).astype(np.float32) if x.dtype == np.float32 else x
        for name, x in found.items()
    }
    return inputs | rounded


def feeds_of(cut: ir.Model, values: Feeds) -> Feeds:
    return {str(value.name): values[str(value.name)] for value in cut.graph.inputs}


def outputs_of(cut: ir.Model, values: Feeds) -> Feeds:
    common.RemoveUnusedNodesPass()(cut)
    return dict(
        zip(
            [str(value.name) for value in cut.graph.outputs],
            run(cut, feeds_of(cut, values)),
            strict=True,
        )
    )


def by_channel_error(found: Array, expected: Array) -> float:
    """The largest difference in a channel, relative to the channel's largest magnitude or a
    hundredth of the tensor's.
    """
    axes = (0, 2, 3) if found.ndim == 4 else tuple(range(found.ndim - 1))
    largest = np.maximum(np.abs(expected).max(axes), 0.01 * np.abs(expected).max())
    return float((np.abs(found - expected).max(axes) / largest).max())


def test_codes_are_computed_in_fp32_whatever_the_type_around(
    single: ir.Model, half: ir.Model, info: GraphInfo, values: Feeds
) -> None:
    for quantizer in info.quantizers:
        (mine,), (theirs,) = (
            outputs_of(cut_codes(model, info, quantizer), values).values()
            for model in (half, single)
        )
        np.testing.assert_array_equal(mine, theirs, err_msg=quantizer)


def test_every_layer_agrees_within_the_rounding_of_fp16(
    single: ir.Model, half: ir.Model, info: GraphInfo, values: Feeds
) -> None:
    for layer in info.layers:
        (mine,), (theirs,) = (
            outputs_of(cut_layer(model, info, layer), values).values() for model in (half, single)
        )
        assert by_channel_error(mine, theirs) < 4 * FP16_UNIT, layer


def test_every_segment_agrees_within_the_rounding_of_fp16(
    single: ir.Model, half: ir.Model, info: GraphInfo, values: Feeds
) -> None:
    mine, theirs = (outputs_of(cut_segments(model, info), values) for model in (half, single))
    assert len(mine) > 40
    for name, found in mine.items():
        assert relative_error(found, theirs[name]) < 4 * FP16_UNIT, name


def test_integer_layers_and_convolutions_compute_in_fp16_and_norms_softmax_and_the_timestep_in_fp32(
    half: ir.Model,
) -> None:
    kinds: dict[str, set[ir.DataType | None]] = {}
    for node in half.graph:
        kinds.setdefault(node.op_type, set()).add(node.outputs[0].dtype)
    assert kinds["Conv"] == kinds["MatMul"] == {ir.DataType.FLOAT16}
    for op in (
        "GroupNormalization",
        "LayerNormalization",
        "Softmax",
        "Sin",
        "Cos",
        "Div",
        "Max",
        "Min",
    ):
        assert kinds[op] == {ir.DataType.FLOAT}, op


@pytest.mark.parametrize(
    "lower", [onnxruntime.lower, tensorrt.lower], ids=["onnxruntime", "tensorrt"]
)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_half_unet_is_plain_valid_onnx_with_the_same_inputs_outputs_and_names(
    lower: object, dtype: str, small_graph: ir.Model
) -> None:
    edge = [
        (value.name, value.dtype)
        for value in (*small_graph.graph.inputs, *small_graph.graph.outputs)
    ]
    info = graph_info(small_graph)
    lowered = lower(small_graph, dtype=dtype)  # type: ignore[operator]
    assert not any(node.domain for node in lowered.graph)
    onnx.checker.check_model(proto_of(lowered), full_check=True)
    assert [
        (value.name, value.dtype) for value in (*lowered.graph.inputs, *lowered.graph.outputs)
    ] == edge
    assert graph_info(lowered) == info
    values = ir.convenience.create_value_mapping(lowered.graph)
    assert all(
        quantizer.input in values and quantizer.codes in values
        for quantizer in info.quantizers.values()
    )
    assert all(layer.output in values for layer in info.layers.values())


def test_frozen_to_one_bucket_a_half_unet_is_the_same_within_that_bucket(
    half: ir.Model, small_proto: onnx.ModelProto, values: Feeds
) -> None:
    frozen = tensorrt.lower(ir.from_proto(small_proto), frozen_bucket=2, dtype="fp16")
    onnx.checker.check_model(proto_of(frozen), full_check=True)
    at = {**values, "timestep": np.full(5, 600.0, np.float32)}
    feeds = {name: at[name] for name in ("sample", "timestep", "encoder_hidden_states")}
    np.testing.assert_array_equal(run(frozen, feeds)[0], run(half, feeds)[0])


def test_every_product_of_activations_agrees_within_the_rounding_of_fp16() -> None:
    single, half = (
        tensorrt.lower(kinds_graph(kinds_checkpoint())),
        tensorrt.lower(kinds_graph(kinds_checkpoint()), dtype="fp16"),
    )
    info = graph_info(half)
    feeds = kinds_feeds([999.0, 0.0, 500.0, 499.0]) | {"bucket": np.asarray([1, 0, 1, 0])}
    for product in info.matmuls:
        (mine,), (theirs,) = (
            outputs_of(cut_matmul(model, info, product), feeds).values() for model in (half, single)
        )
        assert relative_error(mine, theirs) < 4 * FP16_UNIT, product


def test_layers_agree_within_the_rounding_of_bf16(
    single: ir.Model, small_proto: onnx.ModelProto, info: GraphInfo, values: Feeds
) -> None:
    lowered = tensorrt.lower(ir.from_proto(small_proto), dtype="bf16")
    for layer in (
        "conv_in",
        "time_embedding.linear_1",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "conv_out",
    ):
        cut = cut_layer(lowered, info, layer)
        rounded = {
            name: _to_bf16(x) if x.dtype == np.float32 else x
            for name, x in feeds_of(cut, values).items()
        }
        (mine,), (theirs,) = (
            run_reference(cut, rounded),
            run(cut_layer(single, info, layer), rounded),
        )
        assert relative_error(mine, theirs) < 4 * BF16_UNIT, layer


def _to_bf16(x: Array) -> Array:
    import ml_dtypes

    return x.astype(ml_dtypes.bfloat16).astype(np.float32)
