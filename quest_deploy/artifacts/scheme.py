"""The quantization scheme: what is quantized to how many bits, and where one timestep bucket ends
and the next begins.

No torch here: the scheme travels in every file of a workspace, and those who verify, benchmark or
serve need only this.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt

from quest_deploy.artifacts.schema import Bits, Positive, WeightBits, parse, validated
from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEME_VERSION, LOW_RANK_VERSION = 3, 4
"""Without and with branches of low rank: a scheme without reads and hashes as it did before them.
"""
LOW_RANK = ("low_rank", "low_rank_layers")
"""The fields that only a scheme of ``LOW_RANK_VERSION`` has."""
FLOAT_LAYERS = "float_layers"
"""The field that only a scheme has which leaves layers in float: a file without means none."""
SUPPORTED_BITS = ("w4a4", "w4a8", "w7a8", "w8a8")
DEFAULT_BUCKETS = 20
TRAIN_TIMESTEPS = 1000
FLOAT32_MAX = 2.0**128 - 2.0**104


class Granularity(StrEnum):
    """What one activation scale covers, besides its bucket."""

    PER_TENSOR = "per_tensor"
    """One scale a bucket: scale [K], smoothing scale all ones."""
    FOLDED_CHANNEL = "folded_channel"
    """One scale a bucket, times a static per-channel vector g [C] that is folded into the weights
    (x / g, g * W): scale [K], g [C].
    """
    PER_CHANNEL = "free_channel"
    """A scale and a zero-point of its own for each bucket and input channel: scale [K, C]. Not
    deployable: it lies on the reduction axis of the layer's product and cannot leave an integer
    GEMM, so such a model runs in float."""


class Symmetry(StrEnum):
    """Where a quantizer's zero lies."""

    SYMMETRIC = "symmetric"
    """Zero-point 0, codes -127..127."""
    ASYMMETRIC = "asymmetric"
    """A zero-point z in [0, 2^b - 1]: codes -z..2^b-1-z, the zero-point already subtracted."""
    UNSIGNED = "unsigned"
    """Zero-point 0, codes 0..2^b-1, for what is never negative: the softmax."""


