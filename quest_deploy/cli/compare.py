"""`quest-deploy compare`: the methods measured against each other, cell by cell."""

from __future__ import annotations

import time
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.cli.console import Console, time_left
from quest_deploy.cli.options import JsonOption
from quest_deploy.compare.cells import ROWS, SEEDS, Pipeline, all_cells
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.models.registry import check_model_name
from quest_deploy.stages.workspaces import DEFAULT_MODEL

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.progress import Progress, TaskID

    from quest_deploy.compare.campaign import CellError, Watcher
    from quest_deploy.compare.cells import Cell
    from quest_deploy.compare.results import Result

DEFAULT_FOLDER = Path("docs/comparison")
TABLE, PLOT = "table.md", "plot.png"
_SECONDS_TRAINED, _SECONDS_CALIBRATED = 240.0, 60.0


class _Lines:
    """Watches a campaign where standard error is no terminal: a line for each cell that starts and
    ends.
    """

    def __init__(self, console: Console, left: _TimeLeft) -> None:
        self._console, self._left = console, left

    def started(self, cell: Cell) -> None:
        self._left.started(cell)
        self._console.note(f"{cell.name} ... ({self._left})")

    def advanced(self, cell: Cell, phase: str, done: int, total: int) -> None:
        pass

    def finished(self, cell: Cell, result: Result) -> None:
        self._left.ended(cell, result.wall_seconds)
        self._console.note(f"{cell.name}: {_summary(result)}")

    def failed(self, cell: Cell, message: str) -> None:
        self._left.ended(cell, None)
        self._console.warn(message)


class _Bars(_Lines):
    """Watches a campaign in a terminal: a bar for all cells, and one for each that runs."""

    def __init__(self, console: Console, left: _TimeLeft, progress: Progress, cells: int) -> None:
        super().__init__(console, left)
        self._progress = progress
        self._all = progress.add_task("cells", total=cells, left=str(left))
        self._tasks: dict[Cell, TaskID] = {}

    def started(self, cell: Cell) -> None:
        self._left.started(cell)
        self._tasks[cell] = self._progress.add_task(cell.name, total=None, left="")

    def advanced(self, cell: Cell, phase: str, done: int, total: int) -> None:
        self._progress.update(
            self._tasks[cell], description=f"{cell.name}: {phase}", completed=done, total=total
        )
        self._progress.update(self._all, left=str(self._left))

    def finished(self, cell: Cell, result: Result) -> None:
        super().finished(cell, result)
        self._end(cell)

    def failed(self, cell: Cell, message: str) -> None:
        super().failed(cell, message)
        self._end(cell)

    def _end(self, cell: Cell) -> None:
        self._progress.remove_task(self._tasks.pop(cell))
        self._progress.update(self._all, advance=1, left=str(self._left))


class _TimeLeft:
    """How long a campaign will still take, from what cells of the same row took before."""

    def __init__(
        self, cells: Sequence[Cell], results: Mapping[Cell, Result | None], jobs: int
    ) -> None:
        self._jobs = jobs
        self._pending = set(cells)
        self._running: dict[Cell, float] = {}
        self._taken: dict[str, list[float]] = {}
        for cell, result in results.items():
            if result is not None:
                self._taken.setdefault(cell.row, []).append(result.wall_seconds)

    def started(self, cell: Cell) -> None:
        self._pending.discard(cell)
        self._running[cell] = time.monotonic()

    def ended(self, cell: Cell, seconds: float | None) -> None:
        self._running.pop(cell)
        if seconds is not None:
            self._taken.setdefault(cell.row, []).append(seconds)

    def __str__(self) -> str:
        now = time.monotonic()
        waiting = sum(self._expected(cell) for cell in self._pending)
        running = sum(
            max(0.0, self._expected(cell) - (now - since)) for cell, since in self._running.items()
        )
        return time_left((waiting + running) / self._jobs)

    def _expected(self, cell: Cell) -> float:
        if taken := self._taken.get(cell.row):
            return sum(taken) / len(taken)
        recipe = ROWS[cell.row].recipe
        trained = isinstance(recipe, Pipeline) and (
            recipe.finetuning is not None or recipe.reconstruction is not None
        )
        return _SECONDS_TRAINED if trained else _SECONDS_CALIBRATED


