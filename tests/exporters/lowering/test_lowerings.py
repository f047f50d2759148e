from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.editor import array_of
from exporters.graph_info import graph_info, input_sizes
from exporters.lowering import onnxruntime, openvino, tensorrt
from exporters.passes.cut import cut_bucket, cut_codes, cut_layer, cut_matmul
from quest_deploy.artifacts.checkpoint import PerChannelQuantizerData
from quest_deploy.backends.base import build_engine, input_shapes, open_engine
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from tests.helpers import (
    Array,
    Feeds,
    float32,
    hand_feeds,
    kinds_checkpoint,
    kinds_expected,
    kinds_feeds,
    kinds_graph,
    numpy_layer,
    numpy_matmul,
    numpy_per_channel_codes,
    numpy_quantizer,
    of_sample,
    op_counts,
    proto_of,
    quantizer_codes,
    relative_error,
    run,
)

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from quest_deploy.artifacts.checkpoint import Checkpoint


def signed(codes: Array) -> Array:
    """The codes as the checkpoint has them; onnxruntime's lowering stores those that a layer reads
    128 higher.
    """
    return codes.astype(np.int16) - 128 if codes.dtype == np.uint8 else codes


LOWERINGS = [onnxruntime.lower, openvino.lower, tensorrt.lower]
each_lowering = pytest.mark.parametrize(
    "lower", LOWERINGS, ids=lambda f: f.__module__.rpartition(".")[2]
)


@pytest.fixture(scope="module")
def feeds(small_inputs: dict[str, torch.Tensor]) -> Feeds:
    return {name: value.numpy() for name, value in small_inputs.items()}


@pytest.fixture(scope="module")
def portable_output(small_proto: onnx.ModelProto, feeds: Feeds) -> Array:
    return run(small_proto, feeds)[0]


@each_lowering
def test_a_lowered_unet_is_plain_onnx_and_computes_exactly_what_the_portable_graph_does(
    lower: Any, small_graph: ir.Model, feeds: Feeds, portable_output: Array
) -> None:
    lowered = lower(small_graph)
    assert lowered is small_graph
    assert not any(node.domain for node in lowered.graph)
    assert not lowered.functions
    assert set(lowered.graph.opset_imports) == {""}
    onnx.checker.check_model(proto_of(lowered), full_check=True)
    # Not fused, onnxruntime's matrix products add the floats of a convolution in another order.
    assert relative_error(run(lowered, feeds)[0], portable_output) <= (
        1e-5 if lower is onnxruntime.lower else 0
    )


@each_lowering
def test_inputs_outputs_and_metadata_stay(lower: Any, small_graph: ir.Model) -> None:
    names = [value.name for value in (*small_graph.graph.inputs, *small_graph.graph.outputs)]
    info = graph_info(small_graph)
    lowered = lower(small_graph)
    assert [value.name for value in (*lowered.graph.inputs, *lowered.graph.outputs)] == names
    assert graph_info(lowered) == info


@each_lowering
def test_tensorrt_takes_the_models_number_of_tokens_and_the_others_any(
    lower: Any, small_graph: ir.Model
) -> None:
    lowered = lower(small_graph)
    tokens = 3 if lower is tensorrt.lower else None
    assert input_sizes(lowered)["encoder_hidden_states"] == (None, tokens, 8)
    assert input_shapes(lowered, 2)["encoder_hidden_states"] == (2, 3, 8)


@each_lowering
def test_every_layer_and_quantizer_can_still_be_cut_out_and_is_right(
    lower: Any, hand: Checkpoint, hand_model: ir.Model
) -> None:
    shapes = {"conv": (3, 2, 6, 6), "last": (3, 4, 3, 4), "to_q": (3, 3, 5)}
    lowered, bucket, rng = lower(hand_model), np.asarray([1, 0, 1]), np.random.default_rng(0)
    info = graph_info(lowered)
    for name, quantizer in info.quantizers.items():
        x = rng.standard_normal(shapes[name]).astype(np.float32)
        inputs = {quantizer.input: x, "bucket": bucket}
        codes = signed(run(cut_codes(lowered, info, name), inputs)[0])
        np.testing.assert_array_equal(codes, quantizer_codes(hand.quantizers[name], x, bucket))
        for layer in hand.quantizers[name].layers:
            (y,) = run(cut_layer(lowered, info, layer), inputs)
            assert relative_error(y, numpy_layer(hand, layer, x, bucket)) < 1e-6
    assert run(cut_bucket(lowered), {"timestep": float32(499, 500)})[0].tolist() == [0, 1]