@validated("scheme")
@dataclass(frozen=True)
class Scheme:
    """A validated quantization scheme.

    >>> Scheme.parse("w4a4", buckets=4).bucket_edges
    (250.0, 500.0, 750.0)

    Attributes:
        weight_bits: 4, 7 or 8, symmetric per output channel.
        activation_bits: 4 or 8. Eight-bit activations are symmetric (codes -127..127), four-bit
            ones asymmetric.
        first_last_bits: bits of weights and activations of the first and the last layer.
        eight_bit_layers: glob patterns of the module paths of other layers whose weights and
            inputs have 8 bits, whatever those of the rest have.
        granularity: see :class:`Granularity`; of the inputs of layers. Attention operands always
            have one scale a bucket.
        bucket_edges: K-1 strictly increasing timesteps; bucket(t) is the number of edges <= t.
        train_timesteps: the number of steps the model was trained with; timesteps lie in [0,
            train_timesteps).
        attention_bits: bits of attention's q, k and v, or None where they stay in float.
        softmax_bits: bits of attention's softmax (unsigned), or None where it stays in float.
        float_layers: glob patterns of the module paths of layers that are not quantized.
        split_shortcuts: whether a shortcut convolution that reads a concatenation has a quantizer
            for each half (Q-Diffusion).
        low_rank: the rank of the branches in FP16 beside layers (SVDQuant); 0 for none.
        low_rank_layers: glob patterns of the module paths of the layers that have one.
    """

    weight_bits: WeightBits
    activation_bits: Bits
    bucket_edges: tuple[float, ...]
    first_last_bits: Bits = 8
    eight_bit_layers: tuple[str, ...] = ()
    granularity: Granularity = Granularity.FOLDED_CHANNEL
    train_timesteps: Positive = TRAIN_TIMESTEPS
    attention_bits: Bits | None = None
    softmax_bits: Bits | None = None
    split_shortcuts: bool = False
    float_layers: tuple[str, ...] = ()
    low_rank: NonNegativeInt = 0
    low_rank_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        edges = self.bucket_edges
        if not all(math.isfinite(e) and 0 < e < self.train_timesteps for e in edges):
            raise ValueError(
                f"expected bucket edges between 0 and {self.train_timesteps}, both excluded, found "
                f"{edges}"
            )
        if any(e > FLOAT32_MAX or e != _float32(e) for e in edges):
            raise ValueError(
                "expected bucket edges that are float32 values, as the graph compares them"
            )
        if any(a >= b for a, b in itertools.pairwise(edges)):
            raise ValueError(f"expected bucket edges that increase strictly, found {edges}")
        if (self.low_rank > 0) != bool(self.low_rank_layers):
            raise ValueError(
                "expected both a rank of branches (--low-rank) and the layers that have one "
                "(--low-rank-layers; `quest-deploy sensitivity` picks those that make most of the "
                f"error), or neither; found {self.low_rank} and {self.low_rank_layers}"
            )

    @classmethod
    def parse(
        cls,
        bits: str,
        *,
        buckets: int = DEFAULT_BUCKETS,
        edges: Sequence[float] | None = None,
        granularity: Granularity = Granularity.FOLDED_CHANNEL,
        train_timesteps: int = TRAIN_TIMESTEPS,
        attention_bits: int | None = None,
        softmax_bits: int | None = None,
        split_shortcuts: bool = False,
        eight_bit_layers: Sequence[str] = (),
        float_layers: Sequence[str] = (),
        low_rank: int = 0,
        low_rank_layers: Sequence[str] = (),
    ) -> Scheme:
        """Make a scheme of ``buckets`` equally wide buckets, or of those between ``edges``, from a
        name such as "w4a4"; raise InputError for what is unknown.
        """
        if bits not in SUPPORTED_BITS:
            raise InputError(f"unknown bits {bits!r}: expected one of {', '.join(SUPPORTED_BITS)}")
        if not 1 <= buckets <= train_timesteps:
            raise InputError(
                f"expected 1 to {train_timesteps} buckets (the number of training steps), not "
                f"{buckets}"
            )
        weight_bits, activation_bits = (int(digit) for digit in (bits[1], bits[3]))
        if edges is None:
            edges = [train_timesteps * i / buckets for i in range(1, buckets)]
        # The graph compares in float32: an edge that float32 cannot hold would be another edge
        # there.
        return cls(
            weight_bits,
            activation_bits,
            as_float32(edges),
            granularity=granularity,
            train_timesteps=train_timesteps,
            attention_bits=attention_bits,
            softmax_bits=softmax_bits,
            split_shortcuts=split_shortcuts,
            eight_bit_layers=tuple(eight_bit_layers),
            float_layers=tuple(float_layers),
            low_rank=low_rank,
            low_rank_layers=tuple(low_rank_layers),
        )

    @property
    def name(self) -> str:
        """The short name, such as "w4a4"."""
        return f"w{self.weight_bits}a{self.activation_bits}"

    @property
    def buckets(self) -> int:
        """K, the number of buckets."""
        return len(self.bucket_edges) + 1

    def bucket_of(self, timestep: float) -> int:
        """The bucket of one timestep: the number of edges <= timestep."""
        return bisect.bisect_right(self.bucket_edges, timestep)

    def bucket_range(self, bucket: int) -> tuple[float, float]:
        """The timesteps [low, high) that fall into ``bucket``, of those the model was trained
        with.
        """
        bounds = (0.0, *self.bucket_edges, float(self.train_timesteps))
        return bounds[bucket], bounds[bucket + 1]

    def to_json(self) -> dict[str, Any]:
        """The scheme as a JSON value, with its version."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
            if (self.low_rank or name not in LOW_RANK)
            and (self.float_layers or name != FLOAT_LAYERS)
        }
        return {"version": LOW_RANK_VERSION if self.low_rank else SCHEME_VERSION, **values}

    @classmethod
    def from_json(cls, value: Any) -> Scheme:
        """Read :meth:`to_json`'s value; raise InputError for another version and for unknown or
        missing keys.
        """
        if not isinstance(value, dict):
            raise InputError(f"scheme: expected a JSON object, found {type(value).__name__}")
        found = dict(value)
        version = found.pop("version", None)
        branched = not found.keys().isdisjoint(LOW_RANK)
        wanted = LOW_RANK_VERSION if branched else SCHEME_VERSION
        if version != wanted:
            raise InputError(f"scheme: expected version {wanted}, found {version!r}")
        expected = {f.name for f in dataclasses.fields(cls)} - {FLOAT_LAYERS}
        expected -= set(() if branched else LOW_RANK)
        if missing := expected - found.keys():  # a file leaves none to a default
            raise InputError(f"scheme: the keys {sorted(missing)} are missing")
        return parse(cls, found, "scheme")


def quantile_edges(timesteps: Sequence[float], buckets: int) -> tuple[float, ...]:
    """The edges of ``buckets`` buckets that hold equally many of the ``timesteps``, or nearly, each
    midway between two of them.

    >>> quantile_edges([999, 687, 146, 0], 4)
    (73.0, 416.5, 843.0)

    Args:
        timesteps: of the schedule in use, in any order; a few-step schedule is seldom even.
        buckets: at most as many as there are different timesteps.
    """
    visited = sorted(set(timesteps))
    if not 1 <= buckets <= len(visited):
        raise InputError(
            f"expected 1 to {len(visited)} buckets (the number of different timesteps), not "
            f"{buckets}"
        )
    firsts = (len(visited) * i // buckets for i in range(1, buckets))
    return tuple((visited[i - 1] + visited[i]) / 2 for i in firsts)


def weight_range(bits: int) -> tuple[int, int]:
    """The codes of a symmetric weight: all of INT4 (-8..7); of more bits those of either sign, as
    TensorRT quantizes weights, INT8 without -128.
    """
    if bits == 4:
        return -8, 7
    highest = 2 ** (bits - 1) - 1
    return -highest, highest


def usual_symmetry(activation_bits: int) -> Symmetry:
    """Eight-bit activations are symmetric (zero-point 0, codes -127..127); four-bit ones have a
    zero-point in [0, 15].
    """
    return Symmetry.SYMMETRIC if activation_bits == 8 else Symmetry.ASYMMETRIC


def activation_levels(bits: int) -> int:
    """The highest code of an asymmetric activation, 2^b - 1; the zero-point lies in [0, 2^b -
    1].
    """
    return int(2**bits) - 1


def as_float32(edges: Sequence[float]) -> tuple[float, ...]:
    """The edges as the graph compares them."""
    return tuple(map(_float32, edges))


def _float32(value: float) -> float:
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)
