from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from exporters.exactness import EXACT, EXACT_ANYWHERE, Exactness, integer_products
from exporters.graph_info import save_graph
from exporters.lowering import openvino
from exporters.passes.avoid_saturation import AvoidSaturation
from exporters.passes.center_weights import CenterWeights
from exporters.passes.expand_timestep_quantize import ExpandTimestepQuantize
from exporters.passes.insert_quantized_layers import product_name
from exporters.passes.linear_to_conv import LinearToConv
from exporters.probe import make_probe
from quest_deploy.backends.base import LOWERED, integer_instructions
from quest_deploy.backends.openvino.backend import compile_graph
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from tests.helpers import hand_feeds, lowering_begins_with, proto_of, relative_error, run

FLOAT = ir.DataType.FLOAT
TOLD = TYPE, KERNEL, NAMES = "layerType", "primitiveType", "originalLayersNames"
IN_PLACE = "unknown"
"""How openvino's runtime model calls the kernel of a node that does not run."""
TIMESTEPS = [999.0, 0.0, 500.0]


def prepared(portable: ir.Model) -> ir.Model:
    """``portable`` as the pass finds it in a lowering, all its weights signed."""
    lowering_begins_with(portable)
    ExpandTimestepQuantize()(portable)
    CenterWeights(signed_zero_points=True)(portable)
    return portable


def kinds(model: ir.Model) -> dict[str | None, str]:
    return {product.node.name: product.kind for product in integer_products(model)}


def test_case_1_linears_on_tokens_are_convolutions_that_compute_the_same(
    hand_model: ir.Model,
) -> None:
    before = run(prepared(hand_model), hand_feeds(TIMESTEPS))
    assert LinearToConv(EXACT)(hand_model).modified
    onnx.checker.check_model(proto_of(hand_model), full_check=True)
    assert set(kinds(hand_model).values()) == {"conv", "grouped conv"}
    for ours, theirs in zip(run(hand_model, hand_feeds(TIMESTEPS)), before, strict=True):
        assert relative_error(ours, theirs) < 1e-6


def test_case_1_weights_keep_their_type_and_products_their_names(hand_model: ir.Model) -> None:
    names = set(kinds(prepared(hand_model)))
    LinearToConv(EXACT)(hand_model)
    weights = {
        product.node.name: product.dequantize.inputs[0] for product in integer_products(hand_model)
    }
    assert set(weights) == names
    assert all(node.outputs[0].name == node.name for node in hand_model.graph if node.name in names)
    for name, dtype, shape in (
        ("to_q", ir.DataType.INT4, [7, 5, 1, 1]),
        ("to_k", ir.DataType.INT8, [6, 5, 1, 1]),
    ):
        weight = weights[product_name(name)]
        assert weight is not None
        assert (weight.dtype, list(weight.shape or [])) == (dtype, shape)
        assert f"{name}.weight" not in hand_model.graph.initializers


def test_case_2_unsigned_weights_and_linears_on_vectors_are_left_alone(
    hand_model: ir.Model,
) -> None:
    AvoidSaturation(EXACT_ANYWHERE)(prepared(hand_model))
    LinearToConv(EXACT)(hand_model)
    found = kinds(hand_model)
    assert (found[product_name("to_q")], found[product_name("to_k")]) == ("conv", "linear")
    probe = prepared(make_probe(64).model)
    LinearToConv(EXACT)(probe)
    found = kinds(probe)
    assert found[product_name("linear_signed")] == "conv"
    assert found[product_name("linear_of_vector_signed")] == "linear"


def test_case_2_linears_that_no_convolution_computes_exactly_are_left_alone(
    hand_model: ir.Model,
) -> None:
    worse = Exactness({**EXACT_ANYWHERE.levels, "conv int8 x int8": 0})
    lowered = openvino.lower(hand_model, exactness=worse)
    assert kinds(lowered)[product_name("to_q")] == "linear"


def test_two_products_may_share_a_weight_and_one_may_be_an_output(hand_model: ir.Model) -> None:
    model = prepared(hand_model)
    (product,) = [n for n in model.graph if n.name == product_name("to_q")]
    twin = ir.Node(
        "",
        "MatMul",
        product.inputs,
        outputs=[ir.Value(name="twin", shape=product.outputs[0].shape, type=ir.TensorType(FLOAT))],
        name="twin.product",
    )
    model.graph.insert_after(product, twin)
    model.graph.outputs.append(twin.outputs[0])
    before = run(model, hand_feeds(TIMESTEPS))
    LinearToConv(EXACT)(model)
    onnx.checker.check_model(proto_of(model), full_check=True)
    assert model.graph.outputs[-1].name == "twin"
    for ours, theirs in zip(run(model, hand_feeds(TIMESTEPS)), before, strict=True):
        assert relative_error(ours, theirs) < 1e-6


def test_openvinos_linears_are_convolutions_where_theirs_may_saturate_and_nowhere_else(
    hand_model: ir.Model,
) -> None:
    name = product_name("to_q")
    assert kinds(openvino.lower(hand_model.clone(), exactness=EXACT))[name] == "linear"
    assert kinds(openvino.lower(hand_model, exactness=EXACT_ANYWHERE))[name] == "conv"


def test_openvino_computes_them_on_integers(tmp_path: Path) -> None:
    save_graph(openvino.lower(make_probe(64).model, exactness=EXACT_ANYWHERE), tmp_path / LOWERED)
    found = get_backend("openvino").realised_precision(tmp_path, EngineOptions())
    assert found[product_name("linear_4bit_signed")] == "int8"


@pytest.mark.skipif(integer_instructions(), reason="with VNNI OpenVINO's linears are fast")
def test_openvino_moves_nothing_for_their_transposes(tmp_path: Path) -> None:
    save_graph(openvino.lower(make_probe(64).model, exactness=EXACT_ANYWHERE), tmp_path / LOWERED)
    compiled = compile_graph(tmp_path / LOWERED, EngineOptions())
    by_type: dict[str, list[str]] = {}
    for node in compiled.get_runtime_model().get_ops():
        told = {key: node.get_rt_info()[key].astype(str) for key in TOLD}
        if "linear_4bit_signed" in told[NAMES]:
            by_type.setdefault(told[TYPE], []).append(told[KERNEL])
    assert len(by_type["Transpose"]) == 2
    assert all(kernel.startswith(IN_PLACE) for kernel in by_type["Transpose"])
    assert "Reorder" not in by_type
