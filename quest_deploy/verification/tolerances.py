"""What counts as a mismatch, and what explains one. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quest_deploy.quantization.affine_numpy import TIE_ULPS, tie_distance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

LAYER_TOLERANCE = 3e-5
"""The largest relative error of a layer's output channel; correct runtimes were seen to differ by
up to 5e-6 where a sum cancels.
"""
SEGMENT_TOLERANCE = 1e-4
"""The largest relative error of a channel of what a segment gives; correct runtimes were seen to
differ by up to 3e-5 behind a GELU.
"""
ROUNDING_FACTOR = 4.0
"""The error allowed where a segment's rounding is worse, in units of what rounding was seen to do
to it.
"""
SENSITIVITY_FACTOR = 2.0
"""The end-to-end error allowed, in units of the model's own sensitivity to last-bit differences."""
LOW_PRECISION_ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}
"""The largest relative error of rounding to a low-precision type."""
LAYER_ROUNDINGS = 6
"""How often a layer's result may be rounded to a low-precision type: its weights, their scale and
sum, a factor, and after it.
"""
SEGMENT_ROUNDINGS = 8
"""How often a segment's may be: in what it reads, in the sums of a residual path, in the factors of
a SiLU or GELU.
"""
INFORMATIVE = 0.05
"""The largest tolerance under which a comparison says something."""


@dataclass(frozen=True)
class CodeMismatches:
    """Codes compared, those that differ, and those of them that no tie explains."""

    codes: int
    mismatches: int
    unexplained: int

    def __add__(self, other: CodeMismatches) -> CodeMismatches:
        return CodeMismatches(
            self.codes + other.codes,
            self.mismatches + other.mismatches,
            self.unexplained + other.unexplained,
        )


def layer_tolerance(half: str | None) -> float:
    """The largest relative error of an output channel of a layer whose result has the low-precision
    type, or None for FP32.
    """
    return LAYER_TOLERANCE if half is None else LAYER_ROUNDINGS * LOW_PRECISION_ROUNDING[half]


def segment_tolerance(rounding: float, half: str | None) -> float:
    """The largest relative error of a channel of what a segment gives.

    Args:
        rounding: what rounding to FP32 was seen to do to it; a low-precision type's rounding does
            as much more as it is coarser.
        half: the low-precision type of any value that it reads or gives; None for FP32 alone.
    """
    if half is None:
        return max(SEGMENT_TOLERANCE, ROUNDING_FACTOR * min(rounding, 1.0))
    coarser = LOW_PRECISION_ROUNDING[half] / 2.0**-24
    return max(
        SEGMENT_ROUNDINGS * LOW_PRECISION_ROUNDING[half],
        ROUNDING_FACTOR * min(rounding * coarser, 1.0),
    )


def compare_codes(codes: NDArray[Any], expected: NDArray[Any], ratio: Floats) -> CodeMismatches:
    """Count mismatches; one is explained if the codes are neighbours and x/step lies within 4 ulp
    of a tie.

    Codes are int8, or whole float32 numbers, of the same shape as ``ratio``.
    """
    different = codes != expected
    found, wanted, ratio = (x[different] for x in (codes, expected, ratio))
    neighbours = np.abs(found.astype(np.float64) - wanted.astype(np.float64)) <= np.maximum(
        1, np.spacing(np.abs(ratio))
    )
    explained = neighbours & (tie_distance(ratio) <= TIE_ULPS)
    return CodeMismatches(codes.size, found.size, int((~explained).sum()))


@dataclass(frozen=True)
class ChannelErrors:
    """Of each row and output channel of a layer, float64 [rows, channels]: the norm of its error,
    and its own norm.

    Attributes:
        least: what a channel's error is relative to at least, float64 [rows, 1].
    """

    error: NDArray[np.float64]
    norm: NDArray[np.float64]
    least: NDArray[np.float64]

    @classmethod
    def of(
        cls, y: Floats, expected: Floats, channel_axis: int, half: str | None = None
    ) -> ChannelErrors:
        """Those of y [rows, ...].

        Where y is a vector [rows, channels], a channel is one number, in which the sum may cancel,
        while rounding is that of its terms: the error is relative to a tenth of the row's usual
        channel at least; to all of it where a low-precision type rounds the terms.
        """
        axes = tuple(axis for axis in range(1, y.ndim) if axis != channel_axis % y.ndim)
        error, norm = (
            np.sqrt(np.square(x, dtype=np.float64).sum(axes)) for x in (y - expected, expected)
        )
        usual = np.sqrt(np.square(norm).mean(1, keepdims=True))
        share = 0.0 if y.ndim > 2 else 0.1 if half is None else 1.0
        return cls(error, norm, share * usual)


def layer_error(records: Sequence[ChannelErrors]) -> Floats:
    """The relative error of each row of a layer's records, float32 [rows]: its worst channel's, NaN
    counting as the largest float.

    A channel's error is relative to its norm in that row, or to a tenth of its norm over all rows
    where it happens to cancel there.
    """
    error, norm, least = (
        np.concatenate([getattr(record, name) for record in records])
        for name in ("error", "norm", "least")
    )
    usual = np.sqrt(np.square(norm).mean(0)) + np.finfo(np.float64).tiny
    worst: Floats = (error / np.maximum(np.maximum(norm, 0.1 * usual), least)).max(1)
    return _finite(worst)


def segment_error(x: NDArray[Any], expected: NDArray[Any], channel_axis: int) -> Floats:
    """The relative error of each row of x [rows, ...], float32 [rows]: its worst channel's, NaN
    counting as the largest float.

    A channel's error is relative to its norm, or to a tenth of the channels' usual norm where a
    GELU or a softmax makes it vanish.
    """
    axes = tuple(axis for axis in range(1, x.ndim) if axis != channel_axis % x.ndim)
    error = np.sqrt(np.square(x - expected, dtype=np.float64).sum(axes))
    norm = np.sqrt(np.square(expected, dtype=np.float64).sum(axes))
    usual = np.sqrt(np.square(norm).mean(1, keepdims=True)) + np.finfo(np.float64).tiny
    worst: Floats = (error / np.maximum(norm, 0.1 * usual)).max(1)
    return _finite(worst)


def relative_error(y: Floats, expected: Floats) -> Floats:
    """|y - expected| / |expected| of each sample, float32 [B], NaN counting as the largest
    float.
    """
    flat, reference = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (y, expected))
    error: Any = np.linalg.norm(flat - reference, axis=1) / np.linalg.norm(reference, axis=1)
    return _finite(error)


def _finite(error: NDArray[Any]) -> Floats:
    """NaN and infinity as float32's largest number: JSON has neither."""
    largest = float(np.finfo(np.float32).max)
    return np.where(np.isfinite(error), np.minimum(error, largest), largest).astype(np.float32)