@contextmanager
def _watching(console: Console, left: _TimeLeft, cells: int) -> Iterator[Watcher]:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    stderr = RichConsole(stderr=True)
    if not stderr.is_terminal:
        yield _Lines(console, left)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=stderr, transient=True) as progress:
        yield _Bars(console, left, progress, cells)


def _summary(result: Result) -> str:
    distance, accuracy = result.quality.frechet_distance, result.quality.accuracy
    return (
        f"Frechet distance {distance:.2f}, accuracy {accuracy:.1%}, made in "
        f"{result.total_seconds:.0f} s"
    )


def compare(
    model: Annotated[
        str, typer.Option(help=f"The model: {DEFAULT_MODEL}, whose images can be judged.")
    ] = DEFAULT_MODEL,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Compute only cells whose name matches this glob, such as 'w4a4-quest-*'; may be "
            "repeated."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="The seeds, separated by commas.")] = ",".join(
        map(str, SEEDS)
    ),
    list_cells: Annotated[
        bool,
        typer.Option(
            "--list", help="List the cells and whether they are measured; compute nothing."
        ),
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Cells that are computed side by side.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each cell.")] = 1,
    folder: Annotated[
        Path, typer.Option(help="Where the cells, the table and the plot are.")
    ] = DEFAULT_FOLDER,
    as_json: JsonOption = False,
) -> None:
    """Compute the missing cells of the comparison, then write its table and its plot; resumes where
    it was interrupted.
    """
    console = Console(as_json=as_json)
    check_model_name(model)
    if model != DEFAULT_MODEL:
        raise InputError(
            f"--model {model}: expected {DEFAULT_MODEL}, the model whose images the comparison can "
            "judge"
        )
    numbers = _seeds(seeds)
    cells = all_cells(numbers)
    chosen = [
        cell
        for cell in cells
        if not only or any(fnmatchcase(cell.name, pattern) for pattern in only)
    ]
    if not chosen:
        raise InputError(
            f"no cell matches {', '.join(only or [])}; `quest-deploy compare --list` names them all"
        )

    from quest_deploy.artifacts.model_source import ModelSource
    from quest_deploy.compare.campaign import compute
    from quest_deploy.compare.methods import definition_of
    from quest_deploy.compare.plot import plot
    from quest_deploy.compare.report import everything, markdown
    from quest_deploy.compare.results import load_result
    from quest_deploy.files import atomic_file, remove_temporaries
    from quest_deploy.models.registry import load_model

    loaded = load_model(ModelSource(model))
    definitions = {cell: definition_of(cell, loaded) for cell in cells}
    results = {cell: load_result(folder, cell, definitions[cell]) for cell in cells}
    if list_cells:
        shown = {cell.name: results[cell] is not None for cell in chosen}
        console.result(
            {"cells": shown},
            *(f"{name}: {'measured' if done else 'not run'}" for name, done in shown.items()),
        )
        return
    missing = [cell for cell in chosen if results[cell] is None]
    remove_temporaries(folder / "cells")
    failures: dict[Cell, CellError] = {}
    if missing:
        with _watching(console, _TimeLeft(missing, results, jobs), len(missing)) as watcher:
            failures = compute(
                model,
                {cell: definitions[cell] for cell in missing},
                folder,
                watcher,
                jobs=jobs,
                threads=threads,
            )
        results |= {cell: load_result(folder, cell, definitions[cell]) for cell in missing}
    command = f"quest-deploy compare --model {model}" + (
        f" --seeds {seeds}" if numbers != list(SEEDS) else ""
    )
    table = markdown(model, command, results, numbers)
    with atomic_file(folder / TABLE) as temporary:
        temporary.write_text(table)
    plot(results, numbers, folder / PLOT)
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
    details: dict[str, Any] = everything(model, command, results, numbers)
    measured = sum(result is not None for result in results.values())
    console.result(
        details,
        *([] if missing else ["nothing to compute: all chosen cells are measured"]),
        f"{folder / TABLE}, {folder / PLOT}: {measured} of {len(cells)} cells measured",
    )


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as e:
        raise InputError(f"expected seeds such as 0,1,2, not {text!r}") from e
    if len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise InputError(f"expected different seeds of 0 or more, not {text!r}")
    return numbers
