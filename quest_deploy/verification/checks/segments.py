"""What the engine computes in float between layers: all segments from the reference's outputs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from exporters.passes.cut import cut_segments, upstream
from quest_deploy.artifacts.reference import OUTPUT, Key
from quest_deploy.verification.tolerances import segment_error, segment_tolerance

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from exporters.graph_info import GraphInfo
    from quest_deploy.artifacts.reference import Record
    from quest_deploy.verification.checks.engine import Arrays, CheckedEngine


@dataclass(frozen=True)
class _End:
    """Where a segment ends: its quantizer, product or the output, the reference's tensor of its
    value, and that one's channel axis.
    """

    name: str
    key: str
    axis: int


@dataclass(frozen=True)
class Segment:
    """A segment's relative error in the two samples of each record that has it, float32 [2]; what
    is allowed; what it misreads.
    """

    errors: dict[int, NDArray[np.float32]]
    tolerance: float
    misread: list[str]


def check_segments(engine: CheckedEngine, records: list[Record]) -> dict[str, Segment]:
    """All of a record's segments at once: they are one graph. Records with the same quantizers
    share it.

    Where a segment ends is what the graph itself says: one that reads another's value, or a layer's
    as it is, is compared all the same.
    """
    info, types = engine.info, engine.types
    all_ends = _ends(engine, info.quantizers, info.matmuls)
    reads = upstream(engine.graph, info, {value for value, _ in all_ends})
    errors: dict[str, dict[int, NDArray[np.float32]]] = {}
    halves: dict[str, str | None] = {}
    misread: dict[str, set[str]] = {}
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault((tuple(record.entry.sites), tuple(record.entry.products)), []).append(i)
    for (quantizers, products), held in groups.items():
        ends = _ends(engine, quantizers, products)
        known = _inputs(engine) | _outputs(info, records[held[0]]).keys()
        for value, end in ends:
            errors.setdefault(end.name, {}).update({i: np.zeros(2, np.float32) for i in held})
            misread.setdefault(end.name, set()).update(reads[value] - known)
            halves[end.name] = halves.get(end.name) or types.half(value, *reads[value])
        checked = [(value, end) for value, end in ends if reads[value] <= known]
        wanted = {value for value, _ in checked}
        for i, values in _segment_values(engine, wanted, {i: records[i] for i in held}):
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
        segments[name] = Segment(
            found, segment_tolerance(rounding, halves[name]), sorted(misread[name])
        )
    return segments


def _ends(
    engine: CheckedEngine, quantizers: Iterable[str], products: Iterable[str]
) -> list[tuple[str, _End]]:
    """Where the segments in front of ``quantizers``, ``products`` and the output end: the graph's
    values, each with what it should be.
    """
    info = engine.info
    ends = [
        (info.quantizers[name].input, _End(name, Key.x(name), info.quantizers[name].axis))
        for name in quantizers
    ]
    for name in products:
        product = info.matmuls[name]
        for i, (value, quantizer) in enumerate(zip(product.inputs, product.sites, strict=True)):
            if quantizer is None:
                ends.append((value, _End(name, Key.operand(name, i), -1)))
            elif value != info.quantizers[quantizer].input:
                ends.append((value, _End(name, Key.x(quantizer), info.quantizers[quantizer].axis)))
    return ends + [
        (str(value.name), _End(OUTPUT, Key.UNTIED_OUTPUT, 1))
        for value in engine.graph.graph.outputs
    ]


def _inputs(engine: CheckedEngine) -> set[str]:
    return {str(value.name) for value in engine.graph.graph.inputs}


def _outputs(info: GraphInfo, record: Record) -> dict[str, str]:
    """The layers' and products' values in the graph, each with the record's tensor of it, where it
    has one.
    """
    keys = {entry.output: Key.y(name) for name, entry in (info.layers | info.matmuls).items()}
    return {value: key for value, key in keys.items() if key in record.tensors}


def _segment_values(
    engine: CheckedEngine, wanted: set[str], records: dict[int, Record]
) -> Iterator[tuple[int, Arrays]]:
    """Return what the engine computes of ``wanted`` from what the reference's layers gave, record
    by record; what is given, as it is.
    """
    outputs = _outputs(engine.info, next(iter(records.values())))
    computed = wanted - _inputs(engine) - outputs.keys()
    cut = cut_segments(engine.graph, engine.info, sorted(wanted)) if computed else None
    feeds = set() if cut is None else {str(value.name) for value in cut.graph.inputs}
    with ExitStack() as stack:
        runner = None
        for i, record in records.items():
            saved = {
                name: record.tensors[outputs[name]][:2]
                for name in (feeds | wanted) & outputs.keys()
            }
            values = {name: engine.types.cast(name, x) for name, x in saved.items()} | record.inputs
            if cut is not None:
                runner = runner or stack.enter_context(engine.open_segments(cut, values))
                values |= runner.infer({name: values[name] for name in feeds})
            yield i, values
