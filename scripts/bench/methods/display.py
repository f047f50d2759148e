"""What a run shows on standard error: bars in a terminal, else a line for each cell that starts and
ends.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scripts.bench.methods.cells import ROWS, Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.progress import TaskID

    from scripts.bench.methods.cells import Cell
    from scripts.bench.methods.results import Result
    from scripts.bench.methods.runner import Watcher

_SECONDS_TRAINED, _SECONDS_CALIBRATED = 200.0, 80.0


@contextmanager
def watching(
    cells: Sequence[Cell], results: Mapping[Cell, Result | None], jobs: int
) -> Iterator[Watcher]:
    """Show how ``cells`` are measured, ``jobs`` of them side by side; ``results`` are those of
    before, which say how long cells take.
    """
    left = _TimeLeft(cells, results, jobs)
    stderr = Console(stderr=True)
    if not stderr.is_terminal:
        yield _Lines(left)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=stderr, transient=True) as progress:
        yield _Bars(left, progress, len(cells))


class _Lines:
    def __init__(self, left: _TimeLeft) -> None:
        self._left = left

    def started(self, cell: Cell) -> None:
        self._left.started(cell)
        _note(f"{cell.name} ... ({self._left})")

    def advanced(self, cell: Cell, phase: str, done: int, total: int) -> None:
        pass

    def finished(self, cell: Cell, result: Result) -> None:
        self._left.ended(cell, result.wall_seconds)
        _note(f"{cell.name}: {_summary(result)}")

    def failed(self, cell: Cell, message: str) -> None:
        self._left.ended(cell, None)
        _note(f"warning: {message}")


class _Bars(_Lines):
    """A bar for all cells, and one for each that runs."""

    def __init__(self, left: _TimeLeft, progress: Progress, cells: int) -> None:
        super().__init__(left)
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
    """How long a run will still take, from what cells of the same row took before."""

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
        return f"about {(waiting + running) / self._jobs / 60:.0f} min left"

    def _expected(self, cell: Cell) -> float:
        if taken := self._taken.get(cell.row):
            return sum(taken) / len(taken)
        recipe = ROWS[cell.row].recipe
        trained = isinstance(recipe, Pipeline) and (
            recipe.finetuning is not None or recipe.reconstruction is not None
        )
        return _SECONDS_TRAINED if trained else _SECONDS_CALIBRATED


def _note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _summary(result: Result) -> str:
    return (
        f"Frechet distance {result.judgement.frechet_distance:.2f}, prompt among the nearest five "
        f"{result.judgement.top5:.1%}, {result.process_seconds:.0f} CPU s"
    )