@each_lowering
def test_in_a_lowered_unet_every_layer_and_quantizer_is_found_where_the_metadata_says(
    lower: Any, small_graph: ir.Model
) -> None:
    lowered = lower(small_graph)
    values, info = ir.convenience.create_value_mapping(lowered.graph), graph_info(lowered)
    for quantizer in info.quantizers.values():
        quantize = values[quantizer.codes].producer()
        assert quantize is not None
        assert quantize.op_type == "QuantizeLinear"
        assert quantizer.input in values
    for layer in info.layers.values():
        output = values[layer.output].producer()
        assert output is not None
        assert output.op_type in ("Add", "Mul", *(["Concat"] if lower is openvino.lower else []))


@each_lowering
def test_quantize_and_dequantize_have_constant_unit_scales_and_zero_points_of_zero(
    lower: Any, small_graph: ir.Model
) -> None:
    for node in lower(small_graph).graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            value, scale, zero = node.inputs
            if zero.dtype is ir.DataType.UINT8:  # 128 stands for 0
                assert (lower, array_of(zero)) == (onnxruntime.lower, 128)
                continue
            assert zero.dtype is ir.DataType.INT8
            assert not array_of(zero).any()
            is_weight = value.const_value is not None or (
                value.producer() is not None and value.producer().op_type == "Cast"
            )
            assert is_weight or array_of(scale) == 1


@pytest.mark.parametrize("lower", [onnxruntime.lower, openvino.lower])
def test_cpus_gather_tables_once_a_rank(lower: Any, small_graph: ir.Model) -> None:
    counts = op_counts(lower(small_graph))
    assert (counts["Gather"], counts["Split"] >= 3) == (3, True)


def test_tensorrt_gathers_each_table_in_its_shape_and_rounds_where_it_quantizes(
    small_graph: ir.Model,
) -> None:
    lowered = tensorrt.lower(small_graph)
    assert sum(node.op_type == "Gather" for node in lowered.graph) > 50
    unsqueezed = [
        node.inputs[0].producer() for node in lowered.graph if node.op_type == "Unsqueeze"
    ]
    assert "Gather" not in {producer.op_type for producer in unsqueezed if producer is not None}
    assert "Round" not in op_counts(lowered)


def test_tensorrt_gets_int8_initializers(
    small_graph: ir.Model, small_checkpoint: Checkpoint
) -> None:
    dtypes = [value.dtype for value in tensorrt.lower(small_graph).graph.initializers.values()]
    assert ir.DataType.INT4 not in dtypes
    assert dtypes.count(ir.DataType.INT8) > len(small_checkpoint.layers)


@pytest.mark.parametrize("lower", [onnxruntime.lower, openvino.lower])
def test_openvino_and_onnxruntime_get_int4_initializers_behind_a_cast(
    lower: Any, small_graph: ir.Model, small_checkpoint: Checkpoint
) -> None:
    lowered = lower(small_graph)
    int4 = {
        name: value
        for name, value in lowered.graph.initializers.items()
        if value.dtype is ir.DataType.INT4
    }
    stems = {
        name.removesuffix(".first").removesuffix(".second").removesuffix("_of_matmul")
        for name in int4
    }
    assert stems == {
        f"{name}.weight"
        for name, layer in small_checkpoint.layers.items()
        if layer.weight_bits == 4
    }
    assert {node.op_type for value in int4.values() for node in value.consumers()} == {"Cast"}


