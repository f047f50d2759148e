from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.editor import array_of
from exporters.graph_info import MATMULS_KEY, QUANTIZERS_KEY, graph_info
from exporters.passes.cut import cut_layer
from exporters.passes.split_gates import SplitGates
from quest_deploy.artifacts.checkpoint import Checkpoint
from tests.helpers import (
    HAND_TEXT,
    assert_same,
    hand_checkpoint,
    hand_feeds,
    inserted,
    numpy_layer,
    op_counts,
    proto_of,
    relative_error,
    run,
)

GATED = HAND_TEXT.replace("float[batch,3,6] second)", "float[batch,3,3] second)").replace(
    "second = Identity (k)",
    "value, gate = Split <axis = AXIS, num_outputs = 2> (LAYER)\n  second = Mul (value, gate)",
)


def gated(checkpoint: Checkpoint, layer: str = "k", axis: int = -1) -> ir.Model:
    return inserted(GATED.replace("AXIS", str(axis)).replace("LAYER", layer), checkpoint)


def with_bias(checkpoint: Checkpoint, bits: int) -> Checkpoint:
    """The checkpoint whose to_k has a bias, which a gated layer has, and weights of ``bits``
    bits.
    """
    layer = checkpoint.layers["to_k"]
    codes = np.clip(layer.weight_codes, -8, 7) if bits == 4 else layer.weight_codes
    layer = dataclasses.replace(
        layer, bias=np.arange(6, dtype=np.float32), weight_bits=bits, codes=codes
    )
    return dataclasses.replace(checkpoint, layers={**checkpoint.layers, "to_k": layer})


@pytest.mark.parametrize("bits", [4, 8])
def test_case_1_the_halves_have_products_of_their_own_and_the_numbers_stay_the_same(
    bits: int,
) -> None:
    checkpoint = with_bias(hand_checkpoint(), bits)
    model, feeds = gated(checkpoint), hand_feeds([999.0, 0.0])
    before = run(model, feeds)
    assert SplitGates()(model).modified
    onnx.checker.check_model(proto_of(model), full_check=True)
    assert_same(run(model, feeds), before)
    halves = [model.graph.initializers[f"to_k.weight.{half}"] for half in ("first", "second")]
    assert {half.dtype for half in halves} == {ir.DataType.INT4 if bits == 4 else ir.DataType.UINT8}
    codes = np.hstack([array_of(half).astype(np.int16) for half in halves]) - (
        0 if bits == 4 else 128
    )
    np.testing.assert_array_equal(codes, checkpoint.layers["to_k"].weight_codes.T)
    assert "to_k.weight" not in model.graph.initializers
    assert op_counts(model)["MatMul"] == 3


def test_case_1_the_layers_output_keeps_its_name_and_can_be_cut_out() -> None:
    checkpoint = with_bias(hand_checkpoint(), 4)
    model = gated(checkpoint)
    SplitGates()(model)
    info, bucket = graph_info(model), np.asarray([1, 0])
    x = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    (y,) = run(cut_layer(model, info, "to_k"), {info.quantizers["to_q"].input: x, "bucket": bucket})
    assert relative_error(y, numpy_layer(checkpoint, "to_k", x, bucket)) < 1e-6


@pytest.mark.parametrize(
    ("layer", "axis"),
    [("k", 1), ("inner", 1), ("tokens", -1)],
    ids=["another axis", "a convolution", "no layer"],
)
def test_case_2_what_is_split_otherwise_stays(layer: str, axis: int) -> None:
    assert not SplitGates()(gated(with_bias(hand_checkpoint(), 4), layer, axis)).modified


def test_case_2_a_layer_without_bias_or_one_that_is_read_twice_stays() -> None:
    assert not SplitGates()(gated(hand_checkpoint())).modified
    checkpoint = with_bias(hand_checkpoint(), 4)
    text = (
        GATED.replace("AXIS", "-1")
        .replace("LAYER", "k")
        .replace("first = Neg (q)", "first = Concat <axis = 2> (k, k)")
    )
    text = text.replace("float[batch,3,7] first", "float[batch,3,12] first")
    assert not SplitGates()(inserted(text, checkpoint)).modified


def test_a_unets_gated_layers_are_split_and_only_those(small_graph: ir.Model) -> None:
    layers = graph_info(small_graph).layers
    SplitGates()(small_graph)
    split = {
        name.removesuffix(".weight.first")
        for name in small_graph.graph.initializers
        if name.endswith(".weight.first")
    }
    assert split == {name for name in layers if name.endswith("ff.net.0.proj")}
    assert json.loads(small_graph.metadata_props[QUANTIZERS_KEY])
    assert MATMULS_KEY in small_graph.metadata_props
