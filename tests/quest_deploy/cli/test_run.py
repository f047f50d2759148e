"""`run` and `export` without a checkpoint: what is skipped, what is made again, what is recorded."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from onnx_ir.passes import PreconditionError

from quest_deploy.cli import benchmark, calibrate, evaluate, export, finetune, generate
from quest_deploy.errors import InputError
from quest_deploy.workspace import Workspace
from tests.quest_deploy.support import Outcome, cli, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("mini_tiny")
STAGES = ("calibrate", "finetune", "export", "reference", "build-engine", "verify", "benchmark", "generate", "evaluate")


@pytest.fixture
def run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`run` on onnxruntime with the chain's few samples and steps."""
    stages = {
        calibrate: partial(calibrate.CalibrateOptions, samples=8),
        finetune: {"temporal_steps": 2, "sensitive_steps": 3, "batch": 4},
    }
    monkeypatch.setattr(calibrate, "CalibrateOptions", stages[calibrate])
    tune = finetune.finetune_stage
    monkeypatch.setattr(finetune, "finetune_stage", lambda w, console, choices, reuse: tune(w, console, stages[finetune], reuse=reuse))
    timed = partial(benchmark.benchmark_stage, batches=(2,), runs=2, warmup=1)
    monkeypatch.setattr(benchmark, "benchmark_stage", timed)
    pictures = {"labels": "0123", "rows": 1, "steps": 3}
    monkeypatch.setattr(generate, "generate_stage", partial(generate.generate_stage, choices=pictures))
    judged = partial(evaluate.evaluate_stage, choices={"images": 20, "steps": 3})
    monkeypatch.setattr(evaluate, "evaluate_stage", judged)
    return lambda *options: cli("run", "-w", workspace, "--backend", "onnxruntime", *options)


def test_run_goes_on_from_what_is_finished_and_a_second_run_changes_no_file(run: Callable[..., Any], workspace: Path) -> None:
    first = run("--json")
    assert first.code == 0, first.err
    up_to_date = [line for line in first.err.splitlines() if line.endswith(": up to date")]
    assert len(up_to_date) == len(STAGES) - 1
    assert "generate/onnxruntime: done" in first.err
    assert [name.split()[0] for name in first.json if name != "workspace"] == list(STAGES)

    before = snapshot(workspace)
    second = run()
    assert second.code == 0
    assert sum(line.endswith(": up to date") for line in second.err.splitlines()) == len(STAGES)
    assert snapshot(workspace) == before
    assert "onnxruntime: verification PASSED" in second.out.split("== summary")[1]
    assert "Frechet distance (lower is better): FP32" in second.out


def test_run_makes_again_what_was_damaged_and_what_depends_on_it(run: Callable[..., Any], workspace: Path) -> None:
    assert run().code == 0
    (workspace / "engines" / "onnxruntime" / "lowered.onnx").unlink()
    ended = run()
    assert ended.code == 0
    assert "build-engine/onnxruntime: done" in ended.err
    assert "export: up to date" in ended.err


def test_run_keeps_the_options_that_calibration_and_finetuning_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> NoReturn:
        raise InputError("far enough")

    monkeypatch.setattr(export, "export_stage", stop)
    root = tmp_path / "w"
    small = ("--samples", 8, "--steps", 4)
    assert cli("calibrate", "-w", root, "--method", "minmax", *small, "--buckets", 2).code == 0
    chosen = ("--layers", "conv_out,conv_in", "--temporal-steps", 1, "--sensitive-steps", 1, "--batch", 2)
    assert cli("finetune", "-w", root, *chosen).code == 0
    before = snapshot(root)
    ended = cli("run", "-w", root)
    assert ended.message.endswith("far enough")
    assert [line for line in ended.err.splitlines() if "up to date" in line] == ["calibrate: up to date", "finetune: up to date"]
    assert snapshot(root) == before

    assert cli("run", "-w", root, "--method", "mse", "--seed", 1).message.endswith("far enough")
    stages = Workspace.open(root).stages
    given = {name: value for name, value in stages["calibrate"].options.items() if value is not None}
    assert given == {"samples": 8, "steps": 4, "method": "mse", "seed": 1, "reconstruction": {}}
    assert stages["finetune"].options["sensitive_layers"] == ["conv_out", "conv_in"]
    assert stages["finetune"].options["seed"] == 1


