"""From what each check found to the verification's result: per quantizer, layer, segment and
bucket."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from quest_deploy.verification.checks.results import (
    BucketResult,
    Coverage,
    LayerResult,
    QuantizerResult,
    SegmentResult,
    Verification,
)
from quest_deploy.verification.tolerances import (
    INFORMATIVE,
    SENSITIVITY_FACTOR,
    CodeMismatches,
    layer_tolerance,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from exporters.graph_info import GraphInfo
    from quest_deploy.artifacts.reference import Record
    from quest_deploy.verification.checks.engine import ByRecord, CheckedEngine
    from quest_deploy.verification.checks.segments import Segment


def summarize(
    engine: CheckedEngine,
    records: list[Record],
    wrong_buckets: list[float],
    codes: ByRecord[list[CodeMismatches]],
    errors: ByRecord[NDArray[np.float32]],
    segments: dict[str, Segment],
    end_to_end: list[NDArray[np.float32]],
) -> Verification:
    """The verification's result.

    Args:
        wrong_buckets: see :class:`Verification`.
        codes: of each quantizer.
        errors: of each layer and product.
        end_to_end: of each record.
    """
    info = engine.info
    allowed = {
        name: layer_tolerance(engine.types.half(entry.output))
        for name, entry in (info.layers | info.matmuls).items()
    }
    half = engine.types.half(*(entry.output for entry in (info.layers | info.matmuls).values()))
    sensitivity = max(max(of) for record in records if (of := record.sensitivity(half)) is not None)
    tolerance = max(layer_tolerance(half), SENSITIVITY_FACTOR * sensitivity)
    none = CodeMismatches(0, 0, 0)
    quantizers = [
        QuantizerResult(
            quantizer, **asdict(sum((c for rows in found.values() for c in rows), none))
        )
        for quantizer, found in codes.items()
    ]
    layers = []
    for layer, found in errors.items():
        worst, bucket = max(
            (float(e), b)
            for i, row in found.items()
            for e, b in zip(row, records[i].bucket.tolist(), strict=True)
        )
        layers.append(LayerResult(layer, worst, bucket, allowed[layer]))
    buckets: dict[int, BucketResult] = {}
    for i, record in enumerate(records):
        for sample, bucket in enumerate(record.entry.buckets):
            rows_of = (sample, sample + 2)  # its real activations, and its probe
            of_codes = (c for of in codes.values() if i in of for c in of[i][sample::2])
            result = BucketResult(
                bucket,
                record.entry.timesteps[sample],
                len(record.entry.sites),
                **asdict(sum(of_codes, none)),
                layer_error=max(
                    float(of[i][row]) for of in errors.values() if i in of for row in rows_of
                ),
                segment_error=max(
                    float(segment.errors[i][sample])
                    for segment in segments.values()
                    if i in segment.errors
                ),
                end_to_end_error=float(end_to_end[i][sample]),
            )
            buckets[bucket] = result if bucket not in buckets else _merged(buckets[bucket], result)
    between = [_segment_result(name, segment, records) for name, segment in segments.items()]
    return Verification(
        backend=engine.backend.name,
        coverage=_coverage(info, records, len(errors)),
        wrong_buckets=wrong_buckets,
        sites=quantizers,
        layers=layers,
        segments=between,
        buckets=[buckets[b] for b in sorted(buckets)],
        layer_tolerance=max(allowed.values()),
        end_to_end_tolerance=tolerance,
        end_to_end_informative=tolerance <= INFORMATIVE,
        problems=_problems(
            wrong_buckets,
            quantizers,
            layers,
            between,
            list(buckets.values()),
            info.scheme.buckets,
            tolerance,
        ),
    )


def _segment_result(name: str, segment: Segment, records: list[Record]) -> SegmentResult:
    worst, bucket = max(
        (float(e), b)
        for i, row in segment.errors.items()
        for e, b in zip(row, records[i].entry.buckets, strict=True)
    )
    return SegmentResult(
        name, worst, bucket, segment.tolerance, segment.tolerance <= INFORMATIVE, segment.misread
    )


def _coverage(info: GraphInfo, records: list[Record], layers: int) -> Coverage:
    buckets: dict[str, set[int]] = {}
    for record in records:
        for quantizer in record.entry.sites:
            buckets.setdefault(quantizer, set()).update(record.entry.buckets)
    times = [len(found) for found in buckets.values()]
    return Coverage(
        len(buckets),
        len(info.quantizers),
        layers,
        len(info.layers) + len(info.matmuls),
        min(times),
        max(times),
        info.scheme.buckets,
        [quantizer for quantizer in info.quantizers if quantizer not in buckets],
    )


def _merged(a: BucketResult, b: BucketResult) -> BucketResult:
    """Two records of one bucket, as an odd number of buckets has: the counts added, the worse
    errors, the worse one's timestep.
    """
    worse = a if a.end_to_end_error >= b.end_to_end_error else b
    return BucketResult(
        a.bucket,
        worse.timestep,
        max(a.sites, b.sites),
        a.codes + b.codes,
        a.mismatches + b.mismatches,
        a.unexplained + b.unexplained,
        max(a.layer_error, b.layer_error),
        max(a.segment_error, b.segment_error),
        worse.end_to_end_error,
    )


def _problems(
    wrong: list[float],
    quantizers: list[QuantizerResult],
    layers: list[LayerResult],
    segments: list[SegmentResult],
    buckets: list[BucketResult],
    expected_buckets: int,
    tolerance: float,
) -> list[str]:
    problems = []
    if wrong:
        problems.append(
            f"{len(wrong)} timesteps get another bucket than the scheme's, the first at t = "
            f"{wrong[0]:g}"
        )
    problems += [
        f"quantizer {s.site}: {s.unexplained} of {s.codes} codes differ although no tie explains it"
        for s in quantizers
        if s.unexplained
    ]
    problems += [
        f"layer {x.layer}: relative error {x.error:.1e} in bucket {x.bucket}, above "
        f"{x.tolerance:.0e}"
        for x in layers
        if not x.error <= x.tolerance
    ]
    problems += [
        f"segment before {x.segment}: it reads {x.misread[0]}, which that part of the "
        "fake-quantized model does not"
        for x in segments
        if x.misread
    ]
    problems += [
        f"segment before {x.segment}: relative error {x.error:.1e} in bucket {x.bucket}, above "
        f"{x.tolerance:.0e}"
        for x in segments
        if not x.misread and not x.error <= x.tolerance
    ]
    problems += [
        f"bucket {b.bucket}: end-to-end error {b.end_to_end_error:.1e} at t = {b.timestep:g}, "
        f"above {tolerance:.1e}"
        for b in buckets
        if not b.end_to_end_error <= tolerance
    ]
    if len(buckets) != expected_buckets:
        problems.append(
            f"the reference covers {len(buckets)} of {expected_buckets} buckets; run `quest-deploy "
            "reference` again"
        )
    return problems
