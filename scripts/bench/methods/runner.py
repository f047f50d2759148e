"""Computes cells, each in a process of its own; Ctrl-C loses only those that are running."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quest_deploy.models.registry import EMBEDDED
from scripts.bench.methods.results import Result, save_result

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scripts.bench.methods.cells import Cell


ROOT = Path(__file__).parents[3]
"""The checkout, in which workers run."""


class Watcher(Protocol):
    """Hears what happens."""

    def started(self, cell: Cell) -> None:
        """Its process runs."""

    def advanced(self, cell: Cell, phase: str, done: int, total: int) -> None:
        """It has done ``done`` of ``total`` parts of ``phase``."""

    def finished(self, cell: Cell, result: Result) -> None:
        """Its result is saved."""

    def failed(self, cell: Cell, message: str) -> None:
        """It has no result."""


class CellError(Exception):
    """A cell could not be measured; ``exit_code`` 2 where the user can mend it, 1 otherwise."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def worker_command(model: str, cell: Cell, store: Path, threads: int) -> list[str]:
    """The command that measures ``cell``; see ``scripts.bench.methods.worker``."""
    arguments = (model, cell.row, cell.bits, str(cell.seed), str(store), str(threads))
    return [sys.executable, "-m", "scripts.bench.methods.worker", *arguments]


def compute(
    definitions: Mapping[Cell, dict[str, Any]],
    folder: Path,
    store: Path,
    watcher: Watcher,
    *,
    model: str = EMBEDDED,
    jobs: int = 1,
    threads: int = 1,
) -> dict[Cell, CellError]:
    """Measure the cells in the order of ``definitions`` and save each result as soon as it is
    there.

    Args:
        definitions: what each cell is measured under; saved with its result.
        store: where cells share what they make.
        model: one of ``cells.SUBJECTS``.
        jobs: processes side by side.
        threads: of each process.

    Returns:
        The cells that failed; the others are saved.
    """
    failures: dict[Cell, CellError] = {}

    async def run_all(scratch: Path) -> None:
        gate = asyncio.Semaphore(jobs)

        async def run(cell: Cell, definition: dict[str, Any]) -> None:
            async with gate:
                watcher.started(cell)
                try:
                    measured = await _measure(
                        worker_command(model, cell, store, threads),
                        scratch,
                        cell,
                        threads,
                        watcher,
                    )
                    result = Result.from_json(definition, measured)
                except CellError as e:
                    failures[cell] = e
                    watcher.failed(cell, str(e))
                    return
                save_result(folder, cell, result)
                watcher.finished(cell, result)

        async with asyncio.TaskGroup() as group:
            for cell, definition in definitions.items():
                group.create_task(run(cell, definition))

    with tempfile.TemporaryDirectory(prefix="quest-deploy-") as scratch:
        try:
            asyncio.run(run_all(Path(scratch)))
        except ExceptionGroup as e:  # such as a full disk; the first ends the others
            raise e.exceptions[0] from e
    return failures


async def _measure(
    command: list[str], scratch: Path, cell: Cell, threads: int, watcher: Watcher
) -> dict[str, Any]:
    log = scratch / f"{cell.name}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    last: dict[str, Any] = {}
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=environment,
            cwd=ROOT,
            # Ctrl-C in a terminal reaches this process alone, which then ends the others.
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            async for line in process.stdout:
                last = json.loads(line)
                if "phase" in last:
                    watcher.advanced(cell, last["phase"], last["done"], last["total"])
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if "error" in last:
        raise CellError(last["error"], last["exit_code"])
    if code != 0 or "quality" not in last:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        said = log.read_text(errors="replace").strip().splitlines()
        raise CellError(f"{cell.name}: its process {how}{': ' + said[-1] if said else ''}")
    return last
