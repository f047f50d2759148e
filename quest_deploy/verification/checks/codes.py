"""A quantizer's codes against the reference's, each mismatch explained by a tie or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.graph_info import BUCKET
from exporters.passes.cut import cut_codes
from quest_deploy.artifacts.reference import Key
from quest_deploy.quantization import affine_numpy
from quest_deploy.verification.tolerances import compare_codes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quest_deploy.artifacts.reference import Record, Tables
    from quest_deploy.verification.checks.engine import Arrays, CheckedEngine
    from quest_deploy.verification.tolerances import CodeMismatches

FARTHER = np.float32(1.25)


def check_codes(
    engine: CheckedEngine, quantizer: str, records: dict[int, Record], tables: Tables
) -> dict[int, list[CodeMismatches]]:
    """The mismatches of each record's rows, where the engine quantizes the reference's values."""
    entry, types = engine.info.quantizers[quantizer], engine.types

    def tensors(record: Record) -> tuple[Arrays, Arrays]:
        x, bucket = record.tensors[Key.x(quantizer)], record.bucket
        if not types.is_low_precision(entry.input):
            codes = record.tensors[Key.codes(quantizer)]
            return {entry.input: x, BUCKET: bucket}, {entry.codes: codes}
        # Rounded, a probe just beyond a clip bound may be no more: more rows, which go farther.
        x, bucket = (
            types.cast(entry.input, np.concatenate([x, FARTHER * x[2:]])),
            np.concatenate([bucket, bucket[2:]]),
        )
        codes = affine_numpy.codes(x, bucket, tables, entry.axis)
        return {entry.input: x, BUCKET: bucket}, {entry.codes: codes}

    results = {}
    pairs = engine.run(
        cut_codes(engine.graph, engine.info, quantizer), map(tensors, records.values())
    )
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
