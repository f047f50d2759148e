from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from exporters.passes.expand_timestep_quantize import ExpandTimestepQuantize
from exporters.passes.round_in_quantize_linear import RoundInQuantizeLinear
from tests.helpers import assert_same, graph_from_text, hand_feeds, op_counts, run, run_reference

TIES = np.arange(-300, 300, 0.25, dtype=np.float32)
NEAR_TIES = np.concatenate([np.nextafter(TIES, np.float32(sign * np.inf)) for sign in (-1, 1)])
X = np.concatenate(
    [TIES, NEAR_TIES, np.float32([np.inf, -np.inf, 1e30, -1e30, 1e-45, -0.0])]
).reshape(1, -1)


def clamped(
    low: float, high: float, closing: str = "codes = QuantizeLinear(clipped, one, zero)"
) -> ir.Model:
    """A quantizer of scale one with constant bounds."""
    return graph_from_text(
        f"""g (float[1,n] x) => (int8[1,n] codes) <float one = {{1.0}}, int8 zero = {{0}}, float two = {{2.0}}> {{
            rounded = Round(x)
            raised = Max(rounded, low)
            clipped = Min(raised, high)
            {closing}
        }}""",
        low=np.float32(low),
        high=np.float32(high),
    )


@pytest.mark.parametrize(("low", "high"), [(-15, 7), (-127, 127), (-128, 127)])
def test_codes_stay_the_same_at_ties_beside_them_and_beyond_the_bounds(
    low: float, high: float
) -> None:
    model = clamped(low, high)
    wanted = np.clip(np.rint(X), low, high).astype(np.int8)
    np.testing.assert_array_equal(run(model, {"x": X})[0], wanted)
    assert RoundInQuantizeLinear()(model).modified
    assert op_counts(model) == {"QuantizeLinear": 1, "Max": 1, "Min": 1}
    np.testing.assert_array_equal(run(model, {"x": X})[0], wanted)
    np.testing.assert_array_equal(run_reference(model, {"x": X})[0], wanted)


@pytest.mark.parametrize(
    ("low", "closing"),
    [(-7.25, "one, zero"), (-8.0, "two, zero"), (-8.0, "one, five"), (-8.0, "x_scale, zero")],
    ids=[
        "a bound that is no integer",
        "a scale of two",
        "a zero point",
        "a scale that is not known",
    ],
)
def test_a_quantizer_that_does_more_than_change_the_type_keeps_its_round(
    low: float, closing: str
) -> None:
    model = graph_from_text(
        f"""g (float[1,n] x, float x_scale) => (int8[1,n] codes)
        <float one = {{1.0}}, int8 zero = {{0}}, float two = {{2.0}}, int8 five = {{5}}> {{
            rounded = Round(x)
            raised = Max(rounded, low)
            clipped = Min(raised, high)
            codes = QuantizeLinear(clipped, {closing})
        }}""",
        low=np.float32(low),
        high=np.float32(7),
    )
    assert not RoundInQuantizeLinear()(model).modified


def test_codes_that_an_offset_is_added_to_are_still_rounded_before_it() -> None:
    model = clamped(
        0, 255, "shifted = Sub(clipped, two)\n codes = QuantizeLinear(shifted, one, zero)"
    )
    assert not RoundInQuantizeLinear()(model).modified
    assert op_counts(model)["Round"] == 1


def test_a_rounded_value_that_something_else_reads_stays() -> None:
    model = graph_from_text(
        """g (float[1,n] x) => (int8[1,n] codes, float[1,n] rounded) <float one = {1.0}, int8 zero = {0}> {
            rounded = Round(x)
            raised = Max(rounded, low)
            clipped = Min(raised, high)
            codes = QuantizeLinear(clipped, one, zero)
        }""",
        low=np.float32(-8),
        high=np.float32(7),
    )
    assert not RoundInQuantizeLinear()(model).modified


def test_a_whole_quantized_graph_computes_the_same(hand_model: ir.Model) -> None:
    ExpandTimestepQuantize()(hand_model)
    feeds = hand_feeds([999.0, 0.0, 500.0, 3.0])
    before = run(hand_model, feeds)
    assert RoundInQuantizeLinear()(hand_model).modified
    assert "Round" not in op_counts(hand_model)
    assert_same(run(hand_model, feeds), before)
