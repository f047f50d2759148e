"""The runner with workers that only pretend to measure: a few lines of Python each, by the row they
are asked for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.bench.methods import runner
from scripts.bench.methods.cells import Cell
from scripts.bench.methods.results import Result, cell_path, load_result
from scripts.bench.methods.runner import compute, worker_command
from tests.scripts.bench.methods.conftest import measurement

DONE = f"print(json.dumps({measurement()!r}), flush=True)"
"""The last line of a worker that succeeds."""
A, B, C = (Cell("quest", "w4a4", seed) for seed in range(3))


class Watcher:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []

    def started(self, cell: Cell) -> None:
        self.told.append(("started", cell.name))

    def advanced(self, cell: Cell, phase: str, done: int, total: int) -> None:
        self.told.append(("advanced", cell.name, phase, f"{done}/{total}"))

    def finished(self, cell: Cell, result: Result) -> None:
        self.told.append(("finished", cell.name))

    def failed(self, cell: Cell, message: str) -> None:
        self.told.append(("failed", cell.name, message))


def pretend(monkeypatch: pytest.MonkeyPatch, programs: dict[Cell, str]) -> None:
    """Let a cell's worker be its program; ``threads`` and the standard modules are there."""

    def command(model: str, cell: Cell, store: Path, threads: int) -> list[str]:
        imports = f"import json, os, signal, sys, time\nthreads = {threads}\n"
        return [sys.executable, "-c", imports + programs[cell]]

    monkeypatch.setattr(runner, "worker_command", command)


def test_the_worker_is_this_python_with_the_model_and_the_cell_in_its_arguments(
    tmp_path: Path,
) -> None:
    command = worker_command("emoji", A, tmp_path, 2)
    assert command == [
        sys.executable,
        "-m",
        "scripts.bench.methods.worker",
        "emoji",
        "quest",
        "w4a4",
        "0",
        str(tmp_path),
        "2",
    ]


def test_each_result_is_saved_with_its_definition_and_progress_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(
        monkeypatch,
        {A: 'print(json.dumps({"phase": "training", "done": 3, "total": 9}))\n' + DONE, B: DONE},
    )
    watcher = Watcher()
    assert compute({A: {"seed": 0}, B: {"seed": 1}}, tmp_path, tmp_path, watcher) == {}
    assert watcher.told == [
        ("started", A.name),
        ("advanced", A.name, "training", "3/9"),
        ("finished", A.name),
        ("started", B.name),
        ("finished", B.name),
    ]
    saved = load_result(tmp_path, A, {"seed": 0})
    assert saved is not None
    assert saved.judgement.frechet_distance == 1.0
    assert load_result(tmp_path, B, {"seed": 1}) is not None


@pytest.mark.parametrize(
    ("program", "message", "exit_code"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "w4a4-quest-seed0: its process was killed by signal 9",
            1,
        ),
        (
            "raise ValueError('scale is 0')",
            "w4a4-quest-seed0: its process ended with exit code 1: ValueError: scale is 0",
            1,
        ),
        (
            "print(json.dumps({'phase': 'training', 'done': 1, 'total': 2}))",
            "w4a4-quest-seed0: its process ended with exit code 0",
            1,
        ),
        ("print(json.dumps({'error': 'install it', 'exit_code': 2}))", "install it", 2),
    ],
)
def test_a_cell_that_fails_leaves_no_file_and_the_next_one_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str, exit_code: int
) -> None:
    pretend(monkeypatch, {A: program, B: DONE})
    watcher = Watcher()
    failures = compute({A: {}, B: {}}, tmp_path, tmp_path, watcher)
    assert {cell: (str(error), error.exit_code) for cell, error in failures.items()} == {
        A: (message, exit_code)
    }
    assert ("failed", A.name, message) in watcher.told
    assert [path.name for path in tmp_path.iterdir()] == [f"{B.name}.json"]


def test_jobs_run_side_by_side_and_no_more_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, dict.fromkeys((A, B, C), "time.sleep(0.5)\n" + DONE))
    watcher = Watcher()
    compute({A: {}, B: {}, C: {}}, tmp_path, tmp_path, watcher, jobs=2)
    running = most = 0
    for event, *_ in watcher.told:
        running += {"started": 1, "finished": -1}[event]
        most = max(most, running)
    assert most == 2


def test_a_worker_has_the_threads_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(
        monkeypatch, {A: "assert (threads, os.environ['OMP_NUM_THREADS']) == (3, '3')\n" + DONE}
    )
    assert compute({A: {}}, tmp_path, tmp_path, Watcher(), threads=3) == {}


def test_a_write_that_fails_ends_the_run_with_that_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, {A: DONE, B: "time.sleep(60)"})
    folder = tmp_path / "cells"
    folder.write_text("no folder")
    started = time.monotonic()
    with pytest.raises(FileExistsError):
        compute({A: {}, B: {}}, folder, tmp_path, Watcher(), jobs=2)
    assert time.monotonic() - started < 30


def test_ctrl_c_keeps_what_is_finished_and_leaves_no_process_behind(tmp_path: Path) -> None:
    child = tmp_path / "pid"
    program = f"""
import json, sys
from pathlib import Path
from scripts.bench.methods import runner
from scripts.bench.methods.cells import Cell
from tests.scripts.bench.methods.test_runner import A, B, DONE, Watcher
programs = {{A: "import json\\n" + DONE, B: "import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(600)"}}
runner.worker_command = lambda model, cell, store, threads: [sys.executable, "-c", programs[cell]]
try:
    runner.compute({{A: {{}}, B: {{}}}}, Path({str(tmp_path)!r}), Path({str(tmp_path)!r}), Watcher())
except KeyboardInterrupt:
    sys.exit(130)
"""
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        deadline = time.monotonic() + 120
        while not (child.exists() and child.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)
    assert json.loads(cell_path(tmp_path, A).read_text())["cell"] == A.name
    assert not cell_path(tmp_path, B).exists()
