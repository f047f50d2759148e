"""Processes that end before their time, and those that they had started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.quest_deploy.support import cli

ENDINGS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 130, signal.SIGINT: 130}


def children(pid: int) -> set[int]:
    """The processes that ``pid`` has started and that still run."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == str(pid) and fields[0] != "Z":
            found.add(int(status.parent.name))
    return found


@pytest.mark.slow
def test_the_processes_of_a_distributed_run_end_with_their_launcher(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    assert cli("calibrate", "-w", workspace, "--samples", "8", "--buckets", "3").code == 0
    program = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        *("-m", "quest_deploy", "finetune", "-w", workspace, "--batch", "4"),
    ]
    state = workspace / "finetune-state.pt"
    with subprocess.Popen(program, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 240
            while not state.exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            started = children(process.pid)
            assert len(started) == 2
        finally:
            process.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        assert time.monotonic() < deadline, "a process outlived its launcher"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "ending",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
    ids=lambda ending: signal.Signals(ending).name,
)
def test_a_benchmarks_workers_end_with_it_and_its_scratch_is_cleared_by_the_next_command(
    workspace: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    program = [sys.executable, "-m", "quest_deploy", "benchmark", "-w", workspace]
    program += ["--backend", "onnxruntime", "--runs", "1", "--warmup", "0", "--batch", "1"]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 120
        while not (started := children(process.pid)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        started |= children(process.pid)
        process.send_signal(ending)
        _, printed = process.communicate(timeout=60)
    assert process.returncode == ENDINGS[ending], printed
    assert "Traceback" not in printed
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
    assert not list(scratch.iterdir())
    ended = subprocess.run(program, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert not list(workspace.glob(".tmp-*"))
