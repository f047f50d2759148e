"""Verify an engine: the choice of the bucket, every layer and all between them with the reference's
own values, the whole model.

Two correct runtimes differ in the last bit of a float; where that bit decides a rounding tie, a
code flips, and in a deep 4-bit network one flip grows to percents at the output. So the sharp test
is per layer: each layer, cut out of the lowered graph, gets the reference's inputs (teacher
forcing), so that nothing can hide behind an earlier flip. Every code mismatch must be explained by
a tie. What the layers leave (norms, SiLU, softmax, residual sums) is tested likewise: a segment is
all that is computed in float from layers' outputs to one site's input, and gets the reference's
outputs. The end-to-end error is judged against the reference model's own sensitivity to last-bit
differences; where that is large, end to end proves nothing, and layers and segments decide.

A reference of a large model holds a sample of the sites in each record, so the result says how many
of all were checked, and in how many buckets. One cut is compiled, and one tensor's values are in
memory, at a time.

Where an engine computes in FP16 or bf16, its graph says which values have that type. A site then
gets the reference's values rounded to it, and must give the codes that belong to those: they are
computed here, from the reference's tables. A layer gets the middle of each code, which rounding
leaves in it, and so must give the reference's output, but for a half type's rounding; likewise a
segment. End to end, the reference's sensitivity is that to activations of the type.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import onnx_ir as ir

from exporters.graph_info import BUCKET, GraphInfo, graph_info, load_graph, save_graph
from exporters.passes.cut import (
    cut_bucket,
    cut_codes,
    cut_layer,
    cut_product,
    cut_segments,
    upstream,
)
from exporters.passes.to_dtype import HALF_TYPES
from quest_deploy.artifacts.reference import OUTPUT, Key, load_reference
from quest_deploy.backends.base import LOWERED, open_engine
from quest_deploy.backends.options import EngineOptions
from quest_deploy.errors import InputError
from quest_deploy.progress import no_progress
from quest_deploy.quantization import affine_numpy
from quest_deploy.verification.runners import compare
from quest_deploy.verification.tolerances import (
    INFORMATIVE,
    SENSITIVITY_FACTOR,
    ChannelErrors,
    CodeMismatches,
    compare_codes,
    layer_error,
    layer_tolerance,
    relative_error,
    segment_error,
    segment_tolerance,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from quest_deploy.artifacts.reference import Record, Tables
    from quest_deploy.artifacts.scheme import Scheme
    from quest_deploy.backends.base import Backend, Runner
    from quest_deploy.progress import Progress

    Arrays = dict[str, NDArray[Any]]
    T = TypeVar("T")
    _ByRecord: TypeAlias = dict[str, dict[int, T]]
    """Of a site or layer, by the record's number."""


