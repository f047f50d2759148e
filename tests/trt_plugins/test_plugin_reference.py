"""The plugins' scalar references, built with a C++ compiler alone, are the exporter's definition;
how the kernels avoid dividing.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from exporters.ops import geglu_timestep_quantize, timestep_quantize
from tests.helpers import Array, Feeds, along, graph_from_text, of_sample, session

PLUGINS = Path(__file__).parents[2] / "trt_plugins"
SOURCES = (
    "tests/reference_api.cpp",
    "timestep_quantize/reference.cpp",
    "geglu_timestep_quantize/reference.cpp",
)
FLAGS = (
    "-std=c++17",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
)
DTYPES = {"float": np.float32, "float16": np.float16}
ROWS = [  # scale, low, high, offset
    (0.11, -3, 12, 0),
    (0.25, -8, 7, 0),
    (0.013, -127, 127, 0),
    (1 / 255, 0, 255, -128),
    (1.0, 0, 0, 5),
    (3.5, -128, 127, 0),
    (1e-39, -15, 15, 0),
    (6e37, -15, 15, 0),
    (1e-45, -1, 1, 0),
    (0.5, 0, 15, 0),
]
TABLES: dict[str, Array] = {
    name: np.asarray(column, np.float32)
    for name, column in zip(timestep_quantize.TABLES, zip(*ROWS, strict=True), strict=True)
}
SPECIAL = np.asarray(
    [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        1e-45,
        -1e-45,
        1.17e-38,
        3.4e38,
        -3.4e38,
        65504.0,
        6e-8,
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
    ],
    np.float32,
)
"""Both zeros, infinities, subnormals, the largest of FP32 and FP16, ties."""


class Reference:
    """The shared library: bits of a 16-bit type are passed as uint16."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the library; arrays go by pointer, Python's numbers as the given
        ctypes.
        """
        getattr(self.library, name)(
            *(
                a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a
                for a in arguments
            )
        )

    def tables(self, bucket: Array, tables: Mapping[str, Array], channel: Array) -> tuple[Any, ...]:
        columns = [tables[name] for name in timestep_quantize.TABLES]
        is_int64 = ctypes.c_bool(bucket.dtype == np.int64)
        return (
            bucket,
            is_int64,
            *columns,
            ctypes.c_int32(len(columns[0])),
            channel,
            ctypes.c_int32(len(channel)),
        )

    def codes(
        self, x: Array, bucket: Array, tables: Mapping[str, Array], channel: Array, axis: int
    ) -> Array:
        codes = np.empty(x.shape, np.int8)
        outer, inner = (int(np.prod(shape)) for shape in (x.shape[1:axis], x.shape[axis + 1 :]))
        shape = (
            ctypes.c_int32(x.shape[0]),
            ctypes.c_int32(outer),
            ctypes.c_int32(x.shape[axis]),
            ctypes.c_int64(inner),
        )
        self.call(
            "quest_timestep_quantize",
            x,
            _type_of(x),
            *self.tables(bucket, tables, channel),
            *shape,
            codes,
        )
        return codes

    def geglu_codes(
        self, x: Array, bucket: Array, tables: Mapping[str, Array], channel: Array
    ) -> tuple[Array, Array]:
        """The codes, and the activations that they are of."""
        shape = (*x.shape[:-1], x.shape[-1] // 2)
        codes, activations = np.empty(shape, np.int8), np.empty(shape, np.float32)
        sizes = (
            ctypes.c_int32(shape[0]),
            ctypes.c_int32(int(np.prod(shape[1:-1]))),
            ctypes.c_int32(shape[-1]),
        )
        arguments = (*self.tables(bucket, tables, channel), *sizes, codes, activations)
        self.call("quest_geglu_timestep_quantize", x, _type_of(x), *arguments)
        return codes, activations

    def exact(self, x: Array, step: float, low: float, high: float, offset: float) -> Array:
        codes = np.empty(x.shape, np.int8)
        numbers = (ctypes.c_float(value) for value in (step, low, high, offset))
        self.call("quest_exact_codes", x, ctypes.c_int64(x.size), *numbers, codes)
        return codes

    def fast(
        self, x: Array, step: float, low: float, high: float, offset: float, ulps: int
    ) -> tuple[Array, Array]:
        """The codes of the short way, its reciprocal ``ulps`` beside the right one; and which
        elements it leaves to the division.
        """
        codes, undecided = np.empty(x.shape, np.int8), np.empty(x.shape, np.bool_)
        numbers = (ctypes.c_float(value) for value in (step, low, high, offset))
        self.call(
            "quest_fast_codes",
            x,
            ctypes.c_int64(x.size),
            *numbers,
            ctypes.c_int32(ulps),
            codes,
            undecided,
        )
        return codes, undecided


def _type_of(x: Array) -> ctypes.c_int32:
    return ctypes.c_int32(
        {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}[x.dtype]
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is here")
    library = tmp_path_factory.mktemp("reference") / "libquest_reference_api.so"
    sources = [str(PLUGINS / source) for source in SOURCES]
    subprocess.run([compiler, *FLAGS, f"-I{PLUGINS}", *sources, "-o", str(library)], check=True)
    return Reference(library)


def function_session(dtype: str, shape: str, axis: int) -> Callable[[Feeds], list[Array]]:
    """onnxruntime on the op's function, as the portable graph carries it."""
    text = f"""
    one ({dtype}[{shape}] x, int64[batch] bucket, float[buckets] scale, float[buckets] low, float[buckets] high, float[buckets] offset,
         float[channels] channel) => (int8[{shape}] codes)
    {{ codes = quest.TimestepQuantize <axis = {axis}> (x, bucket, scale, low, high, offset, channel) }}
    """
    model = graph_from_text(text)
    model.graph.opset_imports.pop("quest.export")
    return session(model)


