from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from exporters.graph_info import graph_info
from exporters.passes.cut import cut_bucket, cut_codes, cut_layer, cut_segments
from exporters.passes.to_low_precision import ToLowPrecision
from quest_deploy.artifacts.checkpoint import Checkpoint
from tests.helpers import (
    float32,
    numpy_layer,
    op_counts,
    proto_of,
    quantizer_codes,
    relative_error,
    run,
)

BUCKET = np.asarray([1, 0, 1])
SHAPES = {"conv": (3, 2, 6, 6), "last": (3, 4, 3, 4), "to_q": (3, 3, 5)}


def quantizer_input(quantizer: str) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPES[quantizer]).astype(np.float32)


def test_a_cut_quantizer_takes_its_tensor_and_buckets_and_gives_its_codes(
    hand: Checkpoint, hand_model: ir.Model
) -> None:
    info = graph_info(hand_model)
    for name, quantizer in hand.quantizers.items():
        cut, x = cut_codes(hand_model, info, name), quantizer_input(name)
        assert [value.name for value in cut.graph.inputs] == [info.quantizers[name].input, "bucket"]
        (codes,) = run(cut, {info.quantizers[name].input: x, "bucket": BUCKET})
        np.testing.assert_array_equal(codes, quantizer_codes(quantizer, x, BUCKET))


def test_a_cut_layer_gives_its_float_output_after_scale_and_bias(
    hand: Checkpoint, hand_model: ir.Model
) -> None:
    info = graph_info(hand_model)
    for name, layer in info.layers.items():
        cut, x = cut_layer(hand_model, info, name), quantizer_input(layer.site)
        (y,) = run(cut, {info.quantizers[layer.site].input: x, "bucket": BUCKET})
        assert relative_error(y, numpy_layer(hand, name, x, BUCKET)) < 1e-6
        onnx.checker.check_model(proto_of(cut), full_check=True)


def test_one_cut_of_several_gives_what_each_gives_alone(hand_model: ir.Model) -> None:
    info = graph_info(hand_model)
    feeds = {entry.input: quantizer_input(name) for name, entry in info.quantizers.items()}
    for cut, names in ((cut_codes, info.quantizers), (cut_layer, ("conv", "to_q", "to_k"))):
        together = run(cut(hand_model, info, *names), {**feeds, "bucket": BUCKET})
        for name, found in zip(names, together, strict=True):
            one = cut(hand_model, info, name)
            given = {x.name: feeds[x.name] for x in one.graph.inputs if x.name in feeds}
            (alone,) = run(one, {**given, "bucket": BUCKET})
            np.testing.assert_array_equal(found, alone)


def test_a_cut_holds_the_parts_it_needs_and_no_more(hand_model: ir.Model) -> None:
    counts = op_counts(cut_layer(hand_model, graph_info(hand_model), "to_k"))
    assert counts == {
        "TimestepQuantize": 1,
        "DequantizeLinear": 2,
        "MatMul": 1,
        "Gather": 1,
        "Unsqueeze": 1,
        "Mul": 1,
    }


def test_the_cut_bucket_counts_the_edges_at_or_below_the_timestep(hand_model: ir.Model) -> None:
    (bucket,) = run(cut_bucket(hand_model), {"timestep": float32(0, 499.99, 500, 999)})
    assert bucket.tolist() == [0, 0, 1, 1]


def test_the_segments_are_what_lies_between_layers_and_no_layer(hand_model: ir.Model) -> None:
    cut = cut_segments(hand_model, graph_info(hand_model))
    assert op_counts(cut) == {"Neg": 1, "Identity": 1}
    assert [value.name for value in cut.graph.inputs] == ["to_q.output", "to_k.output"]
    assert [value.name for value in cut.graph.outputs] == ["first", "second"]


def test_segments_begin_at_layers_and_products_and_end_at_quantizers_and_the_output(
    small_graph: ir.Model,
) -> None:
    info = graph_info(small_graph)
    cut = cut_segments(small_graph, info)
    assert not {"TimestepQuantize", "DequantizeLinear", "Conv"} & op_counts(cut).keys()
    given = {value.name for value in small_graph.graph.inputs} | {
        x.output for x in (info.layers | info.matmuls).values()
    }
    wanted = {quantizer.input for quantizer in info.quantizers.values()} | {
        x for product in info.matmuls.values() for x in product.inputs
    }
    wanted |= {value.name for value in small_graph.graph.outputs}
    assert {value.name for value in cut.graph.inputs} <= given
    assert {value.name for value in cut.graph.outputs} == wanted - given


def test_cutting_leaves_the_graph_as_it_was(hand_model: ir.Model) -> None:
    before = proto_of(hand_model).SerializeToString(deterministic=True)
    info = graph_info(hand_model)
    cut_layer(hand_model, info, "conv")
    cut_codes(hand_model, info, "conv")
    cut_bucket(hand_model)
    cut_segments(hand_model, info)
    assert proto_of(hand_model).SerializeToString(deterministic=True) == before


def test_every_cut_has_a_dynamic_batch(hand_model: ir.Model) -> None:
    info = graph_info(hand_model)
    cut = cut_layer(hand_model, info, "to_q")
    for batch in (1, 3):
        (y,) = run(
            cut,
            {
                info.quantizers["to_q"].input: quantizer_input("to_q")[:batch],
                "bucket": BUCKET[:batch],
            },
        )
        assert y.shape == (batch, 3, 7)


def test_what_is_half_at_the_edge_of_a_cut_is_fp32_outside_under_the_same_name(
    hand: Checkpoint, hand_model: ir.Model
) -> None:
    ToLowPrecision(ir.DataType.FLOAT16)(hand_model)
    info = graph_info(hand_model)
    cuts = [
        cut_segments(hand_model, info),
        *(cut_layer(hand_model, info, name) for name in info.layers),
    ]
    for cut in cuts:
        assert all(
            value.dtype in (ir.DataType.FLOAT, ir.DataType.INT64)
            for value in (*cut.graph.inputs, *cut.graph.outputs)
        )
        onnx.checker.check_model(proto_of(cut), full_check=True)
    layer = cut_layer(hand_model, info, "last")  # it reads what conv gives, in FP16
    assert [value.name for value in (*layer.graph.inputs, *layer.graph.outputs)] == [
        "conv.output",
        "bucket",
        "image",
    ]
    x = quantizer_input("last").astype(np.float16).astype(np.float32)
    (y,) = run(layer, {"conv.output": x, "bucket": BUCKET})
    assert y.dtype == np.float32
    assert relative_error(y, numpy_layer(hand, "last", x, BUCKET)) < 2e-3
