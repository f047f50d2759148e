"""Where timestep buckets pay, and where they do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scripts.bench.methods.cells import BUCKETS, ROWS, USUAL, Float, cells_of
from scripts.bench.methods.deploy import limits, mean, measured_of, moved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scripts.bench.methods.cells import Table
    from scripts.bench.methods.deploy import Results


def where_buckets_pay(results: Results, seeds: Sequence[int]) -> list[str]:
    """A sentence for each schedule, from the figures."""
    return [_of(table, results, seeds) for table in BUCKETS]


def _of(table: Table, results: Results, seeds: Sequence[int]) -> str:
    shown = [key for key in table.rows if not isinstance(ROWS[key].recipe, Float)]
    rows = {table.rows[key]: measured_of(results, key, table.bits, seeds) for key in shown}
    cells = [cell for key in shown for cell in cells_of(key, table.bits, seeds)]
    schedule = ROWS[shown[0]].judged_on
    title = f"{schedule.label}, the usual ones" if schedule == USUAL else schedule.label
    noise = limits(results, seeds).frechet_distances
    if sum(map(len, rows.values())) < len(cells) or len(noise) < 2:
        return f"{title}: open, not all cells are computed."
    means = {
        label: (
            mean([result.judgement.frechet_distance for result in found]),
            mean([result.judgement.top5 for result in found]),
        )
        for label, found in rows.items()
    }
    distances = [distance for distance, _ in means.values()]
    best = min(means, key=lambda label: means[label][0])
    spread = max(distances) - min(distances)
    return (
        f"{title}: "
        + "; ".join(
            f"{label}: {distance:.2f} and {top5:.1%}" for label, (distance, top5) in means.items()
        )
        + f". The distances lie {spread:.2f} apart, "
        + ("more" if spread > moved(noise) else "no more")
        + f" than other noise moves FP32's ({moved(noise):.2f}); the best is that of: {best}."
    )
