"""Several processes: each computes its share, and together they end where one would."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.finetuning.distributed import Processes, is_main_process
from tests.helpers import refused
from tests.quest_deploy.support import cli, snapshot, strict_json

ONE = [sys.executable]
TWO = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--main_process_port", "0"),
]
FINETUNE = [
    *("--temporal-steps", "2", "--sensitive-steps", "2", "--batch", "4", "--save-every", "1"),
    *("--target-cache", "1"),
]


def finetuned(
    launcher: list[str], workspace: Path, *options: str
) -> tuple[dict[str, Tensor], subprocess.CompletedProcess[str]]:
    """The parameters after the last step, unrounded, and what the program printed."""
    copy = workspace.with_suffix(".pt")
    command = [
        *launcher,
        "-m",
        "tests.quest_deploy.finetuning.keep_state",
        copy,
        "finetune",
        "-w",
        workspace,
        *FINETUNE,
        *options,
        "--json",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return torch.load(copy, weights_only=True)["model"], ended


def _distance(one: dict[str, Tensor], other: dict[str, Tensor], names: Iterable[str]) -> float:
    return float(torch.stack([(one[name] - other[name]).norm() for name in names]).norm())


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A calibrated workspace; the whole chain is not needed here."""
    root = tmp_path / "workspace"
    assert cli("calibrate", "-w", root, "--samples", "8", "--buckets", "3").code == 0
    return root


@pytest.mark.slow
def test_two_processes_move_the_weights_as_one_does_and_only_the_main_one_prints_and_writes(
    workspace: Path, tmp_path: Path
) -> None:
    other, unmoved = tmp_path / "other", tmp_path / "unmoved"
    shutil.copytree(workspace, other)
    shutil.copytree(workspace, unmoved)
    start, _ = finetuned(ONE, unmoved, "--weight-rate", "1e-12", "--scale-rate", "1e-12")
    expected, _ = finetuned(ONE, other)
    found, ended = finetuned(TWO, workspace)
    assert found.keys() == expected.keys()
    of_scales = {name for name in expected if name.startswith("sites.")}
    for names in (of_scales, expected.keys() - of_scales):
        moved = _distance(expected, start, names)
        # Sums in another order move codes at rounding ties, and Adam makes a step of its rate of
        # the smallest gradient: 0.02 of the way. A share's gradients alone go 0.9 of it elsewhere.
        assert moved > 0
        assert _distance(found, expected, names) <= 0.1 * moved
    assert strict_json(ended.stdout)["steps"] == 4
    assert ended.stderr.count("finetune ...") == 1
    assert snapshot(workspace).keys() == snapshot(other).keys()
    one, two = (load_checkpoint(root / "checkpoint.safetensors") for root in (other, workspace))
    assert one.provenance == two.provenance


def test_a_batch_that_cannot_be_shared_out_is_an_input_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with refused(3, 4, "--batch"):
        Processes("cpu", 4)


def test_one_process_takes_all_of_every_batch() -> None:
    with Processes("cpu", 3) as processes:
        assert processes.share(torch.arange(3)).tolist() == [0, 1, 2]
        assert (processes.is_main, processes.device) == (True, torch.device("cpu"))


@pytest.mark.parametrize(("rank", "is_main"), [(None, True), ("0", True), ("1", False)])
def test_the_main_process_is_the_first(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, is_main: bool
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_main_process() is is_main
