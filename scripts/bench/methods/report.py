"""The comparison in Markdown and as JSON. Every cell is shown as it was measured; one without a
result is "not run".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from quest_deploy.calibration.reconstruction import ReconstructOptions
from quest_deploy.evaluation.quality import HELD_OUT_SAMPLES
from scripts.bench.methods.cells import (
    ABLATIONS,
    FLOAT_BITS,
    MAIN_TABLES,
    ROWS,
    Cell,
    Table,
    cells_of,
)
from scripts.bench.methods.claims import critical_groups, judged
from scripts.bench.methods.recipes import JUDGED_SAMPLING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from scripts.bench.methods.results import Result

    Results = Mapping[Cell, Result | None]
    Figure = Callable[[Result], float | None]

NOT_RUN = "not run"
DASH = "\N{EN DASH}"
PARTS = (slice(10, 20), slice(1, 10), slice(0, 1))
"""The buckets that a table's three columns of epsilon-MSE take the mean of: t from 500, from 50 to
500, below 50.
"""
LIMIT_S = 300
"""What a cell may take; the report names those that took longer."""


@dataclass(frozen=True)
class Entry:
    """A row as it is shown: its label, its cells by seed, and what is known of them (None: not
    run).
    """

    label: str
    key: str
    cells: tuple[Cell, ...]
    results: tuple[Result | None, ...]

    @property
    def measured(self) -> list[Result]:
        """The results that there are."""
        return [result for result in self.results if result is not None]


def entries_of(table: Table, results: Results, seeds: Sequence[int]) -> Iterator[Entry]:
    """The rows of ``table``, those without cells at its bit-width included."""
    for key, label in table.rows.items():
        cells = tuple(cells_of(key, table.bits, seeds))
        yield Entry(label, key, cells, tuple(results.get(cell) for cell in cells))


def markdown(model: str, command: str, results: Results, seeds: Sequence[int]) -> str:
    """The tables, with the command that makes them."""
    sampling = JUDGED_SAMPLING
    cells = {
        cell: result
        for cell, result in results.items()
        if cell.seed in seeds or cell.bits == FLOAT_BITS
    }
    missing = sum(result is None for result in cells.values())
    images = (
        f"{sampling.images} images, {sampling.steps}-step {sampling.scheduler.upper()}, "
        f"guidance {sampling.guidance:g}"
    )
    intro = (
        f"Model: {model}. Each figure is the mean over the seeds {', '.join(map(str, seeds))}, in "
        "brackets each seed's own value.",
        "A seed draws the calibration trajectories, the values kept for the range search and the "
        "finetuning batches;",
        f"the noise and the labels of the judged images are the same in all cells ({images}).",
        f"ε-MSE is against FP32's predictions on {HELD_OUT_SAMPLES} of its own trajectories that "
        "no cell was calibrated on.",
        "Seconds are those of making the model (recording trajectories, calibration, training) "
        "without judging it.",
        "Peak memory is the process's in calibration and training, Python and its packages "
        "included.",
        _budget_of_reconstruction(),
        "Scales: what one activation scale covers, and the number of timestep buckets. The first "
        "and the last layer have 8 bits.",
    )
    lines = [
        "# Methods compared",
        "",
        f"Made by `{command}` from the files in `scripts/bench/results/methods/`; no number "
        "is edited by hand.",
        "",
        *intro,
        "",
        f"{len(cells) - missing} of {len(cells)} cells are measured"
        + (f"; {missing} are {NOT_RUN}." if missing else "."),
        *_environments(cells),
        *_slow(cells),
    ]
    for table in MAIN_TABLES:
        lines += ["", f"## {table.title}", "", *_table("method", table, results, seeds)]
    lines += ["", "## The papers' claims on this model", "", *_claims(results, seeds)]
    for ablation in ABLATIONS:
        lines += [
            "",
            f"## {ablation.bits.upper()} ablation: {ablation.title}",
            "",
            *_table("QuEST with", ablation, results, seeds),
        ]
    for table in MAIN_TABLES:
        lines += [
            "",
            f"## ε-MSE per timestep bucket, {table.title}",
            "",
            *_bucket_table(table, results, seeds),
        ]
    return "\n".join(lines) + "\n"


def _budget_of_reconstruction() -> str:
    ours = ReconstructOptions()
    return (
        f"Q-Diffusion: {ours.samples} recorded pairs, {ours.rounding_steps} rounding and "
        f"{ours.scale_steps} scale steps a unit "
        "(the paper's, for a GPU and days: 5,120 pairs, 20,000 and 5,000 steps), symmetric weights "
        "as in all rows, "
        "and the activations of the units before are quantized already while a unit's rounding is "
        "learned."
    )


def everything(model: str, command: str, results: Results, seeds: Sequence[int]) -> dict[str, Any]:
    """All that is known, as a JSON value: the tables' structure and every cell's file content
    (None: not run).
    """
    tables = [
        {
            "title": table.title,
            "bits": table.bits,
            "rows": [
                {
                    "key": e.key,
                    "label": e.label,
                    "cells": [cell.name for cell in e.cells],
                    "elsewhere": ROWS[e.key].elsewhere,
                }
                for e in entries_of(table, results, seeds)
            ],
        }
        for table in (*MAIN_TABLES, *ABLATIONS)
    ]
    cells = {
        cell.name: None if result is None else result.to_json() for cell, result in results.items()
    }
    return {
        "model": model,
        "command": command,
        "seeds": list(seeds),
        "tables": tables,
        "cells": cells,
    }


def _table(first: str, table: Table, results: Results, seeds: Sequence[int]) -> list[str]:
    header = [
        first,
        "scales",
        "q, k, v / softmax",
        "Fréchet distance",
        "accuracy, %",
        "pixel MSE",
        "ε-MSE, t ≥ 500",
        "50 ≤ t < 500",
        "t < 50",
        "seconds",
        "peak memory",
    ]
    rows = [
        [entry.label, *_figures(entry, len(header) - 1)]
        for entry in entries_of(table, results, seeds)
    ]
    return _markdown_table(header, rows)


def _figures(entry: Entry, columns: int) -> list[str]:
    if not entry.cells:
        return [f"{DASH} ({ROWS[entry.key].elsewhere})", *[DASH] * (columns - 1)]
    if not entry.measured:
        return [NOT_RUN, *[DASH] * (columns - 1)]
    return [
        *_settings(entry.measured[0]),
        _values(entry.results, lambda r: r.quality.frechet_distance, "{:.2f}"),
        _values(entry.results, lambda r: r.quality.accuracy, "{:.1f}", 100),
        _values(entry.results, lambda r: r.quality.pixel_mse, "{:.4f}"),
        *(_mean(entry.measured, partial(_epsilon, buckets=part), "{:.4f}") for part in PARTS),
        _mean(entry.measured, lambda r: r.total_seconds, "{:.0f}"),
        _mean(entry.measured, lambda r: r.highest_memory, "{:.0f} MB", 1e-6),
    ]


def _settings(result: Result) -> list[str]:
    """Return what one activation scale covers and the buckets; bits of q, k, v and of softmax."""
    recipe = result.definition["recipe"]
    if recipe["method"] == "float":
        return [DASH, "float"]
    if recipe["method"] == "modelopt":
        counts = [str(result.notes.get(name, "?")) for name in ("quantized_layers", "layers")]
        return [f"its own, 1 ({' of '.join(counts)} layers)", "float"]
    scheme = recipe["scheme"]
    bits = [scheme.get("attention_bits"), scheme.get("softmax_bits")]
    attention = (
        "float"
        if bits == [None, None]
        else " / ".join("float" if b is None else str(b) for b in bits)
    )
    return [
        f"{scheme['granularity'].replace('_', ' ')}, {len(scheme['bucket_edges']) + 1}",
        attention,
    ]


def _values(
    results: Sequence[Result | None], figure: Figure, style: str, factor: float = 1.0
) -> str:
    """The mean, and in brackets each seed's value where there are several seeds."""
    mean = _mean([result for result in results if result is not None], figure, style, factor)
    each = [
        NOT_RUN if result is None else _mean([result], figure, style, factor) for result in results
    ]
    return f"{mean} ({', '.join(each)})" if len(each) > 1 else mean