@pytest.fixture(scope="module")
def onnxruntime_codes() -> Callable[..., Array]:
    """The definition itself: (x, bucket, tables, channel, axis) -> codes, by onnxruntime."""
    sessions: dict[tuple[str, int, int], Callable[[Feeds], list[Array]]] = {}

    def codes(
        x: Array, bucket: Array, tables: Mapping[str, Array], channel: Array, axis: int
    ) -> Array:
        dtype = {np.dtype(np.float32): "float", np.dtype(np.float16): "float16"}[x.dtype]
        key = dtype, x.ndim, axis
        if key not in sessions:
            sessions[key] = function_session(
                dtype, ",".join(["batch", "a", "b", "c", "d"][: x.ndim]), axis
            )
        return sessions[key]({"x": x, "bucket": bucket, **tables, "channel": channel})[0]

    return codes


def adversarial(rng: np.random.Generator, shape: tuple[int, ...], step: Array) -> Array:
    """float32 values: spread over the codes of ``step``, which broadcasts; on their ties and beside
    them, special, any bits.
    """
    kind = rng.integers(0, 10, shape)
    ratio = rng.uniform(-20, 20, shape).astype(np.float32) * np.where(
        rng.random(shape) < 0.3, np.float32(12), np.float32(1)
    )
    with np.errstate(over="ignore", invalid="ignore"):
        spread, tie = ratio * step, (np.rint(ratio) + np.float32(0.5)) * step
        beside = np.nextafter(
            tie, np.where(rng.random(shape) < 0.5, np.float32(np.inf), np.float32(-np.inf))
        )
        bits = rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
    x = np.select(
        [kind < 5, kind < 7, kind < 8, kind < 9],
        [spread, tie, beside, rng.choice(SPECIAL, shape)],
        bits,
    )
    return np.where(np.isnan(x), np.float32(0), x).astype(np.float32)


def assert_codes(
    codes: Array,
    expected: Array,
    x: Array,
    bucket: Array,
    tables: Mapping[str, Array],
    channel: Array,
    axis: int,
) -> None:
    """Check the codes; where the ratio is no number (0 / 0, by a step that underflows), they must
    be the lowest.
    """
    with np.errstate(all="ignore"):
        ratio = x.astype(np.float32) / (
            of_sample(tables["scale"], bucket, x.ndim) * along(channel, axis, x.ndim)
        )
    undefined = np.isnan(ratio)
    np.testing.assert_array_equal(codes[~undefined], expected[~undefined])
    lowest = np.broadcast_to(of_sample(tables["low"] + tables["offset"], bucket, x.ndim), x.shape)
    np.testing.assert_array_equal(codes[undefined], lowest[undefined])


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((20, 7), 1), ((20, 5, 6), 1), ((20, 5, 6), 2), ((20, 4, 3, 5), 1), ((20, 2, 3, 4), 3)],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bucket_type", [np.int64, np.int32])
def test_every_code_is_onnxruntimes_for_every_rank_axis_and_type(
    reference: Reference,
    onnxruntime_codes: Callable[..., Array],
    shape: tuple[int, ...],
    axis: int,
    dtype: Any,
    bucket_type: Any,
) -> None:
    rng = np.random.default_rng([*shape, axis])
    for channels in (shape[axis], 1):
        bucket = rng.permutation(np.arange(shape[0]) % len(ROWS))
        channel = np.exp(rng.uniform(-3, 3, channels)).astype(np.float32)
        with np.errstate(over="ignore"):
            x = adversarial(
                rng,
                shape,
                of_sample(TABLES["scale"], bucket, len(shape)) * along(channel, axis, len(shape)),
            ).astype(dtype)
        expected = onnxruntime_codes(x, bucket, TABLES, channel, axis)
        codes = reference.codes(x, bucket.astype(bucket_type), TABLES, channel, axis)
        assert_codes(codes, expected, x, bucket, TABLES, channel, axis)


