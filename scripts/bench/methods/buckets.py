"""Where timestep buckets pay, and where they do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scripts.bench.methods.cells import BUCKETS, ROWS, USUAL, Float, cells_of
from scripts.bench.methods.deploy import limits, moved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scripts.bench.methods.cells import Table
    from scripts.bench.methods.deploy import Results


def where_buckets_pay(results: Results, seeds: Sequence[int]) -> list[str]:
    """A sentence for each schedule, from the figures."""
    return [_of(table, results, seeds) for table in BUCKETS]


def _of(table: Table, results: Results, seeds: Sequence[int]) -> str:
    rows = {
        label: [results.get(cell) for cell in cells_of(key, table.bits, seeds)]
        for key, label in table.rows.items()
        if not isinstance(ROWS[key].recipe, Float)
    }
    schedule = ROWS[next(iter(table.rows))].judged_on
    title = f"{schedule.label}, the usual ones" if schedule == USUAL else schedule.label
    found = [result for measured in rows.values() for result in measured]
    noise = limits(results, seeds).frechet_distances
    if None in found or len(noise) < 2:
        return f"{title}: open, not all cells are computed."
    means = {
        label: (
            float(np.mean([r.judgement.frechet_distance for r in measured if r is not None])),
            float(np.mean([r.judgement.top5 for r in measured if r is not None])),
        )
        for label, measured in rows.items()
    }
    distances = [distance for distance, _ in means.values()]
    spread = max(distances) - min(distances)
    return (
        f"{title}: "
        + ", ".join(
            f"{label}: {distance:.2f} and {top5:.1%}" for label, (distance, top5) in means.items()
        )
        + f". The distances lie {spread:.2f} apart, "
        + ("more" if spread > moved(noise) else "no more")
        + f" than other noise moves FP32's ({moved(noise):.2f})."
    )
