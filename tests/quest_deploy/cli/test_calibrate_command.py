"""`calibrate --method qdiff`: its scheme, its options, and how it goes on where it was
interrupted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.workspace import MANIFEST, Workspace
from quest_deploy.calibration import reconstruction as reconstruct_module
from quest_deploy.calibration import trajectories as trajectories_module
from tests.helpers import assert_holds
from tests.quest_deploy.support import Outcome, cli, flip_byte, snapshot, truncate

pytestmark = pytest.mark.usefixtures("mini_emoji")
CALIBRATE = ("--buckets", "2", "--samples", "2", "--steps", "2")
QDIFF = (
    *CALIBRATE,
    "--method",
    "qdiff",
    "--reconstruction-samples",
    "6",
    "--rounding-steps",
    "3",
    "--scale-steps",
    "2",
    "--reconstruction-batch",
    "4",
)
CALIBRATED = "calibrated.safetensors"
START = tuple(
    f"reconstruct-state/{name}"
    for name in ("trajectories.safetensors", CALIBRATED, "made-from.json")
)


def test_qdiff_splits_shortcuts_and_finetuning_starts_from_it(tmp_path: Path) -> None:
    assert cli("calibrate", "-w", tmp_path, *QDIFF).code == 0
    checkpoint = load_checkpoint(tmp_path / CALIBRATED)
    assert checkpoint.scheme.split_shortcuts
    assert list(checkpoint.architecture.split_shortcuts) == [
        "up_blocks.0.resnets.0.conv_shortcut",
        "up_blocks.0.resnets.1.conv_shortcut",
    ]
    given = {"samples": 6, "rounding_steps": 3, "scale_steps": 2, "batch": 4}
    assert given.items() <= checkpoint.provenance["reconstruction"].items()
    assert Workspace.open(tmp_path).stages["calibrate"].options["reconstruction"] == given
    assert set(snapshot(tmp_path)) == {MANIFEST, CALIBRATED, "trajectories.safetensors"}
    assert_holds(cli("export", "-w", tmp_path).err, "Q-Diffusion")

    few = ("--temporal-steps", "2", "--sensitive-steps", "2", "--batch", "2")
    assert cli("finetune", "-w", tmp_path, *few).code == 0
    tuned = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert (tuned.provenance["method"], tuned.provenance["start"]) == ("quest", "qdiff")
    assert tuned.architecture == checkpoint.architecture


@pytest.mark.parametrize(
    ("first", "second"),
    [((*QDIFF, "--whole-shortcuts"), QDIFF), (CALIBRATE, QDIFF)],
    ids=["told not to", "workspace without"],
)
def test_qdiff_leaves_shortcuts_whole(
    tmp_path: Path, first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    for options in (first, second):
        assert cli("calibrate", "-w", tmp_path, *options).code == 0
        assert not Workspace.open(tmp_path).scheme.split_shortcuts
    assert load_checkpoint(tmp_path / CALIBRATED).provenance["method"] == "qdiff"


@pytest.mark.parametrize(
    "option",
    ["--reconstruction-samples", "--rounding-steps", "--scale-steps", "--reconstruction-batch"],
)
def test_options_of_the_reconstruction_need_qdiff(tmp_path: Path, option: str) -> None:
    ended = cli("calibrate", "-w", tmp_path / "ws", "--method", "l2.4", option, "3")
    ended.assert_refused(option, "--method qdiff", "l2.4")
    assert not (tmp_path / "ws").exists()


def content(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata and tensors, which the file itself holds in any order."""
    with safe_open(path, "np") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118 - no dict