def test_run_goes_on_with_the_options_of_what_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    root = tmp_path / "w"
    with monkeypatch.context() as patch:
        patch.setattr("quest_deploy.trajectories.record_trajectories", interrupt)
        ended = cli("calibrate", "-w", root, "--samples", 8, "--steps", 4, "--method", "minmax", "--buckets", 2)
    assert ended.code == 130
    with monkeypatch.context() as patch:
        patch.setattr("quest_deploy.finetune.train.finetune", interrupt)
        assert cli("run", "-w", root).code == 130
        calibrated = Workspace.open(root).stages["calibrate"].options
        assert (calibrated["samples"], calibrated["steps"], calibrated["method"]) == (8, 4, "minmax")
        chosen = ("--layers", "conv_out,conv_in", "--temporal-steps", 1, "--sensitive-steps", 1, "--batch", 2)
        assert cli("finetune", "-w", root, *chosen).code == 130
        kept = Workspace.open(root).options_of("finetune")
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(finetune, "finetune_stage", lambda w, console, options, reuse: started.append(options) or interrupt())
    assert cli("run", "-w", root).code == 130
    assert kept["sensitive_layers"] == ["conv_out", "conv_in"]
    assert started == [kept | {"sensitive_layers": ("conv_out", "conv_in")}]


def test_run_refuses_an_unknown_method_before_it_makes_a_workspace(tmp_path: Path) -> None:
    ended = cli("run", "-w", tmp_path / "w", "--method", "median")
    assert (ended.code, "unknown calibration method 'median'" in ended.message) == (2, True)
    assert not (tmp_path / "w").exists()


def test_run_fails_where_the_verification_failed_before(run: Callable[..., Any], workspace: Path) -> None:
    opened = Workspace.open(workspace)
    record = opened.stages["verify/onnxruntime"]
    details = {**record.details, "passed": False, "problems": ["layer conv_in: wrong"]}
    files = [workspace / name for name in record.files]
    opened.record("verify/onnxruntime", inputs=record.inputs, options=record.options, files=files, details=details)
    ended = run()
    assert (ended.code, "layer conv_in: wrong" in ended.message) == (1, True)


@pytest.fixture
def small_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run `export` in a new workspace, which calibrates the model first."""
    monkeypatch.setattr("quest_deploy.cli.export.CalibrateOptions", partial(calibrate.CalibrateOptions, samples=1))
    return lambda *options: cli("export", "-w", tmp_path / "ws", "--buckets", "1", "--bits", "w8a8", *options)


def test_export_without_a_checkpoint_calibrates_one_warns_and_records_it(small_export: Callable[..., Outcome], tmp_path: Path) -> None:
    ended = small_export("--json")
    assert ended.code == 0
    assert "warning: no finetuned checkpoint in this workspace: exporting a calibrated one (PTQ)" in ended.err
    assert (ended.json["method"], ended.json["buckets"], ended.json["float_sites"]) == ("ptq", 1, {})
    stages = Workspace.open(tmp_path / "ws").stages
    assert list(stages) == ["calibrate", "export"]
    assert stages["export"].inputs == {"calibrate": stages["calibrate"].digest}


def test_export_and_inspect_say_what_computes_in_float_and_why(small_export: Callable[..., Outcome], tmp_path: Path) -> None:
    reason = "a scale for each channel lies on the axis that is summed over"
    ended = small_export("--granularity", "free_channel")
    details = Workspace.open(tmp_path / "ws").stages["export"].details
    assert set(details["float_sites"].values()) == {reason}
    count = details["sites"]
    said = f"{count} of {count} tensors and the layers that read them compute in float ({reason})"
    assert said in ended.out.splitlines()
    assert said in cli("inspect", tmp_path / "ws" / "calibrated.safetensors").out.splitlines()


def test_a_checkpoint_that_cannot_be_exported_is_one_message(
    small_export: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise PreconditionError("site x: its convolutions pad differently")

    monkeypatch.setattr("exporters.torch_to_qdq.portable_graph", refuse)
    ended = small_export()
    assert ended.code == 1
    assert "calibrated.safetensors cannot be exported: site x: its convolutions pad differently" in ended.message
