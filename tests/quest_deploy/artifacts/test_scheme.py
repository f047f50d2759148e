from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest_deploy.artifacts.model_source import ModelSource
from quest_deploy.artifacts.scheme import (
    SUPPORTED_BITS,
    Granularity,
    Scheme,
    activation_levels,
    quantile_edges,
    weight_range,
)
from tests.helpers import refused


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("granularity", Granularity)
def test_a_parsed_scheme_has_the_named_bits_and_survives_json(
    bits: str, granularity: Granularity
) -> None:
    scheme = Scheme.parse(bits, buckets=7, granularity=granularity, eight_bit_layers=["*.ff.*"])
    assert f"w{scheme.weight_bits}a{scheme.activation_bits}" == bits == scheme.name
    assert scheme.first_last_bits == 8
    assert Scheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme


def test_the_scheme_and_source_of_a_plain_unet_are_written_as_before_there_were_transformers() -> (
    None
):
    scheme = (
        '{"version": 3, "weight_bits": 4, "activation_bits": 4, "bucket_edges": [500.0], '
        '"first_last_bits": 8, "eight_bit_layers": [], "granularity": "folded_channel", '
        '"train_timesteps": 1000, "attention_bits": null, "softmax_bits": null, '
        '"split_shortcuts": false}'
    )
    source = (
        '{"name": "sd15", "location": null, "revision": null, "requested": null, '
        '"random_weights": false, "seed": 0, "loras": [], "fingerprint": null, '
        '"prediction_type": null}'
    )
    for text, made in ((scheme, Scheme.parse("w4a4", buckets=2)), (source, ModelSource("sd15"))):
        assert json.dumps(made.to_json()) == text
    assert Scheme.from_json(json.loads(scheme)) == Scheme.parse("w4a4", buckets=2)


@pytest.mark.parametrize(
    "bits", ["w4a16", "w3a4", "w7a7", "w8a7", "W4A4", "w4a4 ", "", "w44a4", "a4w4"]
)
def test_unknown_bits_are_refused_with_the_known_ones_listed(bits: str) -> None:
    with refused(repr(bits), *SUPPORTED_BITS):
        Scheme.parse(bits)


@pytest.mark.parametrize("buckets", [0, -1, 1001])
def test_a_number_of_buckets_outside_1_to_the_training_steps_is_refused(buckets: int) -> None:
    with refused("buckets", buckets, 1000):
        Scheme.parse("w4a4", buckets=buckets)


@given(buckets=st.integers(1, 1000))
def test_parsed_buckets_are_equally_wide_and_cover_all_training_steps(buckets: int) -> None:
    scheme = Scheme.parse("w4a4", buckets=buckets)
    assert scheme.buckets == buckets == len(scheme.bucket_edges) + 1
    ranges = [scheme.bucket_range(i) for i in range(buckets)]
    assert (ranges[0][0], ranges[-1][1]) == (0, 1000)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    np.testing.assert_allclose([high - low for low, high in ranges], 1000 / buckets, atol=1e-3)


@given(buckets=st.integers(1, 1000), timestep=st.floats(0, 1000, exclude_max=True))
def test_the_bucket_of_a_timestep_is_the_number_of_edges_at_or_below_it(
    buckets: int, timestep: float
) -> None:
    scheme = Scheme.parse("w4a4", buckets=buckets)
    bucket = scheme.bucket_of(timestep)
    assert bucket == sum(edge <= timestep for edge in scheme.bucket_edges)
    low, high = scheme.bucket_range(bucket)
    assert low <= timestep < high


@pytest.mark.parametrize("buckets", [2, 3, 20, 1000])
def test_a_timestep_on_an_edge_opens_the_next_bucket_and_just_below_it_does_not(
    buckets: int,
) -> None:
    scheme = Scheme.parse("w4a4", buckets=buckets)
    for i, edge in enumerate(scheme.bucket_edges):
        assert scheme.bucket_of(edge) == i + 1
        assert scheme.bucket_of(math.nextafter(edge, 0)) == i


@given(
    timesteps=st.lists(st.integers(0, 999), min_size=1, max_size=60, unique=True), data=st.data()
)
def test_quantile_buckets_hold_equally_many_timesteps_up_to_one(
    timesteps: list[int], data: st.DataObject
) -> None:
    buckets = data.draw(st.integers(1, len(timesteps)))
    scheme = Scheme.parse("w4a4", edges=quantile_edges(timesteps, buckets))
    counts = np.bincount([scheme.bucket_of(t) for t in timesteps])
    assert len(counts) == buckets
    assert counts.max() - counts.min() <= 1


def test_a_scheme_of_given_edges_has_the_float32_values_next_to_them() -> None:
    scheme = Scheme.parse("w4a8", edges=(0.1, 300.0, 999.9))
    assert scheme.bucket_edges == tuple(float(np.float32(edge)) for edge in (0.1, 300.0, 999.9))
    assert (scheme.buckets, scheme.name) == (4, "w4a8")


