"""The comparison in Markdown and as JSON. Every cell is shown as it was measured; one without a
result is "not computed".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from quest_deploy.calibration.reconstruction import ReconstructOptions
from quest_deploy.evaluation.quality import HELD_OUT_SAMPLES
from quest_deploy.models.registry import EMBEDDED
from scripts.bench.methods.buckets import where_buckets_pay
from scripts.bench.methods.cells import (
    FLOAT_BITS,
    ROWS,
    STEPS,
    SUBJECTS,
    Cell,
    Table,
    cells_of,
)
from scripts.bench.methods.claims import FIGURES, NEWER, claims_of, critical_groups, judge
from scripts.bench.methods.deploy import answer, choices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from quest_deploy.evaluation.quality import SamplingOptions
    from scripts.bench.methods.cells import Subject
    from scripts.bench.methods.claims import Claim
    from scripts.bench.methods.results import Result

    Results = Mapping[Cell, Result | None]
    Speeds = Mapping[str, Any] | None
    Figure = Callable[[Result], float | None]

NOT_RUN = "not computed"
DASH = "\N{EN DASH}"
PARTS = (slice(10, 20), slice(1, 10), slice(0, 1))
"""The buckets that a table's three columns of epsilon-MSE take the mean of: t from 500, from 50 to
500, below 50.
"""
LIMIT_S = 360
"""What a cell may take; the report names those that took longer."""
MEGA = 1e-6
VERDICTS = (
    'Figures are means over the seeds. "Holds": in every pair of seeds; "on average only": the '
    "means are so ordered,",
    'but not every pair; "not on average" and "the opposite holds" say the same of the other way '
    "round.",
)
OF_FLOW = (
    "It is a transformer of flow matching: DDIM's step is Euler's there, embedders and adaptive "
    "norms are floats too, and",
    "the buckets hold equally many of the 20 steps, which its shift puts nearer to the noise.",
)
_GRANULARITIES = {
    "per_tensor": "per tensor",
    "folded_channel": "smoothing",
    "free_channel": "per channel",
}


@dataclass(frozen=True)
class Entry:
    """A row as it is shown: its label, its cells by seed, and what is known of them (None: not
    computed).
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


def readme(
    command: str,
    results: Results,
    seeds: Sequence[int],
    speeds: Speeds,
    others: Sequence[str] = (),
) -> str:
    """The page: which bits to deploy, how to read the tables, and what is not computed yet.

    Args:
        others: the models that have pages of their own, beside it.
    """
    shown = _shown(results, seeds)
    measured = sum(result is not None for result in shown.values())
    lines = [
        "# Methods compared on the embedded model",
        "",
        f"`{command}` makes this page, [table.md](table.md) and plot.png from the figures in",
        "`scripts/bench/results/methods/`, a JSON file for each cell: one method at one bit-width",
        "with one seed.",
        "",
        "    make bench-methods                         # computes what is missing",
        "    python -m scripts.bench.methods --list     # the cells, and which are computed",
        "",
        f"**{measured} of {len(shown)} cells are computed.**"
        + ("" if measured == len(shown) else " [The others](#not-computed-yet) say nothing yet."),
        "",
        "## Which bits should one deploy?",
        "",
        *_deployment_table(results, seeds, speeds),
        "",
        *(f"- {line}" for line in answer(results, seeds, speeds)),
        "",
        "Speeds are over FP32 in the same run of `quest-deploy benchmark`, on "
        + (
            f"{_machine(speeds['environment'])}."
            if speeds
            else "no machine yet (`python -m scripts.bench.methods.speed`)."
        ),
        "On CPUs four-bit codes are computed in INT8: W4A4 saves no time there beside W4A8.",
        "",
        "![Fréchet distances and prediction errors of all methods](plot.png)",
        "",
        *(line for x in others for line in (f"The same of another model: [{x}]({x}.md).", "")),
        "## Where do timestep buckets pay?",
        "",
        "At W4A4, the Fréchet distance and how often the prompt is among the five nearest. One",
        "bucket is measured on 20 and on 50 steps alone, and what noise moves on 20 steps.",
        "",
        *(f"- {line}" for line in where_buckets_pay(results, seeds)),
        "",
        "## Does newer work help?",
        "",
        *(f"- {_sentence(claim, results, seeds)}" for claim in NEWER),
        "",
        *VERDICTS,
        "",
        "Branches of low rank are an option, `calibrate --low-rank`, and eight bits for about the",
        "same layers another one, `--eight-bit-layers`; both together are not measured. Rotations",
        "are no option: neither figure is better with one in every pair of seeds.",
        "",
        "## What is measured",
        "",
        "- Of the images: how often the prompt is the nearest of all 1,633 in the judge's eyes, or",
        "  among the five nearest; the Fréchet distance to the real pictures, in the judge's",
        "  features; and the likeness to FP32's images of the same noise: feature distance, PSNR,",
        "  SSIM.",
        "- Of the predictions: the squared error beside FP32's, on FP32's own trajectories, in 20",
        "  equally wide timestep buckets whatever the method's are.",
        "- The payload: packed codes, scales, biases, the tables of the activation quantizers, and",
        "  what stays in float.",
        "- CPU seconds of making the model on one thread; what cells share is counted for each.",
        "",
        "None of it enters calibration, finetuning or the choice of a seed. Every row is data-free",
        "and starts from as many recorded samples as every other, NNCF from a sixteenth of them;",
        f"what is finetuned takes {STEPS} steps, the embedded model's own number.",
        "",
        "modelopt's integer configurations are W8A8; at other bits, all its layers but the first",
        "and the last have those. Its FP4 formats need a GPU; NNCF's activations have 8 bits.",
        "",
        "## How sure it is",
        "",
        "- Three seeds draw the calibration data and the batches; all three values are shown.",
        '- "FP32, other noise" is FP32 itself on other noise: what differs by less is chance.',
        "- A smaller ε-MSE is not always a smaller Fréchet distance.",
        "",
        "## Not computed yet",
        "",
        *_not_computed(shown),
    ]
    return "\n".join(lines) + "\n"


