from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.editor import array_of
from exporters.graph_info import graph_info
from exporters.passes.insert_quantized_layers import InsertQuantizedLayers
from quest_deploy.artifacts.checkpoint import ActivationQuantizerData, Checkpoint
from tests.helpers import (
    BRANCHED_TEXT,
    HAND_TEXT,
    KINDS_TEXT,
    Array,
    branch_weight,
    branched_checkpoint,
    float_layer,
    graph_from_text,
    hand_checkpoint,
    hand_feeds,
    hand_graph,
    inserted,
    kinds_checkpoint,
    kinds_expected,
    kinds_feeds,
    kinds_graph,
    numpy_layer,
    op_counts,
    proto_of,
    refused,
    relative_error,
    run,
    run_reference,
)

TIMESTEPS = [999.0, 0.0, 500.0, 499.0]


def expected(checkpoint: Checkpoint, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    bucket = np.asarray([checkpoint.scheme.bucket_of(float(t)) for t in feeds["timestep"]])
    inner = numpy_layer(checkpoint, "conv", feeds["sample"], bucket).astype(np.float32)
    return [
        numpy_layer(checkpoint, "last", inner, bucket),
        -numpy_layer(checkpoint, "to_q", feeds["tokens"], bucket),
        numpy_layer(checkpoint, "to_k", feeds["tokens"], bucket),
    ]


@pytest.mark.parametrize("runtime", [run, run_reference])
@pytest.mark.parametrize("buckets", [1, 2, 1000])
def test_the_inserted_layers_compute_what_the_checkpoint_says(
    runtime: object, buckets: int
) -> None:
    checkpoint, feeds = hand_checkpoint(buckets), hand_feeds(TIMESTEPS)
    found = runtime(hand_graph(checkpoint), feeds)  # type: ignore[operator]
    for ours, theirs in zip(found, expected(checkpoint, feeds), strict=True):
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("runtime", [run, run_reference])
@pytest.mark.parametrize("buckets", [1, 2, 1000])
def test_products_offsets_per_channel_quantizers_and_asymmetric_weights_compute_what_the_checkpoint_says(
    runtime: object, buckets: int
) -> None:
    checkpoint, feeds = kinds_checkpoint(buckets), kinds_feeds(TIMESTEPS)
    graph = kinds_graph(checkpoint)
    onnx.checker.check_model(proto_of(graph), full_check=True)
    names = [value.name for value in graph.graph.outputs]
    found = dict(zip(names, runtime(graph, feeds), strict=True))  # type: ignore[operator]
    theirs = kinds_expected(checkpoint, feeds)
    for name in names:
        assert relative_error(found[name], theirs[name]) < 5e-6, name


def test_products_take_any_number_of_tokens_where_the_graph_leaves_it_open() -> None:
    checkpoint, rng, tokens = kinds_checkpoint(), np.random.default_rng(12), 5
    text = (
        KINDS_TEXT.replace("2,3,3]", "2,tokens,tokens]")
        .replace("2,3,4]", "2,tokens,4]")
        .replace("2,4,3]", "2,4,tokens]")
    )
    shapes = {
        "q": (2, tokens, 4),
        "kt": (2, 4, tokens),
        "v": (2, tokens, 4),
        "weights": (2, tokens, tokens),
    }
    feeds = kinds_feeds(TIMESTEPS) | {
        n: rng.uniform(0, 1, (len(TIMESTEPS), *s)).astype(np.float32) for n, s in shapes.items()
    }
    found = dict(
        zip(("scores", "mixed", "half"), run(inserted(text, checkpoint), feeds)[-3:], strict=True)
    )
    for name, quantizer in checkpoint.quantizers.items():
        if isinstance(quantizer, ActivationQuantizerData) and "." in name:
            assert (quantizer.channel == 1).all()
            checkpoint.quantizers[name] = dataclasses.replace(
                quantizer, channel=np.ones(1, np.float32)
            )
    theirs = kinds_expected(checkpoint, feeds)
    for name, value in found.items():
        assert relative_error(value, theirs[name]) < 5e-6, name


def test_no_placeholder_is_left_the_result_is_valid_and_says_it_was_modified(
    hand: Checkpoint,
) -> None:
    model = graph_from_text(HAND_TEXT)
    result = InsertQuantizedLayers(hand)(model)
    assert result.modified
    assert result.model is model
    assert "Layer" not in op_counts(model)
    model.graph.opset_imports.pop("quest.export")
    onnx.checker.check_model(proto_of(model), full_check=True)


def test_the_graphs_outputs_keep_their_names_and_other_values_are_named_after_their_layers(
    hand: Checkpoint,
) -> None:
    model = graph_from_text(HAND_TEXT)
    InsertQuantizedLayers(hand)(model)
    assert [value.name for value in model.graph.outputs] == ["image", "first", "second"]
    assert {"conv.output", "to_q.output", "to_k.output"} <= ir.convenience.create_value_mapping(
        model.graph
    ).keys()


def test_the_metadata_names_each_layers_output_the_graphs_own_output_included(
    hand_model: ir.Model,
) -> None:
    outputs = {name: layer.output for name, layer in graph_info(hand_model).layers.items()}
    assert outputs == {
        "conv": "conv.output",
        "last": "image",
        "to_q": "to_q.output",
        "to_k": "to_k.output",
    }


def signed(weight: ir.Value) -> Array:
    """A weight's codes without the 128 that case 9 adds."""
    codes = array_of(weight).astype(np.int16)
    return codes - 128 if weight.dtype is ir.DataType.UINT8 else codes


def test_case_1_a_conv_weight_keeps_its_shape_and_is_scaled_along_axis_0(
    hand: Checkpoint, hand_model: ir.Model
) -> None:
    for name, dtype in (("conv", ir.DataType.INT4), ("last", ir.DataType.UINT8)):
        weight = hand_model.graph.initializers[f"{name}.weight"]
        (dequantize,) = weight.consumers()
        assert weight.dtype is dtype
        assert dequantize.attributes["axis"].as_int() == 0
        np.testing.assert_array_equal(signed(weight), hand.layers[name].weight_codes)
        ((conv, _),) = dequantize.outputs[0].uses()
        assert conv.op_type == "Conv"


def test_case_2_a_linear_weight_is_transposed_and_scaled_along_axis_1(
    hand: Checkpoint, hand_model: ir.Model
) -> None:
    for name, dtype in (("to_q", ir.DataType.INT4), ("to_k", ir.DataType.UINT8)):
        weight = hand_model.graph.initializers[f"{name}.weight"]
        (dequantize,) = weight.consumers()
        assert weight.dtype is dtype
        assert dequantize.attributes["axis"].as_int() == 1
        np.testing.assert_array_equal(signed(weight), hand.layers[name].weight_codes.T)
        ((product, _),) = dequantize.outputs[0].uses()
        assert product.op_type == "MatMul"


def test_case_3_a_quantizer_with_several_readers_is_quantized_once(hand_model: ir.Model) -> None:
    assert op_counts(hand_model)["TimestepQuantize"] == 3
    dequantized = ir.convenience.create_value_mapping(hand_model.graph)["to_q.dequantized"]
    assert len(dequantized.consumers()) == 2


def test_case_4_one_bucket_has_a_single_edge_beyond_every_timestep() -> None:
    edges = array_of(hand_graph(hand_checkpoint(1)).graph.initializers["bucket_edges"])
    assert edges.shape == (1,)
    assert edges[0] > 1e30


def test_a_layer_without_bias_gets_no_add(hand_model: ir.Model) -> None:
    assert op_counts(hand_model)["Add"] == 2


def test_a_graph_whose_layers_are_not_the_checkpoints_is_refused_by_name(hand: Checkpoint) -> None:
    layers = {k: v for k, v in hand.layers.items() if k != "last"}
    with refused("last", error=ir.passes.PreconditionError):
        InsertQuantizedLayers(dataclasses.replace(hand, layers=layers))(graph_from_text(HAND_TEXT))


def test_readers_of_one_quantizer_that_read_different_values_are_refused_by_name(
    hand: Checkpoint,
) -> None:
    text = HAND_TEXT.replace('<layer = "to_k"> (tokens)', '<layer = "to_k"> (negated)').replace(
        "{", "{ negated = Neg (tokens)", 1
    )
    with refused("to_q", error=ir.passes.PreconditionError):
        InsertQuantizedLayers(hand)(graph_from_text(text))


@pytest.mark.parametrize("runtime", [run, run_reference])
def test_case_10_a_branch_reads_the_input_as_it_is_and_its_weights_are_stored_in_fp16(
    runtime: object,
) -> None:
    checkpoint, feeds = branched_checkpoint(), hand_feeds(TIMESTEPS)
    model = inserted(BRANCHED_TEXT, checkpoint)
    bucket = np.asarray([checkpoint.scheme.bucket_of(float(t)) for t in feeds["timestep"]])
    inner = numpy_layer(checkpoint, "conv", feeds["sample"], bucket).astype(np.float32)

    def both(name: str, x: Array) -> Array:
        layer = checkpoint.layers[f"{name}.residual"]
        branch = float_layer(layer, x.astype(np.float64), branch_weight(checkpoint, name))
        return numpy_layer(checkpoint, layer.name, x, bucket) + branch

    image, first, second = runtime(model, feeds)  # type: ignore[operator]
    assert relative_error(image, both("last", inner)) < 1e-6
    assert relative_error(first, both("to_q", feeds["tokens"])) < 1e-6
    to_k = numpy_layer(checkpoint, "to_k", feeds["tokens"], bucket)
    assert relative_error(second, to_k) < 1e-6
    halves = {x.name for x in model.graph.initializers.values() if x.dtype is ir.DataType.FLOAT16}
    assert halves == {f"{name}.{x}.weight" for name in ("last", "to_q") for x in ("down", "up")}
    onnx.checker.check_model(proto_of(model), full_check=True)
