"""The comparison as a picture: Fréchet distances of all rows, each seed a dot, and the prediction
error over the timesteps.
"""

from __future__ import annotations

from itertools import pairwise
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from quest_deploy.files import atomic_file
from scripts.bench.methods.cells import ABLATIONS, MAIN_TABLES
from scripts.bench.methods.report import entries_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from scripts.bench.methods.cells import Table
    from scripts.bench.methods.report import Results


TICKS = (2, 4, 8, 16, 32, 64)
"""Of the axis of Fréchet distances, which is logarithmic, the same in all panels, and reaches
further where a result does.
"""


def plot(results: Results, seeds: Sequence[int], path: Path) -> None:
    """Write the picture as a PNG; cells that were not run are left out, rows keep their place."""
    columns = len(MAIN_TABLES)
    ablation_rows = -(-len(ABLATIONS) // columns)
    figure = Figure(figsize=(16, 9 + 3 * ablation_rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2 + ablation_rows, columns, height_ratios=[2, 2, *[1.6] * ablation_rows]
    )
    first: Any = None
    for i, table in enumerate(MAIN_TABLES):
        _draw_distances(figure.add_subplot(grid[0, i]), table, results, seeds)
        first = figure.add_subplot(grid[1, i], sharey=first)
        _draw_epsilon(first, table, results, seeds)
    for i, table in enumerate(ABLATIONS):
        _draw_distances(
            figure.add_subplot(grid[2 + i // columns, i % columns]), table, results, seeds
        )
    with atomic_file(path) as temporary:
        # No software version and no date in the file: equal results give equal bytes.
        figure.savefig(temporary, dpi=100, format="png", metadata={"Software": None})


def _draw_distances(axes: Any, table: Table, results: Results, seeds: Sequence[int]) -> None:
    entries = list(entries_of(table, results, seeds))
    for y, entry in enumerate(entries):
        distances = [result.judgement.frechet_distance for result in entry.measured]
        if distances:
            axes.plot(distances, [y] * len(distances), "o", color="tab:blue", alpha=0.5)
            axes.plot([float(np.mean(distances))], [y], "|", color="black", markersize=14)
    axes.set_yticks(range(len(entries)), [fill(entry.label, 26) for entry in entries], fontsize=8)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.set_xscale("log")
    everywhere = [
        TICKS[0],
        TICKS[-1],
        *(result.judgement.frechet_distance for result in results.values() if result is not None),
    ]
    axes.set_xlim(min(everywhere) / 1.1, max(everywhere) * 1.1)
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    axes.grid(visible=True, axis="x", alpha=0.3)
    axes.set_title(
        table.title if table in MAIN_TABLES else f"{table.bits.upper()}: {table.title}", fontsize=10
    )
    axes.set_xlabel("Fréchet distance (dots: seeds; bar: mean)", fontsize=8)


def _draw_epsilon(axes: Any, table: Table, results: Results, seeds: Sequence[int]) -> None:
    for entry in entries_of(table, results, seeds):
        if not entry.measured or entry.measured[0].definition["recipe"]["method"] == "float":
            continue
        errors = np.asarray(
            [result.quality.epsilon_mse for result in entry.measured], dtype=np.float64
        ).mean(0)
        edges = [0.0, *entry.measured[0].definition["judged"]["bucket_edges"], 1000.0]
        axes.plot([(a + b) / 2 for a, b in pairwise(edges)], errors, ".-", label=entry.label)
    axes.set_yscale("log")
    axes.set_title(f"{table.title}: error of the prediction", fontsize=10)
    axes.set_xlabel("timestep", fontsize=8)
    axes.set_ylabel("ε-MSE, mean over seeds", fontsize=8)
    axes.grid(visible=True, alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=7)
