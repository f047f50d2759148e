"""Verify an engine: the choice of the bucket, every layer and all between them with the reference's own values, the whole model.

Two correct runtimes differ in the last bit of a float; where that bit decides a rounding tie, a code flips, and in a deep 4-bit
network one flip grows to percents at the output. So the sharp test is per layer: each layer, cut out of the lowered graph, gets the
reference's inputs (teacher forcing), so that nothing can hide behind an earlier flip. Every code mismatch must be explained by a tie.
What the layers leave (norms, SiLU, softmax, residual sums) is tested likewise: a segment is all that is computed in float from layers'
outputs to one site's input, and gets the reference's outputs. The end-to-end error is judged against the reference model's own
sensitivity to last-bit differences; where that is large, end to end proves nothing, and layers and segments decide.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from exporters.graph_info import BUCKET, GraphInfo, SiteInfo, graph_info, load_graph, save_graph
from exporters.passes.cut import cut_bucket, cut_codes, cut_layer, cut_product, cut_segments
from quest_deploy.engine.base import LOWERED, EngineOptions, no_progress, open_engine
from quest_deploy.errors import InputError
from quest_deploy.reference_files import OUTPUT, load_reference
from quest_deploy.verify.judge import (
    INFORMATIVE,
    LAYER_TOLERANCE,
    ROUNDING_FACTOR,
    SEGMENT_TOLERANCE,
    SENSITIVITY_FACTOR,
    CodeMismatches,
    compare_codes,
    layer_error,
    relative_error,
    segment_error,
)
from quest_deploy.verify.runners import compare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from quest_deploy.engine.base import Backend, Runner
    from quest_deploy.reference_files import Record
    from quest_deploy.scheme import Scheme

    Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class SiteResult:
    """A site's codes against the reference's, over all buckets."""

    site: str
    codes: int
    mismatches: int
    unexplained: int


@dataclass(frozen=True)
class LayerResult:
    """A layer's output against the reference's: the worst relative error over buckets and output channels, and its bucket."""

    layer: str
    error: float
    bucket: int


@dataclass(frozen=True)
class SegmentResult:
    """The float part in front of a site, product or the output: its worst relative error, that one's bucket, and what is allowed.

    Attributes:
        informative: whether that is at most 5%; above, rounding alone changes the segment so much that nothing is proved.
    """

    segment: str
    error: float
    bucket: int
    tolerance: float
    informative: bool


@dataclass(frozen=True)
class BucketResult:
    """One bucket: its codes over all sites, its worst layer and segment, and the whole model at one timestep of it."""

    bucket: int
    timestep: float
    codes: int
    mismatches: int
    unexplained: int
    layer_error: float
    segment_error: float
    end_to_end_error: float


@dataclass(frozen=True)
class Verification:
    """All results, and whether they pass.

    Attributes:
        wrong_buckets: timesteps, of those tried around every edge, whose bucket the engine chose wrongly.
        end_to_end_tolerance: twice the model's own largest sensitivity to last-bit differences, or a layer's tolerance.
        end_to_end_informative: whether that is at most 5%; above, the verdict rests on layers and segments.
        problems: why it fails, in words; empty if it passes.
    """

    backend: str
    wrong_buckets: list[float]
    sites: list[SiteResult]
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


def verify_engine(
    backend: Backend,
    options: EngineOptions,
    engine: Path,
    reference: Path,
    on_progress: Callable[[str, int, int], None] = no_progress,
) -> Verification:
    """Verify the engine folder ``engine`` against the records in ``reference``.

    Raises:
        InputError: an engine, a graph or a reference that is missing, damaged or of another model.
    """
    lowered = load_graph(engine / LOWERED)
    info = graph_info(lowered)
    records, tables = load_reference(reference)
    results = (*info.layers, *info.products)
    needed = {"untied_output", *(f"layer.{name}.y" for name in results)}
    needed |= {f"rounding.{name}" for name in (*info.sites, *info.products, OUTPUT)}
    if not needed <= records[0].tensors.keys() or set(info.sites) != {
        name.removesuffix(".scale") for name in tables if name.endswith(".scale")
    }:
        raise InputError(f"{reference} is the reference of another model or version; run `quest-deploy reference` again")
    build = _CutBuilder(backend, options)
    wrong = _check_buckets(build, lowered, info.scheme)
    codes: dict[str, list[list[CodeMismatches]]] = {}
    errors: dict[str, list[NDArray[np.float32]]] = {}
    total = len(info.sites) + len(info.layers) + len(info.products) + 1
    for i, site in enumerate(info.sites):
        codes[site] = _check_codes(build, lowered, info, site, records, tables)
        on_progress("sites", i + 1, total)
    for i, layer in enumerate(results):
        errors[layer] = _check_layer(build, lowered, info, layer, records)
        on_progress("layers", len(info.sites) + i + 1, total)
    segments = _check_segments(build, lowered, info, records)
    on_progress("segments", total, total)
    end_to_end = _check_end_to_end(backend, engine, records)
    tolerance = max(LAYER_TOLERANCE, SENSITIVITY_FACTOR * max(max(record.entry.sensitivity) for record in records))
    return _summarize(backend.name, info, records, wrong, codes, errors, segments, end_to_end, tolerance)


class _CutBuilder:
    """Builds a cut as the engine was built, and runs it."""

    def __init__(self, backend: Backend, options: EngineOptions) -> None:
        self.backend, self.options = backend, options

    def run(self, model: ir.Model, feeds: list[Arrays], expected: list[Arrays]) -> list[tuple[Arrays, Arrays]]:
        with self._compiled(model, feeds[0]) as folder:
            return compare(self.backend.name, lambda: self.backend.open(folder, self.options), feeds, expected)

    @contextmanager
    def open_segments(self, model: ir.Model, feed: Arrays) -> Iterator[Runner]:
        """The segments' graph, ready to run on feeds of this one's sizes."""
        with self._compiled(model, feed) as folder, self.backend.open_segments(folder, self.options) as runner:
            yield runner

    @contextmanager
    def _compiled(self, model: ir.Model, feed: Arrays) -> Iterator[Path]:
        for value in model.graph.inputs:  # some engines are built for some sizes only
            value.shape = ir.Shape(["batch", *feed[value.name or ""].shape[1:]])
        with tempfile.TemporaryDirectory(prefix="quest-deploy-") as name:
            folder = Path(name)
            save_graph(model, folder / LOWERED)
            self.backend.compile(folder / LOWERED, folder, self.options, no_progress)
            yield folder


def _check_buckets(build: _CutBuilder, lowered: ir.Model, scheme: Scheme) -> list[float]:
    edges = np.asarray(scheme.bucket_edges, np.float32)
    around = [edges, np.nextafter(edges, np.float32(-np.inf)), edges - 1, edges - 0.5, edges + 0.5]
    timesteps = np.unique(np.concatenate([np.arange(scheme.train_timesteps), *around])).astype(np.float32)
    expected = np.asarray([scheme.bucket_of(float(t)) for t in timesteps], np.int64)
    ((mine, theirs),) = build.run(cut_bucket(lowered), [{"timestep": timesteps}], [{BUCKET: expected}])
    return [float(t) for t in timesteps[mine[BUCKET] != theirs[BUCKET]]]


def _check_codes(
    build: _CutBuilder, lowered: ir.Model, info: GraphInfo, site: str, records: list[Record], tables: Arrays
) -> list[list[CodeMismatches]]:
    entry = info.sites[site]
    feeds = [{entry.input: r.tensors[f"site.{site}.x"], BUCKET: r.tensors["bucket"]} for r in records]
    expected = [{entry.codes: r.tensors[f"site.{site}.codes"]} for r in records]
    results = []
    for record, (mine, theirs) in zip(records, build.run(cut_codes(lowered, info, site), feeds, expected), strict=True):
        ratio = _ratio(record.tensors[f"site.{site}.x"], record.tensors["bucket"], tables, entry)
        found = _without_padding(_signed(mine[entry.codes]), ratio.shape)
        results.append([compare_codes(found[i], theirs[entry.codes][i], ratio[i]) for i in range(len(ratio))])
    return results


def _signed(codes: NDArray[Any]) -> NDArray[Any]:
    """Codes that a lowering stores as UINT8 (UnsignedCodes, UnsignedActivations), less 128 as the reference has them."""
    return (codes ^ np.uint8(128)).view(np.int8) if codes.dtype == np.uint8 else codes


def _without_padding(codes: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The codes of x itself, where the graph pads x before it quantizes it; the layer's output shows whether the border is right."""
    border = [(padded - size) // 2 for padded, size in zip(codes.shape, shape, strict=True)]
    return codes[tuple(slice(b, b + size) for b, size in zip(border, shape, strict=True))]


def _ratio(x: NDArray[Any], bucket: NDArray[Any], tables: Arrays, site: SiteInfo) -> NDArray[np.float32]:
    shape = [len(x), *[1] * (x.ndim - 1)]
    if site.integer:
        channel = tables[f"{site.name}.channel"].reshape(-1, *[1] * (x.ndim - 1 - site.axis))
    else:
        shape[site.axis], channel = -1, np.ones(1, np.float32)
    result: NDArray[np.float32] = x / (tables[f"{site.name}.scale"][bucket].reshape(shape) * channel)
    return result


def _check_layer(
    build: _CutBuilder, lowered: ir.Model, info: GraphInfo, layer: str, records: list[Record]
) -> list[NDArray[np.float32]]:
    sites: tuple[str | None, ...]
    sources: tuple[str, ...]
    if layer in info.products:
        product = info.products[layer]
        output, cut, sites, sources = product.output, cut_product(lowered, info, layer), product.sites, product.inputs
    else:
        site = info.layers[layer].site
        output, cut, sites, sources = info.layers[layer].output, cut_layer(lowered, info, layer), (site,), (info.sites[site].input,)

    def operand(record: Record, index: int) -> NDArray[Any]:
        name = sites[index]
        if name is None:
            return record.tensors[f"operand.{layer}.{index}"]
        return record.tensors.get(f"site.{name}.untied_x", record.tensors[f"site.{name}.x"])

    feeds = [{**{source: operand(r, i) for i, source in enumerate(sources)}, BUCKET: r.tensors["bucket"]} for r in records]
    expected = [{output: r.tensors[f"layer.{layer}.y"]} for r in records]
    pairs = build.run(cut, feeds, expected)
    y, reference = (np.concatenate([pair[side][output] for pair in pairs]) for side in (0, 1))
    return np.split(layer_error(y, reference, 1 if y.ndim == 4 else y.ndim - 1), len(records))


@dataclass(frozen=True)
class _End:
    """Where a segment ends: its site, product or the output, the reference's tensor of its value, and that one's channel axis."""

    name: str
    key: str
    axis: int


@dataclass(frozen=True)
class _Segment:
    """A segment's relative error in each record's two samples [records, 2], and what is allowed."""

    errors: NDArray[np.float32]
    tolerance: float


def _check_segments(build: _CutBuilder, lowered: ir.Model, info: GraphInfo, records: list[Record]) -> dict[str, _Segment]:
    """All segments at once: they are one graph, run record by record.

    Where a segment ends is what the graph itself says: one that reads another's value, or a layer's as it is, is compared all the same.
    """
    cut = cut_segments(lowered, info)
    results = {entry.output: f"layer.{name}.y" for name, entry in (info.layers | info.products).items()}
    ends = [(site.input, _End(name, f"site.{name}.x", site.axis)) for name, site in info.sites.items()]
    for name, product in info.products.items():
        for i, (value, site) in enumerate(zip(product.inputs, product.sites, strict=True)):
            if site is None:
                ends.append((value, _End(name, f"operand.{name}.{i}", -1)))
            elif value != info.sites[site].input:
                ends.append((value, _End(name, f"site.{site}.x", info.sites[site].axis)))
    ends += [(str(value.name), _End(OUTPUT, "untied_output", 1)) for value in lowered.graph.outputs]
    errors = {end.name: np.zeros((len(records), 2), np.float32) for _, end in ends}
    given = [{value: r.tensors[key][:2] for value, key in results.items()} | r.inputs for r in records]
    with build.open_segments(cut, given[0]) as runner:
        for i, record in enumerate(records):
            values = given[i] | runner.infer({str(value.name): given[i][str(value.name)] for value in cut.graph.inputs})
            for value, end in ends:
                error = segment_error(values[value], record.tensors[end.key][:2], end.axis)
                errors[end.name][i] = np.maximum(errors[end.name][i], error)  # a product may have two ends
    rounding = {name: max(float(record.tensors[f"rounding.{name}"].max()) for record in records) for name in errors}
    return {name: _Segment(found, max(SEGMENT_TOLERANCE, ROUNDING_FACTOR * min(rounding[name], 1.0))) for name, found in errors.items()}


def _check_end_to_end(backend: Backend, engine: Path, records: list[Record]) -> list[NDArray[np.float32]]:
    feeds = [r.inputs for r in records]
    expected = [{"output": r.tensors["output"]} for r in records]
    pairs = compare(backend.name, lambda: open_engine(backend, engine), feeds, expected)
    return [relative_error(next(iter(mine.values())), theirs["output"]) for mine, theirs in pairs]


def _summarize(
    backend: str,
    info: GraphInfo,
    records: list[Record],
    wrong: list[float],
    codes: dict[str, list[list[CodeMismatches]]],
    errors: dict[str, list[NDArray[np.float32]]],
    segments: dict[str, _Segment],
    end_to_end: list[NDArray[np.float32]],
    tolerance: float,
) -> Verification:
    none = CodeMismatches(0, 0, 0)
    sites = [SiteResult(site, **asdict(sum((c for record in rows for c in record), none))) for site, rows in codes.items()]
    layers = []
    for layer, rows in errors.items():
        worst, bucket = max(
            (float(e), b) for r, e_row in zip(records, rows, strict=True) for e, b in zip(e_row, r.row_buckets, strict=True)
        )
        layers.append(LayerResult(layer, worst, bucket))
    buckets: dict[int, BucketResult] = {}
    for i, record in enumerate(records):
        for sample, bucket in enumerate(record.entry.buckets):
            rows_of = (sample, sample + 2)  # its real activations, and its probe
            found = sum((codes[site][i][row] for site in codes for row in rows_of), none)
            worst = max(float(errors[layer][i][row]) for layer in errors for row in rows_of)
            result = BucketResult(
                bucket,
                record.entry.timesteps[sample],
                **asdict(found),
                layer_error=worst,
                segment_error=max((float(segment.errors[i, sample]) for segment in segments.values()), default=0.0),
                end_to_end_error=float(end_to_end[i][sample]),
            )
            buckets[bucket] = result if bucket not in buckets else _merged(buckets[bucket], result)
    between = []
    for name, segment in segments.items():
        which, sample = divmod(int(segment.errors.argmax()), 2)
        bucket = records[which].entry.buckets[sample]
        between.append(SegmentResult(name, float(segment.errors.max()), bucket, segment.tolerance, segment.tolerance <= INFORMATIVE))
    problems = _problems(wrong, sites, layers, between, list(buckets.values()), info.scheme.buckets, tolerance)
    ordered = [buckets[b] for b in sorted(buckets)]
    informative = tolerance <= INFORMATIVE
    return Verification(backend, wrong, sites, layers, between, ordered, LAYER_TOLERANCE, tolerance, informative, problems)


def _merged(a: BucketResult, b: BucketResult) -> BucketResult:
    """Two records of one bucket, as an odd number of buckets has: the counts added, the worse errors, the worse one's timestep."""
    worse = a if a.end_to_end_error >= b.end_to_end_error else b
    return BucketResult(
        a.bucket,
        worse.timestep,
        a.codes + b.codes,
        a.mismatches + b.mismatches,
        a.unexplained + b.unexplained,
        max(a.layer_error, b.layer_error),
        max(a.segment_error, b.segment_error),
        worse.end_to_end_error,
    )


def _problems(
    wrong: list[float],
    sites: list[SiteResult],
    layers: list[LayerResult],
    segments: list[SegmentResult],
    buckets: list[BucketResult],
    expected_buckets: int,
    tolerance: float,
) -> list[str]:
    problems = []
    if wrong:
        problems.append(f"{len(wrong)} timesteps get another bucket than the scheme's, the first at t = {wrong[0]:g}")
    problems += [
        f"site {s.site}: {s.unexplained} of {s.codes} codes differ although no tie explains it" for s in sites if s.unexplained
    ]
    problems += [
        f"layer {x.layer}: relative error {x.error:.1e} in bucket {x.bucket}, above {LAYER_TOLERANCE:.0e}"
        for x in layers
        if not x.error <= LAYER_TOLERANCE
    ]
    problems += [
        f"segment before {x.segment}: relative error {x.error:.1e} in bucket {x.bucket}, above {x.tolerance:.0e}"
        for x in segments
        if not x.error <= x.tolerance
    ]
    problems += [
        f"bucket {b.bucket}: end-to-end error {b.end_to_end_error:.1e} at t = {b.timestep:g}, above {tolerance:.1e}"
        for b in buckets
        if not b.end_to_end_error <= tolerance
    ]
    if len(buckets) != expected_buckets:
        problems.append(f"the reference covers {len(buckets)} of {expected_buckets} buckets; run `quest-deploy reference` again")
    return problems