@dataclass(frozen=True)
class SiteResult:
    """A site's codes against the reference's, over all buckets."""

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
    """The float part in front of a site, product or the output: its worst relative error, that
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
    """One bucket: its codes over the sites checked in it, its worst layer and segment, and the
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
    """How much of the model was checked: of all sites and layers (products too), those that any
    record of the reference holds.

    Attributes:
        fewest_buckets, most_buckets: in how many of all buckets a site that was checked was
            checked.
        unchecked: the sites that were not.
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
    progress: Progress = no_progress,
) -> Verification:
    """Verify the engine folder ``engine`` against the records in ``reference``.

    Raises:
        InputError: an engine, a graph or a reference that is missing, damaged or of another model.
    """
    lowered = load_graph(engine / LOWERED)
    info = graph_info(lowered)
    records, tables = load_reference(reference)
    if not _fits(info, records, tables):
        raise InputError(
            f"{reference} is the reference of another model or version; run `quest-deploy "
            "reference` again"
        )
    build, types = _CutBuilder(backend, options), _Types(lowered, options.dtype)
    wrong = _check_buckets(build, lowered, info.scheme)
    by_site = {
        site: held
        for site in info.sites
        if (held := [i for i, r in enumerate(records) if site in r.entry.sites])
    }
    by_layer = {
        layer.name: by_site[layer.site] for layer in info.layers.values() if layer.site in by_site
    }
    by_layer |= {
        name: held
        for name in info.products
        if (held := [i for i, r in enumerate(records) if name in r.entry.products])
    }
    codes: _ByRecord[list[CodeMismatches]] = {}
    errors: _ByRecord[NDArray[np.float32]] = {}
    total = len(by_site) + len(by_layer) + 1
    for i, (site, held) in enumerate(by_site.items()):
        codes[site] = _check_codes(
            build, lowered, types, info, site, {k: records[k] for k in held}, tables[site]
        )
        progress("sites", i + 1, total)
    for i, (layer, held) in enumerate(by_layer.items()):
        errors[layer] = _check_layer(
            build, lowered, types, info, layer, {k: records[k] for k in held}, tables
        )
        progress("layers", len(by_site) + i + 1, total)
    segments = _check_segments(build, lowered, types, info, records)
    progress("segments", total, total)
    end_to_end = _check_end_to_end(backend, engine, records)
    half = types.half(*(entry.output for entry in (info.layers | info.products).values()))
    sensitivity = max(
        max(found) for record in records if (found := record.sensitivity(half)) is not None
    )
    tolerance = max(layer_tolerance(half), SENSITIVITY_FACTOR * sensitivity)
    allowed = {
        name: layer_tolerance(types.half(entry.output))
        for name, entry in (info.layers | info.products).items()
    }
    return _summarize(
        backend.name, info, records, wrong, codes, errors, allowed, segments, end_to_end, tolerance
    )


def _fits(info: GraphInfo, records: list[Record], tables: dict[str, Tables]) -> bool:
    """Whether a reference is of the graph's model, and whole: each record has what belongs to its
    sites and products.
    """
    if tables.keys() != info.sites.keys():
        return False
    if all(record.entry.sensitivity is None for record in records):
        return False
    for record in records:
        sites, products = set(record.entry.sites), set(record.entry.products)
        layers = [layer.name for layer in info.layers.values() if layer.site in sites]
        known = sites <= info.sites.keys() and products <= info.products.keys()
        if not sites or not known or not record.is_whole(layers):
            return False
    return True


FARTHER = np.float32(1.25)
HALF = {dtype: name for name, dtype in HALF_TYPES.items()}


class _Types:
    """The types of a graph's values, and the half type that it computes in, if any: its own, or one
    that the runtime was told.
    """

    def __init__(self, lowered: ir.Model, dtype: str) -> None:
        values = [
            x for node in lowered.graph for x in (*node.inputs, *node.outputs) if x is not None
        ]
        self._types = {str(x.name): x.dtype for x in (*lowered.graph.inputs, *values)}
        casts = [
            (node.inputs[0], str(node.outputs[0].name))
            for node in lowered.graph
            if node.op_type == "Cast"
        ]
        self._was = {output: x.dtype for x, output in casts if x is not None}
        self._hidden = (
            dtype if dtype in HALF.values() and not set(HALF) & set(self._types.values()) else None
        )

    def half(self, *values: str) -> str | None:
        """The half type, fp16 or bf16, that any of ``values`` may be rounded to, or was; None where
        all are FP32.
        """
        found = (
            dtype
            for value in values
            for dtype in (self._types.get(value), self._was.get(value))
            if dtype in HALF
        )
        return self._hidden or next((HALF[dtype] for dtype in found), None)

    def is_half(self, value: str) -> bool:
        """Whether the graph itself gives ``value`` a half type."""
        return self._types.get(value) in HALF

    def cast(self, value: str, x: NDArray[Any]) -> NDArray[Any]:
        """x as FP32, rounded to the type of ``value`` if that is a half type: a cut is FP32
        outside.
        """
        dtype = self._types.get(value)
        return x.astype(dtype.numpy()).astype(np.float32) if dtype in HALF else x


class _CutBuilder:
    """Builds a cut as the engine was built, and runs it."""

    def __init__(self, backend: Backend, options: EngineOptions) -> None:
        self.backend, self.options = backend, options

    def run(
        self, model: ir.Model, feeds: Iterable[tuple[Arrays, Arrays]]
    ) -> Iterator[tuple[Arrays, Arrays, Arrays]]:
        """(the feed, the engine's outputs, the reference's) for pairs of (feed, the reference's
        outputs), one at a time.
        """
        with ExitStack() as stack:
            runner = None
            for feed, expected in feeds:
                if runner is None:
                    folder = stack.enter_context(self._compiled(model, feed))
                    runner = stack.enter_context(self.backend.open(folder, self.options))
                yield feed, *compare(self.backend.name, runner, feed, expected)

    @contextmanager
    def open_segments(self, model: ir.Model, feed: Arrays) -> Iterator[Runner]:
        """The segments' graph, ready to run on feeds of this one's sizes."""
        with (
            self._compiled(model, feed) as folder,
            self.backend.open_segments(folder, self.options) as runner,
        ):
            yield runner

    @contextmanager
    def _compiled(self, model: ir.Model, feed: Arrays) -> Iterator[Path]:
        for value in model.graph.inputs:  # some engines are built for some sizes only
            value.shape = ir.Shape(["batch", *feed[value.name or ""].shape[1:]])
        with tempfile.TemporaryDirectory(prefix="quest-deploy-") as name:
            folder = Path(name)
            save_graph(model, folder / LOWERED)
            if not self.backend.compile_only_checks:  # half of the time of a verification
                self.backend.compile(folder / LOWERED, folder, self.options, no_progress)
            yield folder


def _check_buckets(build: _CutBuilder, lowered: ir.Model, scheme: Scheme) -> list[float]:
    edges = np.asarray(scheme.bucket_edges, np.float32)
    around = [edges, np.nextafter(edges, np.float32(-np.inf)), edges - 1, edges - 0.5, edges + 0.5]
    timesteps = np.unique(np.concatenate([np.arange(scheme.train_timesteps), *around])).astype(
        np.float32
    )
    expected = np.asarray([scheme.bucket_of(float(t)) for t in timesteps], np.int64)
    ((_, mine, theirs),) = build.run(
        cut_bucket(lowered), [({"timestep": timesteps}, {BUCKET: expected})]
    )
    return [float(t) for t in timesteps[mine[BUCKET] != theirs[BUCKET]]]


def _check_codes(
    build: _CutBuilder,
    lowered: ir.Model,
    types: _Types,
    info: GraphInfo,
    site: str,
    records: dict[int, Record],
    tables: Tables,
) -> dict[int, list[CodeMismatches]]:
    entry = info.sites[site]

    def tensors(record: Record) -> tuple[Arrays, Arrays]:
        x, bucket = record.tensors[Key.x(site)], record.bucket
        if not types.is_half(entry.input):
            codes = record.tensors[Key.codes(site)]
            return {entry.input: x, BUCKET: bucket}, {entry.codes: codes}
        # Rounded, a probe just beyond a clip bound may be no more: more rows, which go farther.
        x, bucket = (
            types.cast(entry.input, np.concatenate([x, FARTHER * x[2:]])),
            np.concatenate([bucket, bucket[2:]]),
        )
        codes = affine_numpy.codes(x, bucket, tables, entry.axis)
        return {entry.input: x, BUCKET: bucket}, {entry.codes: codes}

    results = {}
    pairs = build.run(cut_codes(lowered, info, site), map(tensors, records.values()))
    for i, (fed, mine, theirs) in zip(records, pairs, strict=True):
        ratio = affine_numpy.ratio(fed[entry.input], fed[BUCKET], tables, entry.axis)
        found = _without_padding(_signed(mine[entry.codes]), ratio.shape)
        results[i] = [
            compare_codes(found[row], theirs[entry.codes][row], ratio[row])
            for row in range(len(ratio))
        ]
    return results


def _signed(codes: NDArray[Any]) -> NDArray[Any]:
    """Codes that a lowering stores as UINT8 (UnsignedCodes, UnsignedActivations), less 128 as the
    reference has them.
    """
    return (codes ^ np.uint8(128)).view(np.int8) if codes.dtype == np.uint8 else codes


def _without_padding(codes: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The codes of x itself, where the graph pads x before it quantizes it; the layer's output
    shows whether the border is right.
    """
    border = [(padded - size) // 2 for padded, size in zip(codes.shape, shape, strict=True)]
    return codes[tuple(slice(b, b + size) for b, size in zip(border, shape, strict=True))]


def _check_layer(
    build: _CutBuilder,
    lowered: ir.Model,
    types: _Types,
    info: GraphInfo,
    layer: str,
    records: dict[int, Record],
    tables: dict[str, Tables],
) -> dict[int, NDArray[np.float32]]:
    sites: tuple[str | None, ...]
    sources: tuple[str, ...]
    if layer in info.products:
        product = info.products[layer]
        output, cut, sites, sources = (
            product.output,
            cut_product(lowered, info, layer),
            product.sites,
            product.inputs,
        )
    else:
        site = info.layers[layer].site
        output, cut, sites, sources = (
            info.layers[layer].output,
            cut_layer(lowered, info, layer),
            (site,),
            (info.sites[site].input,),
        )

    def operand(record: Record, index: int) -> NDArray[Any]:
        name = sites[index]
        x = record.tensors[Key.operand(layer, index)] if name is None else record.untied(name)
        if name is not None and types.half(sources[index]):
            known = (x, record.bucket, tables[name], info.sites[name].axis)
            x = affine_numpy.levels(*known) * affine_numpy.step(*known)
        return types.cast(sources[index], x)

    def tensors(record: Record) -> tuple[Arrays, Arrays]:
        feed = {
            **{source: operand(record, i) for i, source in enumerate(sources)},
            BUCKET: record.bucket,
        }
        return feed, {output: record.tensors[Key.y(layer)]}

    pairs = build.run(cut, map(tensors, records.values()))
    channels = []
    for _, mine, theirs in pairs:
        y = mine[output].astype(np.float32, copy=False)
        channels.append(
            ChannelErrors.of(y, theirs[output], 1 if y.ndim == 4 else -1, types.half(output))
        )
    return dict(zip(records, np.split(layer_error(channels), len(records)), strict=True))


@dataclass(frozen=True)
class _End:
    """Where a segment ends: its site, product or the output, the reference's tensor of its value,
    and that one's channel axis.
    """

    name: str
    key: str
    axis: int


@dataclass(frozen=True)
class _Segment:
    """A segment's relative error in the two samples of each record that has it, float32 [2]; what
    is allowed; what it misreads.
    """

    errors: dict[int, NDArray[np.float32]]
    tolerance: float
    misread: list[str]


def _check_segments(
    build: _CutBuilder, lowered: ir.Model, types: _Types, info: GraphInfo, records: list[Record]
) -> dict[str, _Segment]:
    """All of a record's segments at once: they are one graph. Records with the same sites share it.

    Where a segment ends is what the graph itself says: one that reads another's value, or a layer's
    as it is, is compared all the same.
    """
    reads = upstream(
        lowered, info, {value for value, _ in _ends(lowered, info, info.sites, info.products)}
    )
    errors: dict[str, dict[int, NDArray[np.float32]]] = {}
    halves: dict[str, str | None] = {}
    misread: dict[str, set[str]] = {}
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault((tuple(record.entry.sites), tuple(record.entry.products)), []).append(i)
    for (sites, products), held in groups.items():
        ends = _ends(lowered, info, sites, products)
        known = {str(value.name) for value in lowered.graph.inputs} | _outputs(
            info, records[held[0]]
        ).keys()
        for value, end in ends:
            errors.setdefault(end.name, {}).update({i: np.zeros(2, np.float32) for i in held})
            misread.setdefault(end.name, set()).update(reads[value] - known)
            halves[end.name] = halves.get(end.name) or types.half(value, *reads[value])
        checked = [(value, end) for value, end in ends if reads[value] <= known]
        for i, values in _segment_values(
            build,
            lowered,
            types,
            info,
            {value for value, _ in checked},
            {i: records[i] for i in held},
        ):
            for value, end in checked:
                error = segment_error(
                    values[value].astype(np.float32, copy=False),
                    records[i].tensors[end.key][:2],
                    end.axis,
                )
                errors[end.name][i] = np.maximum(
                    errors[end.name][i], error
                )  # a product may have two ends
    segments = {}
    for name, found in errors.items():
        if misread[name]:
            found = {i: np.full(2, np.finfo(np.float32).max) for i in found}
        rounding = max(float(records[i].tensors[Key.rounding(name)].max()) for i in found)
        segments[name] = _Segment(
            found, segment_tolerance(rounding, halves[name]), sorted(misread[name])
        )
    return segments


def _ends(
    lowered: ir.Model, info: GraphInfo, sites: Iterable[str], products: Iterable[str]
) -> list[tuple[str, _End]]:
    """Where the segments in front of ``sites``, ``products`` and the output end: the graph's
    values, each with what it should be.
    """
    ends = [
        (info.sites[name].input, _End(name, Key.x(name), info.sites[name].axis)) for name in sites
    ]
    for name in products:
        product = info.products[name]
        for i, (value, site) in enumerate(zip(product.inputs, product.sites, strict=True)):
            if site is None:
                ends.append((value, _End(name, Key.operand(name, i), -1)))
            elif value != info.sites[site].input:
                ends.append((value, _End(name, Key.x(site), info.sites[site].axis)))
    return ends + [
        (str(value.name), _End(OUTPUT, Key.UNTIED_OUTPUT, 1)) for value in lowered.graph.outputs
    ]


def _outputs(info: GraphInfo, record: Record) -> dict[str, str]:
    """The layers' and products' values in the graph, each with the record's tensor of it, where it
    has one.
    """
    keys = {entry.output: Key.y(name) for name, entry in (info.layers | info.products).items()}
    return {value: key for value, key in keys.items() if key in record.tensors}


def _segment_values(
    build: _CutBuilder,
    lowered: ir.Model,
    types: _Types,
    info: GraphInfo,
    wanted: set[str],
    records: dict[int, Record],
) -> Iterator[tuple[int, Arrays]]:
    """What the engine computes of ``wanted`` from what the reference's layers gave, record by
    record; what is given, as it is.
    """
    outputs = _outputs(info, next(iter(records.values())))
    given = {str(value.name) for value in lowered.graph.inputs} | outputs.keys()
    cut = cut_segments(lowered, info, sorted(wanted)) if wanted - given else None
    feeds = set() if cut is None else {str(value.name) for value in cut.graph.inputs}
    with ExitStack() as stack:
        runner = None
        for i, record in records.items():
            saved = {
                name: record.tensors[outputs[name]][:2]
                for name in (feeds | wanted) & outputs.keys()
            }
            values = {name: types.cast(name, x) for name, x in saved.items()} | record.inputs
            if cut is not None:
                runner = runner or stack.enter_context(build.open_segments(cut, values))
                values |= runner.infer({name: values[name] for name in feeds})
            yield i, values


def _check_end_to_end(
    backend: Backend, engine: Path, records: list[Record]
) -> list[NDArray[np.float32]]:
    errors = []
    with open_engine(backend, engine) as runner:
        for record in records:
            mine, theirs = compare(
                backend.name, runner, record.inputs, {OUTPUT: record.tensors[Key.OUTPUT]}
            )
            errors.append(relative_error(next(iter(mine.values())), theirs[OUTPUT]))
    return errors


def _summarize(
    backend: str,
    info: GraphInfo,
    records: list[Record],
    wrong: list[float],
    codes: _ByRecord[list[CodeMismatches]],
    errors: _ByRecord[NDArray[np.float32]],
    allowed: dict[str, float],
    segments: dict[str, _Segment],
    end_to_end: list[NDArray[np.float32]],
    tolerance: float,
) -> Verification:
    none = CodeMismatches(0, 0, 0)
    sites = [
        SiteResult(site, **asdict(sum((c for rows in found.values() for c in rows), none)))
        for site, found in codes.items()
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
    problems = _problems(
        wrong, sites, layers, between, list(buckets.values()), info.scheme.buckets, tolerance
    )
    ordered = [buckets[b] for b in sorted(buckets)]
    coverage = _coverage(info, records, set(errors))
    informative = tolerance <= INFORMATIVE
    return Verification(
        backend,
        coverage,
        wrong,
        sites,
        layers,
        between,
        ordered,
        max(allowed.values()),
        tolerance,
        informative,
        problems,
    )


def _segment_result(name: str, segment: _Segment, records: list[Record]) -> SegmentResult:
    worst, bucket = max(
        (float(e), b)
        for i, row in segment.errors.items()
        for e, b in zip(row, records[i].entry.buckets, strict=True)
    )
    return SegmentResult(
        name, worst, bucket, segment.tolerance, segment.tolerance <= INFORMATIVE, segment.misread
    )


def _coverage(info: GraphInfo, records: list[Record], layers: set[str]) -> Coverage:
    buckets: dict[str, set[int]] = {}
    for record in records:
        for site in record.entry.sites:
            buckets.setdefault(site, set()).update(record.entry.buckets)
    times = [len(found) for found in buckets.values()]
    return Coverage(
        len(buckets),
        len(info.sites),
        len(layers),
        len(info.layers) + len(info.products),
        min(times),
        max(times),
        info.scheme.buckets,
        [site for site in info.sites if site not in buckets],
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
    sites: list[SiteResult],
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
        f"site {s.site}: {s.unexplained} of {s.codes} codes differ although no tie explains it"
        for s in sites
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
        "above "
        f"{tolerance:.1e}"
        for b in buckets
        if not b.end_to_end_error <= tolerance
    ]
    if len(buckets) != expected_buckets:
        problems.append(
            f"the reference covers {len(buckets)} of {expected_buckets} buckets; run `quest-deploy "
            "reference` again"
        )
    return problems