floats = st.floats(width=32, allow_nan=False)


@settings(max_examples=300, deadline=None)
@given(
    x=hnp.arrays(np.float32, (3, 4), elements=floats),
    scale=st.floats(2.0**-149, 2.0**127, width=32),
    channel=hnp.arrays(np.float32, 4, elements=st.floats(2.0**-20, 2.0**20, width=32)),
    low=st.integers(-128, 0),
    width=st.integers(0, 255),
    shift=st.integers(-300, 300),
)
def test_any_finite_number_scale_and_bounds_give_onnxruntimes_codes(
    reference: Reference,
    onnxruntime_codes: Callable[..., Array],
    x: Array,
    scale: float,
    channel: Array,
    low: int,
    width: int,
    shift: int,
) -> None:
    high = min(low + width, 127)
    rows = [(scale, low - shift, high - shift, shift)] * 2  # codes end up within [low, high]
    tables = {
        name: np.asarray(column, np.float32)
        for name, column in zip(TABLES, zip(*rows, strict=True), strict=True)
    }
    bucket = np.asarray([0, 1, 0])
    expected = onnxruntime_codes(x, bucket, tables, channel, 1)
    assert_codes(
        reference.codes(x, bucket, tables, channel, 1), expected, x, bucket, tables, channel, 1
    )


def test_nan_gives_the_lowest_code_and_infinities_clamp(reference: Reference) -> None:
    x = np.asarray([[np.nan, np.inf, -np.inf]] * len(ROWS), np.float32)
    codes = reference.codes(x, np.arange(len(ROWS)), TABLES, np.ones(1, np.float32), 1)
    low, high = (TABLES[bound] + TABLES["offset"] for bound in ("low", "high"))
    np.testing.assert_array_equal(codes, np.stack([low, high, low], axis=1))


def test_a_bucket_out_of_range_is_the_nearest_one_in_range(reference: Reference) -> None:
    x = np.linspace(-30, 30, 5 * 100, dtype=np.float32).reshape(5, 100)
    ones, last = np.ones(1, np.float32), len(ROWS) - 1
    given_buckets = np.asarray([-1, -(2**40), last + 1, 2**40, 0])
    codes = reference.codes(x, given_buckets, TABLES, ones, 1)
    np.testing.assert_array_equal(
        codes, reference.codes(x, np.asarray([0, 0, last, last, 0]), TABLES, ones, 1)
    )
    as_int32 = np.asarray([-1, -(2**31), last + 1, 2**31 - 1, 0], np.int32)
    np.testing.assert_array_equal(codes, reference.codes(x, as_int32, TABLES, ones, 1))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_number_of_a_16_bit_type_is_read_right(reference: Reference, bfloat16: bool) -> None:
    bits, found = np.arange(2**16, dtype=np.uint16), np.empty(2**16, np.float32)
    reference.call(
        "quest_float_from_half", bits, ctypes.c_int64(bits.size), ctypes.c_bool(bfloat16), found
    )
    expected = (
        (bits.astype(np.uint32) << 16).view(np.float32)
        if bfloat16
        else bits.view(np.float16).astype(np.float32)
    )
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def test_bfloat16_codes_are_those_of_its_float32_values(reference: Reference) -> None:
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**16, (20, 64), dtype=np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    bits[np.isnan(values)] = 0
    bucket, channel = np.arange(20) % len(ROWS), np.ones(1, np.float32)
    as_float = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(
        reference.codes(bits, bucket, TABLES, channel, 1),
        reference.codes(as_float, bucket, TABLES, channel, 1),
    )