def calibrate_until(done: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """Press Ctrl-C when so many units are ``done``."""
    reconstruct = reconstruct_module.reconstruct

    def interrupted(*arguments: Any, **options: Any) -> Any:
        def report(phase: str, units: int, total: int, unit: str) -> None:
            if units == done:
                raise KeyboardInterrupt

        return reconstruct(*arguments[:4], report, **options)

    with monkeypatch.context() as patch:
        patch.setattr(reconstruct_module, "reconstruct", interrupted)
        return cli("calibrate", "-w", root, *QDIFF)


def test_an_interrupted_reconstruction_resumes_to_the_same_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("calibrate", "-w", tmp_path / "whole", *QDIFF).code == 0
    root = tmp_path / "interrupted"
    ended = calibrate_until(5, root, monkeypatch)
    assert (ended.code, ended.message.split(";")[0]) == (130, "interrupted")
    assert set(snapshot(root)) == {
        MANIFEST,
        "calibrate-options.json",
        *START,
        *(f"reconstruct-state/unit-{unit}.pt" for unit in range(5)),
    }
    resumed = cli("calibrate", "-w", root, *QDIFF)
    assert resumed.code == 0
    assert_holds(resumed.err, "unit 5")
    assert content(root / CALIBRATED) == content(tmp_path / "whole" / CALIBRATED)
    assert set(snapshot(root)) == {MANIFEST, CALIBRATED, "trajectories.safetensors"}


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """One entry for each time that trajectories are recorded; what is in them differs in last bits
    from one time to the next.
    """
    record, made = trajectories_module.record_trajectories, list[float]()

    def elsewhere(*arguments: Any, **options: Any) -> Any:
        recorded = record(*arguments, **options)
        made.append(1 + 1e-6 * len(made))
        return dataclasses.replace(
            recorded, sample=recorded.sample * made[-1], output=recorded.output * made[-1]
        )

    monkeypatch.setattr(trajectories_module, "record_trajectories", elsewhere)
    return made


def test_a_reconstruction_resumes_where_its_start_would_come_out_with_other_last_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recordings: list[float]
) -> None:
    assert cli("calibrate", "-w", tmp_path / "whole", *QDIFF).code == 0
    recordings.clear()
    root = tmp_path / "interrupted"
    assert calibrate_until(5, root, monkeypatch).code == 130
    resumed = cli("calibrate", "-w", root, *QDIFF)
    assert_holds(resumed.err, "unit 5")
    assert "warning" not in resumed.err
    assert len(recordings) == 1
    for file in (CALIBRATED, "trajectories.safetensors"):
        assert content(root / file) == content(tmp_path / "whole" / file)


def test_a_reconstruction_with_other_options_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recordings: list[float]
) -> None:
    other = (*QDIFF, "--seed", "1")
    assert cli("calibrate", "-w", tmp_path / "whole", *other).code == 0
    root = tmp_path / "interrupted"
    assert calibrate_until(2, root, monkeypatch).code == 130
    recordings.clear()
    anew = cli("calibrate", "-w", root, *other)
    assert anew.code == 0
    assert_holds(anew.err, "warning", root / "reconstruct-state" / "made-from.json")
    assert not re.search(r"unit \d+ of", anew.err)
    assert len(recordings) == 1
    assert content(root / CALIBRATED) == content(tmp_path / "whole" / CALIBRATED)
    assert set(snapshot(root)) == {MANIFEST, CALIBRATED, "trajectories.safetensors"}


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (flip_byte, START[0]),
        (truncate, START[2]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((flip_byte, START[1]), (flip_byte, START[2]), (Path.unlink, START[0]))
        ),
    ],
)
def test_a_damaged_start_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], Any], file: str
) -> None:
    assert cli("calibrate", "-w", tmp_path / "whole", *QDIFF).code == 0
    root = tmp_path / "interrupted"
    assert calibrate_until(2, root, monkeypatch).code == 130
    damage(root / file)
    anew = cli("calibrate", "-w", root, *QDIFF)
    assert_holds(anew.err, "warning", "trajectories")
    assert_holds(anew.err, "unit 2")  # made where the first start was, it is the same to the bit
    assert content(root / CALIBRATED) == content(tmp_path / "whole" / CALIBRATED)


def test_an_interrupted_reconstruction_keeps_the_old_calibration_and_another_one_drops_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("calibrate", "-w", tmp_path, *CALIBRATE).code == 0
    before = snapshot(tmp_path)
    assert calibrate_until(1, tmp_path, monkeypatch).code == 130
    assert before.items() < snapshot(tmp_path).items()
    assert Workspace.open(tmp_path).require("calibrate")
    assert cli("calibrate", "-w", tmp_path, *CALIBRATE).code == 0
    assert snapshot(tmp_path).keys() == before.keys()