@each_lowering
@pytest.mark.parametrize("bucket", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_frozen_unet_equals_the_whole_one_within_its_bucket_and_differs_elsewhere(
    lower: Any, bucket: int, small_proto: onnx.ModelProto, feeds: Feeds
) -> None:
    frozen = lower(ir.from_proto(small_proto), frozen_bucket=bucket)
    onnx.checker.check_model(proto_of(frozen), full_check=True)
    assert "bucket" not in ir.convenience.create_value_mapping(frozen.graph)
    for timestep in (100.0, 600.0):
        at = {**feeds, "timestep": np.full(5, timestep, np.float32)}
        error = relative_error(run(frozen, at)[0], run(small_proto, at)[0])
        assert (error <= (1e-5 if lower is onnxruntime.lower else 0)) == (
            timestep == (100.0, None, 600.0)[bucket]
        )


def test_openvino_itself_compiles_its_lowering_and_agrees_per_layer(
    hand: Checkpoint, hand_model: ir.Model
) -> None:
    import openvino as ov

    lowered, feeds = openvino.lower(hand_model), hand_feeds([999.0, 0.0, 500.0])
    core = ov.Core()
    compiled = core.compile_model(
        core.read_model(proto_of(lowered).SerializeToString()),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32"},
    )
    found = compiled(feeds)
    bucket = np.asarray([1, 0, 1])
    assert (
        relative_error(-found["first"], numpy_layer(hand, "to_q", feeds["tokens"], bucket)) < 1e-6
    )
    assert (
        relative_error(found["second"], numpy_layer(hand, "to_k", feeds["tokens"], bucket)) < 1e-6
    )
    inner = numpy_layer(hand, "conv", feeds["sample"], bucket).astype(np.float32)
    assert relative_error(found["image"], numpy_layer(hand, "last", inner, bucket)) < 2e-6


def test_optimizing_runtimes_do_not_change_a_lowered_layer(
    hand: Checkpoint, hand_model: ir.Model
) -> None:
    feeds, bucket = hand_feeds([999.0, 0.0, 500.0]), np.asarray([1, 0, 1])
    _, first, second = run(onnxruntime.lower(hand_model), feeds, optimized=True)
    assert relative_error(-first, numpy_layer(hand, "to_q", feeds["tokens"], bucket)) < 1e-6
    assert relative_error(second, numpy_layer(hand, "to_k", feeds["tokens"], bucket)) < 1e-6


KINDS_TIMESTEPS = [999.0, 0.0, 500.0, 499.0]
KINDS_INPUTS = {"padded": "sample", "plain": "tokens", "by_channel": "tokens", "by_token": "tokens"}
KINDS_OPERANDS = {
    "attn.scores": ("q", "kt"),
    "attn.mix": ("weights", "v"),
    "half.mix": ("weights", "v"),
}


def assert_kinds(found: Feeds, expected: Feeds) -> None:
    assert found.keys() == expected.keys() - {"inner"}
    for name, ours in found.items():
        assert relative_error(ours, expected[name]) < 5e-6, name


@each_lowering
def test_every_new_kind_lowered_is_plain_onnx_and_computes_what_the_checkpoint_says(
    lower: Any,
) -> None:
    checkpoint, feeds = kinds_checkpoint(), kinds_feeds(KINDS_TIMESTEPS)
    portable = kinds_graph(checkpoint)
    unlowered = run(portable, feeds)
    lowered = lower(portable)
    assert not any(node.domain for node in lowered.graph)
    onnx.checker.check_model(proto_of(lowered), full_check=True)
    found = dict(
        zip([value.name for value in lowered.graph.outputs], run(lowered, feeds), strict=True)
    )
    assert_kinds(found, kinds_expected(checkpoint, feeds))
    for (name, ours), before in zip(found.items(), unlowered, strict=True):
        assert relative_error(ours, before) < 1e-6, name


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_every_new_kind_on_its_own_optimizing_runtime_computes_what_the_checkpoint_says(
    backend: str, tmp_path: Path
) -> None:
    checkpoint, feeds, options = (
        kinds_checkpoint(),
        kinds_feeds(KINDS_TIMESTEPS),
        EngineOptions(threads=1),
    )
    model = kinds_graph(checkpoint)
    names = [value.name for value in model.graph.outputs]
    build_engine(get_backend(backend), model, tmp_path, options, "cd" * 32)
    with open_engine(get_backend(backend), tmp_path) as runner:
        outputs = runner.infer(
            feeds
        )  # openvino also gives an output the name of the value that an Identity passes on
        assert_kinds({name: outputs[name] for name in names}, kinds_expected(checkpoint, feeds))


@each_lowering
def test_every_product_layer_and_quantizer_of_a_new_kind_can_be_cut_out_and_is_right(
    lower: Any,
) -> None:
    checkpoint, feeds = kinds_checkpoint(), kinds_feeds(KINDS_TIMESTEPS)
    lowered, bucket = lower(kinds_graph(checkpoint)), np.asarray([1, 0, 1, 0])
    info = graph_info(lowered)
    for name, (a, b) in KINDS_OPERANDS.items():
        assert info.matmuls[name].inputs == (a, b)
        (y,) = run(cut_matmul(lowered, info, name), {a: feeds[a], b: feeds[b], "bucket": bucket})
        assert relative_error(y, numpy_matmul(checkpoint, name, feeds[a], feeds[b], bucket)) < 5e-6
    for name, source in KINDS_INPUTS.items():
        assert info.quantizers[name].input == source
        (y,) = run(cut_layer(lowered, info, name), {source: feeds[source], "bucket": bucket})
        assert relative_error(y, numpy_layer(checkpoint, name, feeds[source], bucket)) < 5e-6
    sources = {
        **KINDS_INPUTS,
        "attn.q": "q",
        "attn.k": "kt",
        "attn.softmax": "weights",
        "attn.v": "v",
        "half.v": "v",
    }
    for name, source in sources.items():
        quantizer, x = checkpoint.quantizers[name], feeds[source]
        codes = signed(run(cut_codes(lowered, info, name), {source: x, "bucket": bucket})[0])
        if isinstance(quantizer, PerChannelQuantizerData):
            np.testing.assert_array_equal(codes, numpy_per_channel_codes(quantizer, x, bucket))
            continue
        padding = (0, 0) if name != "padded" else (1, 2)
        padded = np.pad(x, [(0, 0), (0, 0), *[(p, p) for p in padding]]) if x.ndim == 4 else x
        stored = np.rint(
            numpy_quantizer(quantizer, padded, bucket) / of_sample(quantizer.scale, bucket, x.ndim)
        )
        np.testing.assert_array_equal(codes, stored + of_sample(quantizer.offset, bucket, x.ndim))


def test_tensorrt_gets_no_unsigned_codes_and_no_zero_points_but_zero() -> None:
    lowered = tensorrt.lower(kinds_graph(kinds_checkpoint()))
    kinds = {value.dtype for value in lowered.graph.initializers.values()}
    assert not kinds & {ir.DataType.UINT4, ir.DataType.UINT8, ir.DataType.INT4}
    for node in lowered.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[2].dtype is ir.DataType.INT8
            assert not array_of(node.inputs[2]).any(), node.name


@each_lowering
@pytest.mark.parametrize("bucket", [0, 1])
def test_frozen_to_one_bucket_every_new_kind_computes_that_buckets_numbers_at_any_timestep(
    lower: Any, bucket: int
) -> None:
    checkpoint = kinds_checkpoint()
    feeds = kinds_feeds(KINDS_TIMESTEPS)
    within = {**feeds, "timestep": np.full(4, (100.0, 900.0)[bucket], np.float32)}
    frozen = lower(kinds_graph(checkpoint), frozen_bucket=bucket)
    assert_kinds(
        dict(zip([value.name for value in frozen.graph.outputs], run(frozen, feeds), strict=True)),
        kinds_expected(checkpoint, within),
    )
