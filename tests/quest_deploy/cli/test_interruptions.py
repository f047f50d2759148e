"""Ctrl-C, a full disk, a second process: one message, nothing half-written, and the next run goes
on.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.artifacts.workspace import MANIFEST, Workspace
from quest_deploy.calibration.training_state import TrainingState
from quest_deploy.files import read_json
from quest_deploy.verification import reference as reference_module
from tests.helpers import assert_holds
from tests.quest_deploy.support import STAGES, cli, snapshot, strict_json

FINETUNE = ("--temporal-steps", "4", "--sensitive-steps", "30", "--batch", "4", "--save-every", "1")


def interrupted(
    arguments: list[str | Path],
    ready: Callable[[str], bool],
    number: signal.Signals = signal.SIGINT,
) -> tuple[int, str, str]:
    """Run the program in a process of its own, send it a signal once it is ``ready``: exit code,
    standard output and error.
    """
    program = "from quest_deploy.cli.main import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        deadline = time.monotonic() + 120
        while not ready(line):
            assert process.poll() is None, "it ended before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, line + err


def assert_interrupted(code: int, err: str) -> None:
    assert code == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: interrupted")


def test_calibrate_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    root = tmp_path / "ws"
    code, _, err = interrupted(
        ["calibrate", "-w", root, "--samples", "512", "--buckets", "3"],
        lambda line: line.startswith("calibrate"),
    )
    assert_interrupted(code, err)
    assert set(snapshot(root)) == {MANIFEST, "calibrate-options.json"}
    assert Workspace.open(root).options_of("calibrate")["samples"] == 512
    assert Workspace.open(root).stages == {}
    assert cli("calibrate", "-w", root, "--samples", "1").code == 0
    assert list(Workspace.open(root).stages) == ["calibrate"]
    assert Workspace.open(root).options_of("calibrate")["samples"] == 1


def test_finetune_resumes_after_ctrl_c_and_keeps_the_old_checkpoint_until_then(
    emoji_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, before = emoji_workspace, snapshot(emoji_workspace)
    state = workspace / "finetune-state.pt"
    code, out, err = interrupted(
        ["finetune", "-w", workspace, *FINETUNE, "--json"], lambda line: state.exists()
    )
    assert_interrupted(code, err)
    assert strict_json(out)["exit_code"] == 130
    assert snapshot(workspace).keys() - before.keys() == {
        "finetune-state.pt",
        "finetune-targets.bin",
        "finetune-options.json",
    }
    assert {name: entry for name, entry in snapshot(workspace).items() if name in before} == before

    found: list[TrainingState | None] = []
    load = TrainingState.load
    monkeypatch.setattr(
        TrainingState, "load", lambda path, key: found.append(load(path, key)) or found[-1]
    )
    resumed = cli("finetune", "-w", workspace, *FINETUNE)
    assert resumed.code == 0
    (state_found,) = found
    assert state_found is not None
    assert 1 <= state_found.step < 34
    assert_holds(resumed.err, f"step {state_found.step}")
    assert snapshot(workspace).keys() == before.keys()
    assert Workspace.open(workspace).require("finetune").details["steps"] == 34


def test_reference_goes_on_with_the_next_record_after_ctrl_c_and_keeps_the_old_one_until_then(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, save = snapshot(workspace), reference_module.save_reference

    def one_at_a_time(*arguments: Any, **options: Any) -> Any:
        def report(phase: str, done: int, total: int) -> None:
            raise KeyboardInterrupt

        return save(*arguments, **options | {"progress": report})

    with monkeypatch.context() as patch:
        patch.setattr(reference_module, "save_reference", one_at_a_time)
        assert cli("reference", "-w", workspace, "--seed", "1").code == 130
    left = snapshot(workspace)
    assert {name: entry for name, entry in left.items() if name in before} == before
    assert all(name.startswith("reference-state/") for name in left.keys() - before.keys())
    resumed = cli("reference", "-w", workspace, "--seed", "1")
    assert resumed.code == 0, resumed.err
    after = snapshot(workspace)
    assert after.keys() == before.keys()
    (first,) = (Path(name).name for name in left if "reference-state/buckets" in name)
    assert after[f"reference/{first}"] == left[f"reference-state/{first}"]
    assert Workspace.open(workspace).require("reference").options["seed"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_stops_a_tensorrt_build_and_keeps_the_old_engine(
    emoji_workspace: Path, number: signal.Signals
) -> None:
    workspace, before = emoji_workspace, snapshot(emoji_workspace)
    # Inside the builder Python runs only in the progress monitor, and no exception crosses
    # TensorRT's own code.
    code, _, err = interrupted(
        ["build-engine", "-w", workspace, "--backend", "tensorrt-rtx"],
        lambda line: time.sleep(2.5) is None,
        number,
    )
    assert_interrupted(code, err)
    assert snapshot(workspace) == before
    assert list(workspace.rglob(".tmp-*")) == []


def test_a_second_process_is_told_to_wait(workspace: Path) -> None:
    with Workspace.open(workspace).locked():
        ended = cli("finetune", "-w", workspace)
    ended.assert_refused(workspace, "process", code=1)


COMMANDS: dict[str, tuple[str, ...]] = {
    "calibrate": ("--samples", "1"),
    "finetune": (
        *("--temporal-steps", "1", "--sensitive-steps", "1", "--batch", "2", "--save-every", "1"),
    ),
    "reference": (),
    "build-engine": ("--backend", "onnxruntime"),
    "generate": ("--backend", "onnxruntime", "--rows", "1", "--steps", "1"),
}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let every write beyond ``size`` bytes of a file fail, in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_write_that_fails_ends_in_one_message_and_leaves_the_workspace_as_it_was(
    workspace: Path, command: str
) -> None:
    before = snapshot(workspace)
    with files_of_at_most(500):
        ended = cli(command, "-w", workspace, *COMMANDS[command])
    assert ended.code == 1
    assert ended.message
    assert snapshot(workspace) == before
    assert list(workspace.rglob(".tmp-*")) == []


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("calibrate", "trajectories.safetensors"),
        ("calibrate", "calibrated.safetensors"),
        ("finetune", "finetune-state.pt"),
        ("finetune", "checkpoint.safetensors"),
        ("finetune", "manifest.json"),
        ("generate", "images/onnxruntime-0.png"),
    ],
)
def test_a_full_disk_is_said_to_be_full(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, command: str, file: str
) -> None:
    target = workspace / file
    kept = target.read_bytes() if target.exists() else None
    new = Workspace.new

    def plant(path: Path) -> None:
        """Have the file that is to become ``path`` written where the disk is always full."""
        if path.name == target.name:
            temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
            temporary.is_symlink() or temporary.symlink_to("/dev/full")

    def planted(opened: Workspace, *parts: str) -> Path:
        path = new(opened, *parts)
        plant(path)
        return path

    # The lock clears temporaries away, and instead of that one is planted.
    monkeypatch.setattr(
        "quest_deploy.artifacts.workspace.remove_temporaries", lambda folder: plant(target)
    )
    monkeypatch.setattr(Workspace, "new", planted)
    ended = cli(command, "-w", workspace, *COMMANDS[command])
    ended.assert_refused("disk", code=1)
    assert (target.read_bytes() if target.exists() else None) == kept
    monkeypatch.undo()
    assert cli(command, "-w", workspace, *COMMANDS[command]).code == 0


def test_what_a_killed_process_left_is_cleared_away_by_the_next_command(workspace: Path) -> None:
    left = [
        workspace / ".tmp-1-reference",
        workspace / "engines" / ".tmp-1-openvino",
        workspace / "images" / ".tmp-1-grid.png",
    ]
    for folder in left:
        folder.mkdir()
    assert (
        cli(
            "generate", "-w", workspace, "--backend", "onnxruntime", "--rows", "1", "--steps", "1"
        ).code
        == 0
    )
    assert not any(folder.exists() for folder in left)
    assert set(read_json(workspace / MANIFEST)["stages"]) == {*STAGES, "generate/onnxruntime"}