STEPS = [0.11, 0.25, 1.0, 1 / 3, 3e-5, 7e8, 2.0**-100, 2.0**100, 1.0000001, 0.99999994]


@pytest.mark.parametrize("ulps", [-1, 0, 1])
@pytest.mark.parametrize(
    ("low", "high", "offset"),
    [(-15, 15, 0), (-3, 12, 0), (-127, 127, 0), (0, 255, -128), (0, 0, 7), (-200, 55, 72)],
)
def test_the_kernels_short_way_never_decides_for_another_code_than_the_division_and_seldom_not_at_all(
    reference: Reference, low: int, high: int, offset: int, ulps: int
) -> None:
    rng = np.random.default_rng(5)
    for step in STEPS:
        exact_step = np.float32(step)
        uniform = (rng.uniform(low - 2, high + 2, 200_000) * exact_step).astype(np.float32)
        ties = (np.arange(low - 2, high + 2, dtype=np.float32) + np.float32(0.5)) * exact_step
        near = [ties]
        for _ in range(6):  # what lies up to six units in the last place beside each tie
            near += [
                np.nextafter(near[0], np.float32(np.inf)),
                np.nextafter(near[-1], np.float32(-np.inf)),
            ]
            near[0] = near[-2]
        halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
        x = np.concatenate(
            [uniform, *near, ties, SPECIAL, halves[~np.isnan(halves)], np.float32([np.nan])]
        )
        fast, undecided = reference.fast(x, step, low, high, offset, ulps)
        exact = reference.exact(x, step, low, high, offset)
        np.testing.assert_array_equal(fast[~undecided], exact[~undecided])
        assert undecided[: len(uniform)].mean() < (2e-4 if step not in (2.0**-100, 2.0**100) else 1)
        assert undecided[
            np.isin(x, ties[(ties > low * exact_step) & (ties < high * exact_step)])
        ].all()


@pytest.mark.parametrize(
    ("step", "low", "high", "offset"),
    [
        (1e-39, -15, 15, 0),
        (2.0**101, -15, 15, 0),
        (0.0, -15, 15, 0),
        (1.0, -3.5, 2, 0),
        (1.0, -3, 12, 0.5),
        (1.0, -200, 0, 0),
        (1.0, 5, -5, 0),
    ],
)
def test_what_the_short_way_cannot_bound_is_left_to_the_division(
    reference: Reference, step: float, low: float, high: float, offset: float
) -> None:
    assert reference.fast(np.linspace(-30, 30, 100, dtype=np.float32), step, low, high, offset, 0)[
        1
    ].all()


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_geglus_codes_are_onnxruntimes_but_on_ties(reference: Reference, dtype: str) -> None:
    text = f"""
    one ({dtype}[batch,a,b] x, int64[batch] bucket, float[buckets] scale, float[buckets] low, float[buckets] high,
         float[buckets] offset, float[channels] channel) => (int8[batch,a,c] codes)
    {{ codes = quest.GegluTimestepQuantize (x, bucket, scale, low, high, offset, channel) }}
    """
    model = graph_from_text(text)
    model.graph.opset_imports.pop("quest.export")
    function = geglu_timestep_quantize.function_body()
    model.functions[function.identifier()] = function
    rng = np.random.default_rng(9)
    x = (rng.standard_normal((40, 30, 2 * 24)) * 3).astype(DTYPES[dtype])
    ordinary = [i for i, row in enumerate(ROWS) if 1e-3 < row[0] < 10]
    bucket, channel = rng.choice(ordinary, 40), np.exp(rng.uniform(-1, 1, 24)).astype(np.float32)
    (expected,) = session(model)({"x": x, "bucket": bucket, **TABLES, "channel": channel})
    codes, activations = reference.geglu_codes(x, bucket, TABLES, channel)
    ratio = activations.astype(np.float64) / (TABLES["scale"][bucket][:, None, None] * channel)
    from_tie = np.abs(np.abs(ratio - np.rint(ratio)) - 0.5)
    decided = from_tie > 2e-6 * np.maximum(1, np.abs(ratio))
    assert decided.mean() > 0.99
    np.testing.assert_array_equal(codes[decided], expected[decided])
    assert np.abs(codes.astype(int) - expected).max() <= 1
