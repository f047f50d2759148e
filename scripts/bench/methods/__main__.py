"""Measure quantization methods against each other on an embedded model, cell by cell; writes
docs/comparison: README.md, table.md and plot.png of `emoji`, and of another model a page of its
name.

    python -m scripts.bench.methods [--model emoji-dit] [--only 'w4a4-quest-*'] [--list] [--jobs 2]

A cell that is measured is not measured again, as long as what its figures depend on stays the same.
"""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import atomic_file, remove_temporaries
from quest_deploy.models.registry import EMBEDDED
from scripts.bench.command import run
from scripts.bench.methods.cells import SEEDS, SUBJECTS, all_cells
from scripts.bench.methods.display import watching
from scripts.bench.methods.model import ComparedModel
from scripts.bench.methods.plot import plot
from scripts.bench.methods.recipes import definition_of
from scripts.bench.methods.report import everything, markdown, readme, results_of
from scripts.bench.methods.results import load_result
from scripts.bench.methods.runner import ROOT, compute
from scripts.bench.methods.speed import load_speeds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scripts.bench.methods.cells import Cell
    from scripts.bench.methods.results import Result
    from scripts.bench.methods.runner import CellError

COMMAND = "python -m scripts.bench.methods"
PAGE, TABLE, PLOT = "README.md", "table.md", "plot.png"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def compare(
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Compute only cells whose name matches this glob, such as 'w4a4-quest-*'; may be "
            "repeated."
        ),
    ] = None,
    name: Annotated[
        str, typer.Option("--model", help=f"What is measured: {' or '.join(SUBJECTS)}.")
    ] = EMBEDDED,
    seeds: Annotated[str, typer.Option(help="The seeds, separated by commas.")] = ",".join(
        map(str, SEEDS)
    ),
    list_cells: Annotated[
        bool,
        typer.Option(
            "--list", help="List the cells and whether they are measured; compute nothing."
        ),
    ] = False,
    pages_alone: Annotated[
        bool, typer.Option("--pages", help="Write the pages of what is computed; compute nothing.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Cells that are computed side by side.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each cell.")] = 1,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--cells",
            help="Where the cells' files are; by default scripts/bench/results/methods, with the "
            "model's name behind it for another one.",
        ),
    ] = None,
    store: Annotated[
        Path, typer.Option("--shared", help="Where cells keep what they share; may be removed.")
    ] = ROOT / "quest-out" / "methods",
    docs: Annotated[Path, typer.Option(help="Where the page, its tables and its plot go.")] = ROOT
    / "docs"
    / "comparison",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on standard output.")
    ] = False,
) -> None:
    """Compute the missing cells of the comparison, then write its page, its tables and its plot;
    resumes where it was interrupted.
    """
    numbers = _seeds(seeds)
    if name not in SUBJECTS:
        raise InputError(f"--model {name}: expected {' or '.join(SUBJECTS)}")
    folder = folder or ROOT / "scripts" / "bench" / "results" / results_of(name)
    cells = all_cells(numbers, name)
    selected = [
        cell
        for cell in cells
        if not only or any(fnmatchcase(cell.name, pattern) for pattern in only)
    ]
    if not selected:
        raise InputError(f"no cell matches {', '.join(only or [])}; --list names them all")

    model = ComparedModel.load(name)
    definitions = {cell: definition_of(cell, model) for cell in cells}
    results = {cell: load_result(folder, cell, definitions[cell]) for cell in cells}
    if list_cells:
        shown = {cell.name: results[cell] is not None for cell in selected}
        lines = [
            f"{name}: {'computed' if done else 'not computed'}" for name, done in shown.items()
        ]
        print(json.dumps({"cells": shown}, indent=1) if as_json else "\n".join(lines))
        return
    missing = [] if pages_alone else [cell for cell in selected if results[cell] is None]
    remove_temporaries(folder)
    failures: dict[Cell, CellError] = {}
    if missing:
        with watching(missing, results, jobs) as watcher:
            failures = compute(
                {cell: definitions[cell] for cell in missing},
                folder,
                store,
                watcher,
                model=name,
                jobs=jobs,
                threads=threads,
            )
        results |= {cell: load_result(folder, cell, definitions[cell]) for cell in missing}
    command = (
        COMMAND
        + (f" --model {name}" if name != EMBEDDED else "")
        + (f" --seeds {seeds}" if numbers != list(SEEDS) else "")
    )
    pages = _write_pages(model, command, results, numbers, docs)
    if failures:
        worst = (
            InputError
            if all(failure.exit_code == InputError.exit_code for failure in failures.values())
            else QuestDeployError
        )
        raise worst(
            f"{len(failures)} of {len(missing)} cells failed: "
            f"{'; '.join(map(str, failures.values()))}"
        )
    if as_json:
        print(json.dumps(everything(model.name, command, results, numbers), indent=1))
        return
    if not missing and not pages_alone:
        print("nothing to compute: all selected cells are computed")
    measured = sum(result is not None for result in results.values())
    written = ", ".join([str(docs / pages[0]), *pages[1:]])
    print(f"{written}: {measured} of {len(cells)} cells computed")


def _write_pages(
    model: ComparedModel,
    command: str,
    results: Mapping[Cell, Result | None],
    seeds: Sequence[int],
    docs: Path,
) -> list[str]:
    """Write the pages of ``model``; their names."""
    tables = markdown(model.name, model.sampling, command, results, seeds)
    pages = {f"{model.name}.md": tables}
    if model.name == EMBEDDED:
        others = [name for name in SUBJECTS if (docs / f"{name}.md").exists()]
        pages = {PAGE: readme(command, results, seeds, load_speeds(), others), TABLE: tables}
    for name, text in pages.items():
        with atomic_file(docs / name) as temporary:
            temporary.write_text(text)
    if model.name != EMBEDDED:
        return list(pages)
    plot(results, seeds, docs / PLOT)
    return [*pages, PLOT]


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as e:
        raise InputError(f"expected seeds such as 0,1,2, not {text!r}") from e
    if len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise InputError(f"expected different seeds of 0 or more, not {text!r}")
    return numbers


def main(arguments: Sequence[str] | None = None) -> None:
    """Run :func:`compare`."""
    run(app, arguments)


if __name__ == "__main__":
    main()
