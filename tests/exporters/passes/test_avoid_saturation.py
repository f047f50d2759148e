from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.exactness import (
    ACTIVATIONS,
    ATTENTION,
    EXACT,
    EXACT_ANYWHERE,
    LEVELS,
    SATURATING_KEY,
    SIGNED,
    UNSIGNED,
    Exactness,
    integer_products,
    kernel_needs,
)
from exporters.lowering import onnxruntime, openvino
from exporters.passes.avoid_saturation import AvoidSaturation
from exporters.passes.center_weights import CenterWeights
from exporters.passes.expand_timestep_quantize import ExpandTimestepQuantize
from exporters.passes.insert_quantized_layers import product_name
from quest_deploy.artifacts.scheme import weight_range
from tests.helpers import (
    Feeds,
    hand_checkpoint,
    hand_feeds,
    hand_graph,
    kinds_checkpoint,
    kinds_feeds,
    kinds_graph,
    lowering_begins_with,
    proto_of,
    relative_error,
    run,
    run_reference,
)

UNSIGNED_ATTENTION = Exactness(
    {**EXACT_ANYWHERE.levels, **{f"{ATTENTION} {a} x {UNSIGNED}": LEVELS[0] for a in ACTIVATIONS}}
)
"""A processor and runtime, such as onnxruntime on AVX2, that multiply any unsigned operands
exactly.
"""


def prepared(portable: ir.Model) -> ir.Model:
    """``portable`` as the pass finds it in a lowering."""
    lowering_begins_with(portable)
    ExpandTimestepQuantize()(portable)
    CenterWeights(signed_zero_points=True)(portable)
    return portable


def forms(model: ir.Model) -> dict[str, str]:
    """What the metadata says of the nodes that were changed."""
    changed: dict[str, str] = json.loads(model.metadata_props.get(SATURATING_KEY, "{}"))
    return changed


def same_numbers(model: ir.Model, before: list[np.ndarray], feeds: Feeds) -> bool:
    onnx.checker.check_model(proto_of(model), full_check=True)
    return all(
        relative_error(ours, theirs) < 1e-6
        for ours, theirs in zip(run(model, feeds), before, strict=True)
    )


def test_case_1_what_is_exact_stays_as_it_is(hand_model: ir.Model) -> None:
    prepared(hand_model)
    assert not AvoidSaturation(Exactness(dict.fromkeys(EXACT_ANYWHERE.levels, LEVELS[0])))(
        hand_model
    ).modified
    assert SATURATING_KEY not in hand_model.metadata_props


def test_case_1_weights_of_7_bits_are_exact_on_every_processor() -> None:
    checkpoint = hand_checkpoint()
    rng, (low, high) = np.random.default_rng(0), weight_range(7)
    layers = {}
    for name, layer in checkpoint.layers.items():
        codes = rng.integers(low, high + 1, layer.weight_codes.shape).astype(np.int8)
        codes.flat[:2] = high
        layers[name] = replace(layer, weight_bits=7, codes=codes)
    model = prepared(hand_graph(replace(checkpoint, layers=layers)))
    assert {product.weight for product in integer_products(model)} == {SIGNED}
    assert not AvoidSaturation(EXACT_ANYWHERE)(model).modified


def test_case_2_a_weight_that_may_saturate_is_unsigned_and_a_4_bit_one_is_not(
    hand_model: ir.Model,
) -> None:
    feeds, before = (
        hand_feeds([999.0, 0.0, 500.0]),
        run(prepared(hand_model), hand_feeds([999.0, 0.0, 500.0])),
    )
    assert AvoidSaturation(EXACT_ANYWHERE)(hand_model).modified
    assert forms(hand_model) == {product_name("last"): UNSIGNED, product_name("to_k"): UNSIGNED}
    found = {
        x.node.name: (x.weight, x.dequantize.inputs[0].dtype) for x in integer_products(hand_model)
    }  # type: ignore[union-attr]
    assert (
        found[product_name("last")] == found[product_name("to_k")] == (UNSIGNED, ir.DataType.UINT8)
    )
    assert found[product_name("conv")] == found[product_name("to_q")] == (SIGNED, ir.DataType.INT4)
    assert same_numbers(hand_model, before, feeds)


@pytest.mark.parametrize(
    ("exactness", "form"), [(UNSIGNED_ATTENTION, UNSIGNED), (EXACT_ANYWHERE, "float")]
)
def test_cases_3_and_4_a_product_of_8_bit_activations_is_unsigned_or_in_float(
    exactness: Exactness, form: str
) -> None:
    feeds = kinds_feeds([999.0, 0.0, 500.0, 499.0])
    model = prepared(kinds_graph(kinds_checkpoint()))
    before = run(model, feeds)
    AvoidSaturation(exactness)(model)
    assert forms(model)[product_name("attn.mix")] == form
    assert product_name("attn.scores") not in forms(model)  # 4 bits
    kinds = {x.node.name: x.weight for x in integer_products(model)}
    assert kinds.get(product_name("attn.mix")) == (UNSIGNED if form == UNSIGNED else None)
    assert same_numbers(model, before, feeds)


def test_case_5_a_layer_that_is_exact_in_no_form_computes_in_float(hand_model: ir.Model) -> None:
    levels = {
        name: level
        for name, level in EXACT_ANYWHERE.levels.items()
        if name.endswith(f" x {SIGNED}")
    }
    feeds = hand_feeds([999.0, 0.0, 500.0])
    before = run(prepared(hand_model), feeds)
    AvoidSaturation(Exactness(levels))(hand_model)
    names = {product_name(name) for name in ("last", "to_k")}
    assert {name: form for name, form in forms(hand_model).items() if name in names} == (
        dict.fromkeys(names, "float")
    )
    assert not names & {product.node.name for product in integer_products(hand_model)}
    assert same_numbers(hand_model, before, feeds)


@pytest.mark.parametrize("lower", [openvino.lower, onnxruntime.lower])
@pytest.mark.parametrize(
    "make", [lambda: hand_graph(hand_checkpoint()), lambda: kinds_graph(kinds_checkpoint())]
)
def test_lowered_for_any_processor_a_graph_needs_only_what_holds_on_every_processor(
    lower: object, make: object
) -> None:
    assert EXACT_ANYWHERE.short_of(kernel_needs(lower(make(), exactness=EXACT)))  # type: ignore[operator]
    assert not EXACT_ANYWHERE.short_of(kernel_needs(lower(make(), exactness=EXACT_ANYWHERE)))  # type: ignore[operator]


@pytest.mark.parametrize("lower", [openvino.lower, onnxruntime.lower])
@pytest.mark.parametrize(
    "exactness", [EXACT, EXACT_ANYWHERE, UNSIGNED_ATTENTION], ids=["exact", "any", "unsigned"]
)
def test_every_form_is_the_same_by_the_specifications_own_evaluator(
    lower: object, exactness: Exactness
) -> None:
    for portable, feeds in (
        (lambda: hand_graph(hand_checkpoint()), hand_feeds([999.0, 0.0])),
        (lambda: kinds_graph(kinds_checkpoint()), kinds_feeds([999.0, 0.0])),
    ):
        lowered = lower(portable(), exactness=exactness)  # type: ignore[operator]
        for ours, theirs in zip(
            run_reference(lowered, feeds), run_reference(portable(), feeds), strict=True
        ):
            assert relative_error(ours, theirs) < 5e-6