@pytest.mark.parametrize("buckets", [0, 4])
def test_more_quantile_buckets_than_timesteps_are_refused(buckets: int) -> None:
    with refused(buckets, 3):
        quantile_edges([1.0, 5.0, 5.0, 9.0], buckets)


def test_timesteps_beyond_training_fall_into_the_outer_buckets() -> None:
    scheme = Scheme.parse("w4a4", buckets=4)
    assert (scheme.bucket_of(-1.0), scheme.bucket_of(5000.0)) == (0, 3)


@pytest.mark.parametrize(
    "edges",
    [(0.0,), (1000.0,), (-5.0, 5.0), (5.0, 5.0), (6.0, 5.0), (math.nan,), (math.inf,)],
    ids=lambda e: str(e),
)
def test_edges_that_do_not_increase_strictly_inside_the_training_steps_are_refused(
    edges: tuple[float, ...],
) -> None:
    with refused("edges"):
        Scheme(4, 4, edges)


@pytest.mark.parametrize("field", ["weight_bits", "activation_bits", "first_last_bits"])
@pytest.mark.parametrize("bits", [3, 16, "4", None])
def test_bits_other_than_4_and_8_are_refused_by_name(field: str, bits: Any) -> None:
    with refused(field):
        Scheme(**{"weight_bits": 4, "activation_bits": 4, "bucket_edges": (), field: bits})


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1},
        {"version": None},
        {"rotation": "hadamard"},
        {"weight_bits": ...},
        {"granularity": "per_token"},
        {"bucket_edges": ["early"]},
        {"bucket_edges": 5},
        {"bucket_edges": [None]},
        {"bucket_edges": "123"},
        {"weight_bits": 4.0},
        {"train_timesteps": "1000"},
        {"train_timesteps": -1},
        {"train_timesteps": None, "bucket_edges": []},
    ],
    ids=str,
)
def test_json_that_is_not_a_scheme_of_this_version_is_refused(changes: dict[str, Any]) -> None:
    value = {**Scheme.parse("w4a4", buckets=4).to_json(), **changes}
    with refused("scheme"):
        Scheme.from_json({k: v for k, v in value.items() if v is not ...})


@pytest.mark.parametrize(("edge", "steps"), [(10**400, 1000), (1e39, 10**40)])
def test_an_edge_that_no_float_holds_is_refused(edge: float, steps: int) -> None:
    with refused("scheme"):
        Scheme.from_json(
            {**Scheme.parse("w4a4").to_json(), "bucket_edges": [edge], "train_timesteps": steps}
        )


@pytest.mark.parametrize("value", [None, [], "w4a4", 4])
def test_json_that_is_no_object_is_refused(value: Any) -> None:
    with refused("scheme", "JSON"):
        Scheme.from_json(value)


def test_code_ranges_are_those_of_the_formats() -> None:
    assert [weight_range(bits) for bits in (4, 7, 8)] == [(-8, 7), (-63, 63), (-127, 127)]
    assert (activation_levels(4), activation_levels(8)) == (15, 255)


BRANCHES: dict[str, Any] = {"low_rank": 4, "low_rank_layers": ["*.conv1"]}


def test_a_scheme_with_branches_survives_json_and_one_without_has_no_trace_of_them() -> None:
    scheme = Scheme.parse("w4a4", **BRANCHES)
    value = json.loads(json.dumps(scheme.to_json()))
    assert (value["version"], Scheme.from_json(value)) == (4, scheme)
    plain = Scheme.parse("w4a4").to_json()
    assert plain["version"] == 3
    assert not [key for key in plain if key in BRANCHES]
    assert list(plain) == [key for key in value if key not in BRANCHES]


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 3},
        {"low_rank": ...},
        {"low_rank_layers": ...},
        {"low_rank": 0},
        {"low_rank": -1},
        {"low_rank": 1.5},
        {"low_rank_layers": []},
        {"low_rank_layers": "*"},
    ],
    ids=str,
)
def test_json_with_half_of_what_branches_take_is_refused(changes: dict[str, Any]) -> None:
    value = {**Scheme.parse("w4a4", **BRANCHES).to_json(), **changes}
    with refused("scheme"):
        Scheme.from_json({k: v for k, v in value.items() if v is not ...})


@pytest.mark.parametrize("chosen", [{"low_rank": 4}, {"low_rank_layers": ["*"]}], ids=str)
def test_a_rank_without_layers_and_layers_without_a_rank_are_refused(
    chosen: dict[str, Any],
) -> None:
    with refused("--low-rank", "--low-rank-layers"):
        Scheme.parse("w4a4", **chosen)
