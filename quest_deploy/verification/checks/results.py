"""What verification found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class QuantizerResult:
    """A quantizer's codes against the reference's, over all buckets."""

    site: str
    codes: int
    mismatches: int
    unexplained: int


@dataclass(frozen=True)
class LayerResult:
    """A layer's output against the reference's: the worst relative error over buckets and output
    channels, its bucket, the allowed.
    """

    layer: str
    error: float
    bucket: int
    tolerance: float


@dataclass(frozen=True)
class SegmentResult:
    """The float part in front of a quantizer, product or the output: its worst relative error, that
    one's bucket, and what is allowed.

    Attributes:
        informative: whether that is at most 5%; above, rounding alone changes the segment so much
            that nothing is proved.
        misread: values that it reads in the engine, and not in the fake-quantized model; its error
            is infinite then.
    """

    segment: str
    error: float
    bucket: int
    tolerance: float
    informative: bool
    misread: list[str]


@dataclass(frozen=True)
class BucketResult:
    """One bucket: its codes over the quantizers checked in it, its worst layer and segment, and the
    whole model at one timestep of it.
    """

    bucket: int
    timestep: float
    sites: int
    codes: int
    mismatches: int
    unexplained: int
    layer_error: float
    segment_error: float
    end_to_end_error: float


@dataclass(frozen=True)
class Coverage:
    """How much of the model was checked: of all quantizers and layers (products too), those that
    any record of the reference holds.

    Attributes:
        fewest_buckets, most_buckets: in how many of all buckets a quantizer that was checked was
            checked.
        unchecked: the quantizers that were not.
    """

    sites: int
    all_sites: int
    layers: int
    all_layers: int
    fewest_buckets: int
    most_buckets: int
    all_buckets: int
    unchecked: list[str]


@dataclass(frozen=True)
class Verification:
    """All results, and whether they pass.

    Attributes:
        wrong_buckets: timesteps, of those tried around every edge, whose bucket the engine chose
            wrongly.
        end_to_end_tolerance: twice the model's own largest sensitivity to last-bit differences, or
            a layer's tolerance.
        end_to_end_informative: whether that is at most 5%; above, the verdict rests on layers and
            segments.
        problems: why it fails, in words; empty if it passes.
    """

    backend: str
    coverage: Coverage
    wrong_buckets: list[float]
    sites: list[QuantizerResult]
    layers: list[LayerResult]
    segments: list[SegmentResult]
    buckets: list[BucketResult]
    layer_tolerance: float
    end_to_end_tolerance: float
    end_to_end_informative: bool
    problems: list[str]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The verification as a JSON value."""
        return {"passed": self.passed, **asdict(self)}