def _shown(results: Results, seeds: Sequence[int]) -> Results:
    return {
        cell: result
        for cell, result in results.items()
        if cell.seed in seeds or cell.bits == FLOAT_BITS
    }


def _not_computed(results: Results) -> list[str]:
    absent: dict[str, list[int]] = {}
    for cell, result in results.items():
        if result is None:
            absent.setdefault(f"{cell.bits}-{cell.row}", []).append(cell.seed)
    if not absent:
        return ["Nothing: all cells are computed."]
    return [f"- `{row}`: seed {', '.join(map(str, seeds))}" for row, seeds in absent.items()]


def _machine(environment: Mapping[str, Any]) -> str:
    threads = environment["threads"]
    return f"{environment['processor']}, {threads} thread{'s' * (threads != 1)}"


def _deployment_table(results: Results, seeds: Sequence[int], speeds: Speeds) -> list[str]:
    found = choices(results, seeds, speeds)
    runs = list(found[0].speedups) if found else []
    header = ["QuEST", "top 1, %", "top 5, %", "Fréchet distance", "PSNR, dB", "payload, MB"]
    header += [f"{backend}, batch {batch}" for backend, batch in runs]
    engines = list(found[0].engine_bytes) if found else []
    header += [f"{backend} engine, MB (FP32)" for backend in engines]
    float_cells = [results.get(cell) for cell in cells_of("fp32", FLOAT_BITS, seeds)]
    rows = [
        [
            "FP32",
            f"{100 * r.judgement.top1:.1f}",
            f"{100 * r.judgement.top5:.1f}",
            f"{r.judgement.frechet_distance:.2f}",
            DASH,
            f"{MEGA * r.payload_bytes:.2f}",
            *["1.00x"] * len(runs),
            *[DASH] * len(engines),
        ]
        for r in float_cells
        if r is not None
    ]
    for choice in found:
        row = [
            choice.bits.upper(),
            f"{100 * choice.top1:.1f}",
            f"{100 * choice.top5:.1f}",
            f"{choice.frechet_distance:.2f}",
            f"{choice.psnr:.1f}",
            f"{MEGA * choice.payload_bytes:.2f}",
        ]
        row += [f"{ratio:.2f}x" for ratio in choice.speedups.values()]
        sizes = choice.engine_bytes.values()
        rows.append(row + [f"{MEGA * own:.2f} ({MEGA * fp32:.2f})" for own, fp32 in sizes])
    return _markdown_table(header, rows) if rows else ["No bit-width is computed yet."]


