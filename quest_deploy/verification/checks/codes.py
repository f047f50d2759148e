"""Quantizers' codes against the reference's, each mismatch explained by a tie or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.graph_info import BUCKET
from exporters.passes.cut import cut_codes
from quest_deploy.artifacts.reference import Key
from quest_deploy.quantization import affine_numpy
from quest_deploy.verification.tolerances import compare_codes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from quest_deploy.artifacts.reference import Record, Tables
    from quest_deploy.verification.checks.engine import Arrays, ByRecord, CheckedEngine
    from quest_deploy.verification.tolerances import CodeMismatches

FARTHER = np.float32(1.25)


def check_codes(
    engine: CheckedEngine, held: dict[str, dict[int, Record]], tables: dict[str, Tables]
) -> Iterator[ByRecord[list[CodeMismatches]]]:
    """The mismatches of each record's rows, where the engine quantizes the reference's values, of
    some of the quantizers ``held`` at a time.
    """
    entries = engine.info.quantizers
    for half in (False, True):
        of_type = {
            name: records
            for name, records in held.items()
            if engine.types.is_low_precision(entries[name].input) is half
        }
        for group in engine.groups(
            of_type,
            lambda name: {entries[name].input: Key.x(name)},
            lambda name: entries[name].codes,
        ):
            yield _check_group(engine, group, held[group[0]], tables)


def _check_group(
    engine: CheckedEngine, group: list[str], records: dict[int, Record], tables: dict[str, Tables]
) -> ByRecord[list[CodeMismatches]]:
    entries, types = [engine.info.quantizers[name] for name in group], engine.types

    def tensors(record: Record) -> tuple[Arrays, Arrays]:
        feed: Arrays = {BUCKET: record.bucket}
        expected: Arrays = {}
        for entry in entries:
            x, codes = record.tensors[Key.x(entry.name)], record.tensors[Key.codes(entry.name)]
            if types.is_low_precision(entry.input):
                # Rounded, a probe just beyond a clip bound may be no more: more rows, which go
                # farther.
                x = types.cast(entry.input, np.concatenate([x, FARTHER * x[2:]]))
                feed[BUCKET] = np.concatenate([record.bucket, record.bucket[2:]])
                codes = affine_numpy.codes(x, feed[BUCKET], tables[entry.name], entry.axis)
            feed[entry.input], expected[entry.codes] = x, codes
        return feed, expected

    results: ByRecord[list[CodeMismatches]] = {name: {} for name in group}
    pairs = engine.run(cut_codes(engine.graph, engine.info, *group), map(tensors, records.values()))
    for i, (fed, mine, theirs) in zip(records, pairs, strict=True):
        for entry in entries:
            known = (fed[entry.input], fed[BUCKET], tables[entry.name], entry.axis)
            ratio = affine_numpy.ratio(*known)
            found = _without_padding(_signed(mine[entry.codes]), ratio.shape)
            results[entry.name][i] = [
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
