"""The arithmetic of the activation quantizers in numpy, for those who have no torch: the twin of
``affine``. And how far a value is from a rounding tie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quest_deploy.artifacts.reference import IntegerTables

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quest_deploy.artifacts.reference import PerChannelTables

    Floats = NDArray[np.float32]

TIE_ULPS = 4
"""An activation within this many ulp of a rounding tie may get either code."""


def step(
    x: NDArray[Any], bucket: NDArray[Any], tables: IntegerTables | PerChannelTables, axis: int
) -> Floats:
    """Return what x [rows, ...] is divided by before it is rounded."""
    scale = _of_rows(tables.scale, x, bucket, axis)
    # Ones may lie along a product's tokens, of which samples of another size have another number.
    if not isinstance(tables, IntegerTables) or (tables.channel == 1).all():
        return scale
    return np.asarray(
        scale * tables.channel.reshape(-1, *[1] * (x.ndim - 1 - axis % x.ndim)), np.float32
    )


def ratio(
    x: NDArray[Any], bucket: NDArray[Any], tables: IntegerTables | PerChannelTables, axis: int
) -> Floats:
    """Return what is rounded, float32 of x's shape [rows, ...]."""
    return np.asarray(x.astype(np.float32, copy=False) / step(x, bucket, tables, axis), np.float32)


def levels(
    x: NDArray[Any], bucket: NDArray[Any], tables: IntegerTables | PerChannelTables, axis: int
) -> Floats:
    """Return what x is rounded to, in steps: whole numbers, within the bounds."""
    rounded = np.rint(ratio(x, bucket, tables, axis))
    if isinstance(tables, IntegerTables):
        low, high = (_of_rows(bound, x, bucket, axis) for bound in (tables.low, tables.high))
        return np.asarray(np.clip(rounded, low, high), np.float32)
    zero_point = _of_rows(tables.zero_point, x, bucket, axis)
    low, high = tables.range.astype(np.float32)
    return np.asarray(np.clip(rounded + zero_point, low, high) - zero_point, np.float32)


def codes(
    x: NDArray[Any], bucket: NDArray[Any], tables: IntegerTables | PerChannelTables, axis: int
) -> NDArray[Any]:
    """The codes of x by the op's definition: int8, or float32 of a per-channel quantizer."""
    whole = levels(x, bucket, tables, axis)
    if not isinstance(tables, IntegerTables):
        return whole
    return np.asarray(whole + _of_rows(tables.offset, x, bucket, axis), np.int8)


def tie_distance(ratio: Floats) -> Floats:
    """How far x/step lies from the nearest value halfway between two integers, in ulp of x/step
    itself.
    """
    ulp = np.spacing(np.maximum(np.abs(ratio), np.float32(0.25)))  # no tie lies below 0.5
    distance = np.abs(ratio - (np.floor(ratio) + np.float32(0.5))) / ulp
    return np.asarray(distance, np.float32)


def _of_rows(table: NDArray[Any], x: NDArray[Any], bucket: NDArray[Any], axis: int) -> NDArray[Any]:
    """A table [K], or [K, C] along ``axis``, at each row's bucket, to broadcast against x
    [rows, ...].
    """
    shape = [len(x), *[1] * (x.ndim - 1)]
    if table.ndim == 2:
        shape[axis] = -1
    return np.asarray(table[bucket].reshape(shape))