def markdown(
    model: str,
    sampling: SamplingOptions,
    command: str,
    results: Results,
    seeds: Sequence[int],
) -> str:
    """The tables, with the command that makes them."""
    subject, cells = SUBJECTS[model], _shown(results, seeds)
    alone = model != EMBEDDED  # whose answers stand on a page of their own
    missing = sum(result is None for result in cells.values())
    images = (
        f"{sampling.images} images, {sampling.steps}-step {sampling.scheduler.upper()} but where a "
        f"title says other steps, guidance {sampling.guidance:g}"
    )
    intro = (
        f"Model: {model}. Each figure is the mean over the seeds {', '.join(map(str, seeds))}, in "
        "brackets each seed's own value.",
        "A seed draws the calibration trajectories, the values kept for the range search and the "
        "finetuning batches;",
        f"the noise and the prompts of the judged images are the same in all cells ({images}).",
        f"ε-MSE is against FP32's predictions on {HELD_OUT_SAMPLES} of its own trajectories that "
        "no cell was calibrated on.",
        "Seconds are CPU seconds of making the model (recording trajectories, calibration, "
        "training) without judging it.",
        *([] if alone else [_budget_of_reconstruction()]),
        "Scales: what one activation scale covers, and the number of timestep buckets. The first "
        f"and the last layer {'are floats' if alone else 'have 8 bits'}.",
        *(OF_FLOW if alone else []),
    )
    lines = [
        f"# Methods compared{f' on {model}' if alone else ''}",
        "",
        f"Made by `{command}` from the files in `scripts/bench/results/{results_of(model)}/`; no "
        "number is edited by hand.",
        "",
        *intro,
        "",
        f"{len(cells) - missing} of {len(cells)} cells are computed"
        + (f"; {missing} are not." if missing else "."),
        *_environments(cells),
        *_slow(cells),
    ]
    if alone:
        lines += ["", "## Which bits should one deploy?", ""]
        lines += _deployment_table(results, seeds, None)
        lines += ["", *(f"- {line}" for line in answer(results, seeds, None))]
    for table in subject.main:
        lines += ["", f"## {table.title}", "", *_table("method", table, results, seeds)]
    lines += ["", "## The papers' claims on this model", "", *_claims(subject, results, seeds)]
    if not alone:
        lines += ["", *critical_groups(results, seeds)]
    for ablation in subject.ablations:
        lines += [
            "",
            f"## {ablation.bits.upper()}: {ablation.title}",
            "",
            *_table("QuEST with", ablation, results, seeds),
        ]
    for table in subject.main:
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
        for table in SUBJECTS[model].tables
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
        "top 1, %",
        "top 5, %",
        "Fréchet distance",
        "feature distance",
        "PSNR, dB",
        "SSIM",
        "ε-MSE, t ≥ 500",
        "50 ≤ t < 500",
        "t < 50",
        "payload, MB",
        "CPU s",
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
    every, found = entry.results, entry.measured
    return [
        *_settings(found[0]),
        _mean(found, lambda r: r.judgement.top1, "{:.1f}", 100),
        _values(every, lambda r: r.judgement.top5, "{:.1f}", 100),
        _values(every, lambda r: r.judgement.frechet_distance, "{:.2f}"),
        _values(every, lambda r: r.judgement.feature_distance, "{:.4f}"),
        _mean(found, lambda r: r.quality.psnr, "{:.1f}"),
        _mean(found, lambda r: r.quality.ssim, "{:.3f}"),
        *(_mean(found, partial(_epsilon, buckets=part), "{:.4f}") for part in PARTS),
        _mean(found, lambda r: r.payload_bytes, "{:.2f}", MEGA),
        _mean(found, lambda r: r.total_seconds, "{:.0f}"),
    ]


def _settings(result: Result) -> list[str]:
    """Return what one activation scale covers and the buckets; bits of q, k, v and of softmax."""
    recipe, notes = result.definition["recipe"], result.notes
    if recipe["method"] == "float":
        return [DASH, "float"]
    if recipe["method"] == "modelopt":
        return [
            f"its own, 1 ({notes['quantized_layers']} of {notes['layers']} layers)",
            "float",
        ]
    if recipe["method"] == "nncf":
        return [f"its own, 1 ({notes['quantized_tensors']} tensors)", "its own"]
    scheme = recipe["scheme"]
    bits = [scheme["attention_bits"], scheme["softmax_bits"]]
    return [
        f"{_GRANULARITIES[scheme['granularity']]}, {len(scheme['bucket_edges']) + 1}",
        "float" if bits == [None, None] else " / ".join(map(str, bits)),
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


def _claims(subject: Subject, results: Results, seeds: Sequence[int]) -> list[str]:
    """Return what the papers say, and what the cells say to it."""
    header = [
        "claim",
        "Fréchet distance",
        "against",
        "so judged",
        "feature distance",
        "against",
        "so judged",
    ]
    rows = []
    for claim in claims_of(subject):
        row = [claim.text]
        for figure, style in FIGURES.items():
            verdict = judge(claim, figure, results, seeds)
            sides = (verdict.better, verdict.worse)
            row += [NOT_RUN if side is None else style.format(side) for side in sides]
            row.append(verdict.word)
        rows.append(row)
    return [
        *_markdown_table(header, rows),
        "",
        *VERDICTS,
    ]


def results_of(model: str) -> str:
    """The folder of a model's cells, in scripts/bench/results."""
    return "methods" if model == EMBEDDED else f"methods-{model}"


def _sentence(claim: Claim, results: Results, seeds: Sequence[int]) -> str:
    parts = []
    for figure, style in FIGURES.items():
        verdict = judge(claim, figure, results, seeds)
        name = {"frechet_distance": "Fréchet distance"}.get(figure, figure.replace("_", " "))
        sides = (
            ""
            if verdict.better is None or verdict.worse is None
            else f" ({style.format(verdict.better)} for {style.format(verdict.worse)})"
        )
        parts.append(f"by the {name}: {verdict.word}{sides}")
    return f"{claim.text}. Judged {'; '.join(parts)}."


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
        f"{_machine(e)}, Python {e['python']}, torch {e['torch']}"
        for e in (result.environment for result in results.values() if result is not None)
    )
    return [f"Measured on: {'; '.join(seen)}."] if seen else []


def _slow(results: Results) -> list[str]:
    slow = [
        cell.name
        for cell, result in results.items()
        if result is not None and result.process_seconds > LIMIT_S
    ]
    return (
        [f"Cells that took more than {LIMIT_S // 60} CPU minutes: {', '.join(slow)}."]
        if slow
        else []
    )
