from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.errors import InputError
from quest_deploy.files import sha256_of
from quest_deploy.importers import trajectories
from tests.helpers import assert_holds
from tests.quest_deploy.importers.cases import CHURCHES, UNCONDITIONAL, Case
from tests.quest_deploy.support import cli

SMALLEST = {
    **UNCONDITIONAL,
    "num_res_blocks": 1,
    "channel_mult": [1],
    "attention_resolutions": [1],
    "image_size": 4,
}
SMALLEST_CHURCHES = {
    **CHURCHES,
    "channel_mult": [1, 2],
    "attention_resolutions": [1],
    "image_size": 4,
}
SETTINGS = [
    *("--weight-bits", 4, "--activation-bits", 4, "--first-last-bits", 8, "--softmax-bits", 8),
    "--asymmetric",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    torch.save(Case(SMALLEST, per_channel=True).state, folder / "ckpt.pth")
    (folder / "unet.json").write_text(json.dumps(SMALLEST))
    return folder


def _import(files: Path, *more: object) -> list[object]:
    source = ["import", files / "ckpt.pth", "--from", "quest", "--unet", files / "unet.json"]
    return [*source, "--timesteps", "900,500,101", *SETTINGS, *more]


@pytest.mark.parametrize(
    "options", [(), pytest.param(("--recalibrate", "--samples", 4), marks=pytest.mark.slow)]
)
def test_an_imported_checkpoint_exports_builds_and_verifies_like_our_own(
    files: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    workspace = tmp_path / "w"
    result = cli(*_import(files, "-w", workspace, "--json", *options))
    assert result.code == 0, result.err
    assert bool(result.json["in_float"]) == (not options)
    for command in (
        ["export"],
        ["reference"],
        ["build-engine", "--backend", "onnxruntime"],
        ["verify", "--backend", "onnxruntime"],
    ):
        outcome = cli(*command, "-w", workspace)
        assert outcome.code == 0, outcome.err
        assert "PTQ" not in outcome.err
    assert "PASSED" in outcome.out


@pytest.mark.slow
def test_a_unet_that_resamples_in_its_resblocks_verifies_on_every_engine(tmp_path: Path) -> None:
    torch.save(Case(SMALLEST_CHURCHES, split=True).state, tmp_path / "ckpt.pth")
    (tmp_path / "unet.json").write_text(json.dumps(SMALLEST_CHURCHES))
    workspace = tmp_path / "w"
    commands = [
        _import(tmp_path, "-w", workspace),
        ["export", "-w", workspace],
        ["reference", "-w", workspace],
    ]
    for backend in ("onnxruntime", "openvino"):
        commands += [
            [command, "-w", workspace, "--backend", backend]
            for command in ("build-engine", "verify")
        ]
    for command in commands:
        outcome = cli(*command)
        assert outcome.code == 0, outcome.err
    assert "PASSED" in outcome.out


def test_it_prints_what_computes_in_float_and_why(files: Path, tmp_path: Path) -> None:
    outcome = cli(*_import(files, "-w", tmp_path / "w"))
    assert_holds(outcome.out, "--recalibrate", "float", "axis")


def test_the_workspace_records_which_files_it_came_of(files: Path, tmp_path: Path) -> None:
    assert cli(*_import(files, "-w", tmp_path / "w")).code == 0
    options = Workspace.open(tmp_path / "w").stages["import"].options
    assert options["checkpoint_sha256"] == sha256_of(files / "ckpt.pth")
    assert options["unet_sha256"] == sha256_of(files / "unet.json")


@pytest.mark.parametrize(("given", "predicted"), [(7, 3), (3, 6), (9, 4)])
def test_channels_that_differ_are_refused_by_both_numbers_and_leave_no_workspace(
    tmp_path: Path, given: int, predicted: int
) -> None:
    params = {**SMALLEST, "in_channels": given, "out_channels": predicted}
    torch.save(Case(params, per_channel=True).state, tmp_path / "ckpt.pth")
    (tmp_path / "unet.json").write_text(json.dumps(params))
    ended = cli(*_import(tmp_path, "-w", tmp_path / "ws"))
    ended.assert_refused(f"in_channels {given}", f"out_channels {predicted}")
    assert not (tmp_path / "ws").exists()


def test_a_checkpoint_that_does_not_fit_leaves_no_workspace(files: Path, tmp_path: Path) -> None:
    arguments = _import(files, "-w", tmp_path / "w")
    arguments[arguments.index("900,500,101")] = "900,500"
    outcome = cli(*arguments)
    outcome.assert_refused(files / "ckpt.pth", "act_quantizer.delta_list", [2, 32])
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("recalibrate", [False, True])
def test_unusable_weights_are_found_before_anything_is_recorded(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recalibrate: bool
) -> None:
    state = torch.load(files / "ckpt.pth", weights_only=True)
    state["model.out.2.weight_quantizer.zero_point"] += 1e6
    torch.save(state, tmp_path / "ckpt.pth")
    (tmp_path / "unet.json").write_text(json.dumps(SMALLEST))
    monkeypatch.setattr(
        trajectories, "record_imported", lambda *args, **kw: pytest.fail("recorded")
    )
    outcome = cli(*_import(tmp_path, "-w", tmp_path / "w", *["--recalibrate"] * recalibrate))
    outcome.assert_refused(tmp_path / "ckpt.pth", "layer conv_out", "zero-points")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("timesteps", "seed", "facts"),
    [
        ("1050,500,101", 0, "timesteps 999 0"),
        ("1000,500,101", 0, "timesteps 999 0"),
        ("900,500,-5", 0, "timesteps"),
        ("900,500,101", 2**70, "--seed"),
    ],
)
def test_timesteps_and_seeds_that_cannot_be_leave_no_workspace(
    files: Path, tmp_path: Path, timesteps: str, seed: int, facts: str
) -> None:
    arguments = _import(files, "-w", tmp_path / "w", "--seed", seed)
    arguments[arguments.index("900,500,101")] = timesteps
    cli(*arguments).assert_refused(*facts.split())
    assert not (tmp_path / "w").exists()


def test_a_failure_while_recording_leaves_no_workspace(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kw: object) -> None:
        raise InputError("no")

    monkeypatch.setattr(trajectories, "record_imported", fail)
    assert cli(*_import(files, "-w", tmp_path / "w")).code == 2
    assert not (tmp_path / "w").exists()


def test_what_the_file_does_not_say_must_be_given(files: Path, tmp_path: Path) -> None:
    arguments = [x for x in _import(files, "-w", tmp_path / "w") if x != "--asymmetric"]
    cli(*arguments).assert_refused("--symmetric")
    arguments[arguments.index("900,500,101")] = "900;500"
    cli(*arguments).assert_refused("--timesteps", "'900;500'")


def test_commands_that_need_the_rest_of_the_model_say_so(files: Path, tmp_path: Path) -> None:
    assert cli(*_import(files, "-w", tmp_path / "w")).code == 0
    for command in ("calibrate", "finetune", "sensitivity"):
        cli(command, "-w", tmp_path / "w").assert_refused("imported")
    save_file({"up.weight": torch.ones(1)}, tmp_path / "style.safetensors")
    given = ("--lora", tmp_path / "style.safetensors")
    cli("lora", "-w", tmp_path / "w", *given).assert_refused("imported")


def test_another_scheme_does_not_go_into_the_same_workspace(files: Path, tmp_path: Path) -> None:
    assert cli(*_import(files, "-w", tmp_path / "w")).code == 0
    assert cli(*_import(files, "-w", tmp_path / "w")).code == 0
    outcome = cli(*_import(files, "-w", tmp_path / "w", "--recalibrate"))
    outcome.assert_refused(tmp_path / "w", "-w")


@pytest.mark.parametrize("missing", ["ckpt.pth", "unet.json"])
def test_a_file_that_is_missing_is_named_first(files: Path, tmp_path: Path, missing: str) -> None:
    for name in {"ckpt.pth", "unet.json"} - {missing}:
        (tmp_path / name).write_bytes((files / name).read_bytes())
    ended = cli(
        *("import", tmp_path / "ckpt.pth", "--from", "quest"),
        *("--unet", tmp_path / "unet.json", "-w", tmp_path / "w"),
    )
    ended.assert_refused(tmp_path / missing)
