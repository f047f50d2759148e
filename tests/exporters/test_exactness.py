from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from exporters.exactness import EXACT_ANYWHERE, LEVELS, SAFE, pair_magnitude
from exporters.lowering import onnxruntime, openvino
from exporters.probe import make_probe
from tests.helpers import relative_error, run_reference


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 6), st.booleans())
def test_the_magnitude_of_pairs_is_that_of_the_worst_two_weights_of_one_output_channel(
    seed: int, outputs: int, inputs: int, first: bool
) -> None:
    codes = np.random.default_rng(seed).integers(-127, 128, (outputs, inputs)).astype(np.int8)
    pairs = [abs(int(a) + int(b)) for row in codes for a, b in itertools.combinations([*row, 0], 2)]
    assert pair_magnitude(codes if first else codes.T, 0 if first else 1) == max(pairs) / 2


@given(st.integers(0, 2**32 - 1))
def test_pairs_of_safe_weights_fit_16_bits_with_any_activation(seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-127, 128, (4, 6)).astype(np.int8)
    if pair_magnitude(codes, 0) <= SAFE:
        for row in codes.astype(int):
            for a, b in itertools.combinations(row, 2):
                for x, y in itertools.product((0, 255), repeat=2):
                    assert -(2**15) <= x * a + y * b < 2**15


def test_what_holds_anywhere_covers_4_bit_weights_and_no_signed_8_bit_ones() -> None:
    levels = {
        level
        for name, level in EXACT_ANYWHERE.levels.items()
        if name.endswith("int8") and not name.endswith("uint8")
    }
    assert levels == {SAFE}
    assert LEVELS[-1] <= SAFE < LEVELS[0]


def test_the_probes_exact_results_are_those_of_the_specifications_own_evaluator() -> None:
    for magnitude in LEVELS:
        for lower in (None, openvino.lower, onnxruntime.lower):
            probe = make_probe(magnitude)
            model = probe.model if lower is None else lower(probe.model)
            names = [value.name for value in model.graph.outputs]
            for name, found in zip(names, run_reference(model, probe.feeds), strict=True):
                assert relative_error(found, probe.exact[str(name)]) < 1e-5, name
