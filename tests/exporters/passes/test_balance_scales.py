from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.editor import array_of
from exporters.passes.balance_scales import BalanceScales, power_of_two_near
from tests.helpers import (
    assert_same,
    float32,
    hand_feeds,
    kinds_checkpoint,
    kinds_feeds,
    kinds_graph,
    lowering_begins_with,
    proto_of,
    run,
)


def activation_scales(model: ir.Model) -> dict[str, float]:
    """The scale of each dequantizer of codes."""
    return {
        str(node.inputs[0].name): float(array_of(node.inputs[1]))
        for node in model.graph
        if node.op_type == "DequantizeLinear" and node.inputs[0].producer() is not None
    }


def test_the_results_stay_the_same_to_the_last_bit(hand_model: ir.Model) -> None:
    feeds = hand_feeds([999.0, 0.0, 500.0])
    before = run(hand_model, feeds)
    assert BalanceScales()(hand_model).modified
    assert all(scale != 1 for scale in activation_scales(hand_model).values())
    assert_same(run(hand_model, feeds), before)
    onnx.checker.check_model(proto_of(hand_model), full_check=True)


def test_each_dequantizer_carries_the_power_of_two_near_its_sites_median_scale(
    hand_model: ir.Model,
) -> None:
    tables = {
        name: array_of(value)
        for name, value in hand_model.graph.initializers.items()
        if name.endswith(".scale")
    }
    BalanceScales()(hand_model)
    found = activation_scales(hand_model)
    for name, table in tables.items():
        carried = found[name.replace(".scale", ".codes")]
        assert np.log2(carried) == round(np.log2(carried))
        assert 2**-0.5 <= carried / np.median(table) <= 2**0.5


def test_a_quantizer_with_an_offset_is_left_alone_and_products_of_two_operands_stay_the_same() -> (
    None
):
    checkpoint, feeds = kinds_checkpoint(), kinds_feeds([999.0, 0.0, 500.0, 499.0])
    model = lowering_begins_with(kinds_graph(checkpoint))
    before = run(model, feeds)
    BalanceScales()(model)
    offset = {
        f"{name}.codes"
        for name, quantizer in checkpoint.quantizers.items()
        if hasattr(quantizer, "offset") and quantizer.offset.any()
    }
    scales = activation_scales(model)
    assert offset
    assert {name for name, scale in scales.items() if scale == 1} >= offset
    assert scales["attn.q.codes"] != 1
    assert_same(run(model, feeds), before)


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ((0.24, 0.26, 9.0), 2.0**-2),
        ((1.0,), 1.0),
        ((1.3, 1.3), 1.0),
        ((1.5,), 2.0),
        ((1e-9, 1e-9), 2.0**-14),
        ((1e9,), 2.0**9),
    ],
)
def test_the_power_of_two_is_the_nearest_that_fp16_holds_exactly_with_every_code(
    scales: tuple[float, ...], expected: float
) -> None:
    power = power_of_two_near(float32(*scales))
    assert power == expected
    codes = np.arange(-127, 128)
    np.testing.assert_array_equal(
        codes.astype(np.float16) * np.float16(power), (codes * np.float64(power)).astype(np.float32)
    )
