from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest_deploy.quantization.affine_numpy import tie_distance
from quest_deploy.verification.tolerances import (
    ChannelErrors,
    CodeMismatches,
    compare_codes,
    layer_error,
    relative_error,
    segment_error,
)


def near_tie(tie: float, ulps: int) -> np.ndarray:
    """The float32 value ``ulps`` floats above a tie."""
    value = np.float32(tie)
    for _ in range(abs(ulps)):
        value = np.nextafter(value, np.float32(np.copysign(np.inf, ulps)))
    return np.asarray([value])


def compare(code: int, expected: int, ratio: np.ndarray) -> CodeMismatches:
    return compare_codes(np.asarray([code], np.int8), np.asarray([expected], np.int8), ratio)


@pytest.mark.parametrize("ulps", [-4, -1, 0, 1, 4])
@pytest.mark.parametrize(
    ("tie", "below"), [(0.5, 0), (2.5, 2), (-0.5, -1), (-6.5, -7), (126.5, 126)]
)
def test_a_tie_within_4_ulp_explains_the_neighbouring_code(
    tie: float, below: int, ulps: int
) -> None:
    for codes in ((below, below + 1), (below + 1, below)):
        assert compare(*codes, near_tie(tie, ulps)) == CodeMismatches(1, 1, 0)


@pytest.mark.parametrize("ulps", [-6, -5, 5, 6, 1000])
@pytest.mark.parametrize(("tie", "below"), [(0.5, 0), (2.5, 2), (-6.5, -7), (126.5, 126)])
def test_farther_from_a_tie_nothing_is_explained(tie: float, below: int, ulps: int) -> None:
    assert compare(below, below + 1, near_tie(tie, ulps)) == CodeMismatches(1, 1, 1)


@pytest.mark.parametrize("other", [-128, -1, 4, 5, 127])
def test_a_tie_explains_no_code_but_a_neighbour(other: int) -> None:
    assert compare(other, 2, near_tie(2.5, 0)) == CodeMismatches(1, 1, 1)


def test_neighbouring_codes_away_from_a_tie_are_unexplained() -> None:
    assert compare(2, 3, np.asarray([2.9], np.float32)).unexplained == 1


def test_a_ratio_that_is_not_a_number_explains_nothing() -> None:
    assert compare(2, 3, np.asarray([np.nan], np.float32)).unexplained == 1


@given(
    st.lists(st.tuples(st.integers(-15, 15), st.floats(-20, 20, width=32)), min_size=1, max_size=30)
)
def test_equal_codes_are_no_mismatches_wherever_the_ratio_lies(
    entries: list[tuple[int, float]],
) -> None:
    codes = np.asarray([code for code, _ in entries], np.int8)
    ratio = np.asarray([value for _, value in entries], np.float32)
    assert compare_codes(codes, codes.copy(), ratio) == CodeMismatches(len(codes), 0, 0)


def test_counts_are_added() -> None:
    assert CodeMismatches(5, 2, 1) + CodeMismatches(7, 3, 0) == CodeMismatches(12, 5, 1)


@given(st.floats(0.25, 1000, width=32))
def test_the_distance_from_a_tie_is_the_same_on_either_side_of_zero(value: float) -> None:
    above, below = (tie_distance(np.asarray([sign * value], np.float32)) for sign in (1, -1))
    assert above == below


def test_a_layers_error_is_its_worst_channels_of_each_row() -> None:
    expected = np.random.default_rng(0).standard_normal((3, 5, 4, 4)).astype(np.float32)
    y = expected.copy()
    y[1, 2] *= np.float32(1.01)
    error = layer_error([ChannelErrors.of(y, expected, 1)])
    assert error[0] == error[2] == 0
    assert error[1] == pytest.approx(0.01, rel=1e-3)


def test_the_channels_of_a_linear_layer_lie_last() -> None:
    expected = np.random.default_rng(0).standard_normal((2, 6, 5)).astype(np.float32)
    y = expected.copy()
    y[0, :, 3] *= np.float32(1.1)
    np.testing.assert_allclose(layer_error([ChannelErrors.of(y, expected, 2)]), [0.1, 0], rtol=1e-3)


def test_a_channel_that_cancels_in_one_row_is_judged_by_its_usual_size() -> None:
    expected = np.ones((2, 1, 4), np.float32)
    expected[0] = 0
    y = expected.copy()
    y[0] += np.float32(1e-7)
    assert 0 < layer_error([ChannelErrors.of(y, expected, 1)])[0] < 1e-5


@pytest.mark.parametrize(("half", "share"), [(None, 0.1), ("fp16", 1.0)])
def test_a_number_that_cancels_in_a_vector_is_judged_by_the_size_of_the_others(
    half: str | None, share: float
) -> None:
    expected = np.ones((2, 100), np.float32)
    expected[:, 0] = 1e-6
    y = expected.copy()
    y[:, 0] += np.float32(1e-4)
    np.testing.assert_allclose(
        layer_error([ChannelErrors.of(y, expected, -1, half)]), 1e-4 / share, rtol=0.01
    )
    y = expected * np.float32(1.001)
    np.testing.assert_allclose(
        layer_error([ChannelErrors.of(y, expected, -1, half)]), 1e-3, rtol=0.01
    )


@pytest.mark.parametrize("axis", [2, -1])
def test_a_segments_error_is_its_worst_channels_of_each_row(axis: int) -> None:
    expected = np.random.default_rng(0).standard_normal((2, 6, 5)).astype(np.float32)
    x = expected.copy()
    x[0, :, 3] *= np.float32(1.01)
    np.testing.assert_allclose(segment_error(x, expected, axis), [0.01, 0], rtol=1e-3)


def test_a_channel_that_vanishes_is_judged_by_the_size_of_the_others() -> None:
    expected = np.ones((1, 100, 2), np.float32)
    expected[0, :, 0] = 1e-6
    x = expected.copy()
    x[0, :, 0] += np.float32(1e-7)
    assert 1e-7 < segment_error(x, expected, 2)[0] < 1e-5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite_is_infinitely_wrong(value: float) -> None:
    expected = np.ones((2, 3, 4), np.float32)
    y = expected.copy()
    y[1, 0, 0] = value
    for error in (
        layer_error([ChannelErrors.of(y, expected, 1)]),
        segment_error(y, expected, 1),
        relative_error(y, expected),
    ):
        assert error.tolist() == [0, np.finfo(np.float32).max]


def test_the_end_to_end_error_is_relative_to_each_samples_norm() -> None:
    expected = np.asarray([[3.0, 4.0], [30.0, 40.0]], np.float32)
    np.testing.assert_allclose(
        relative_error(expected + np.float32(1), expected),
        [np.sqrt(2) / 5, np.sqrt(2) / 50],
        rtol=1e-6,
    )