def _mean(results: Sequence[Result], figure: Figure, style: str, factor: float = 1.0) -> str:
    """The mean of ``figure`` times ``factor``; a dash where a result has none."""
    values = [figure(result) for result in results]
    known = [value for value in values if value is not None]
    return style.format(factor * float(np.mean(known))) if len(known) == len(values) else DASH


def _epsilon(result: Result, buckets: slice) -> float | None:
    errors = [error for error in result.quality.epsilon_mse[buckets] if error is not None]
    return float(np.mean(errors)) if errors else None


def _claims(results: Results, seeds: Sequence[int]) -> list[str]:
    """Return what the papers say, and what the cells say to it."""
    header = ["claim", "Fréchet distance", "against", "on this model"]
    return [
        *_markdown_table(header, [list(row) for row in judged(results, seeds)]),
        "",
        'Means over the seeds. "Holds": in every pair of seeds; "on average only": the means are '
        "so ordered, but not every pair.",
        "",
        *critical_groups(results, seeds),
    ]


def _bucket_table(table: Table, results: Results, seeds: Sequence[int]) -> list[str]:
    shown = [entry for entry in entries_of(table, results, seeds) if entry.measured]
    if not shown:
        return [f"All cells are {NOT_RUN}."]
    edges = [0.0, *shown[0].measured[0].definition["judged"]["bucket_edges"], 1000.0]
    rows = []
    for bucket in reversed(range(len(edges) - 1)):
        errors = [
            _mean(entry.measured, partial(_epsilon, buckets=slice(bucket, bucket + 1)), "{:.5f}")
            for entry in shown
        ]
        rows.append([f"{edges[bucket]:g} ≤ t < {edges[bucket + 1]:g}", *errors])
    return _markdown_table(["timestep", *(entry.label for entry in shown)], rows)


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def _environments(results: Results) -> list[str]:
    """The machines and packages that the results come from, each once."""
    seen = dict.fromkeys(
        f"{e['processor']}, {e['threads']} thread{'s' * (e['threads'] != 1)}, Python "
        f"{e['python']}, torch {e['torch']}"
        for e in (result.environment for result in results.values() if result is not None)
    )
    return [f"Measured on: {'; '.join(seen)}."] if seen else []


def _slow(results: Results) -> list[str]:
    slow = [
        cell.name
        for cell, result in results.items()
        if result is not None and result.wall_seconds > LIMIT_S
    ]
    return (
        [f"Cells that took more than {LIMIT_S // 60} minutes, judging included: {', '.join(slow)}."]
        if slow
        else []
    )
