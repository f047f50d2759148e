"""`run` and `export` without a checkpoint: what is skipped, what is made again, what is
recorded.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import onnx_ir as ir
import pytest
from onnx_ir.passes import PostconditionError, PreconditionError

from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.backends.onnxruntime import OnnxRuntimeBackend
from quest_deploy.backends.openvino.backend import OpenVinoBackend
from quest_deploy.backends.options import EngineOptions
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.stages import api, export, finetune
from quest_deploy.stages import run as pipeline
from quest_deploy.stages.options import (
    BenchmarkOptions,
    CalibrateOptions,
    EvaluateOptions,
    FinetuneOptions,
    GenerateOptions,
    StageOptions,
)
from tests.helpers import assert_holds
from tests.quest_deploy.support import Outcome, change, cli, fail_verification, snapshot

pytestmark = pytest.mark.usefixtures("mini_emoji")
STAGES = (
    "calibrate",
    "finetune",
    "export",
    "reference",
    "build-engine",
    "verify",
    "benchmark",
    "generate",
    "evaluate",
    "report",
)
NO_STAGES = ("workspace", "left_out", "failed")
"""The keys of `run --json` that are no stage's."""

CALIBRATED = ("--samples", 8, "--steps", 4, "--method", "minmax", "--buckets", 2)
TRAINED = (
    *("--layers", "conv_out,conv_in", "--temporal-steps", 1),
    *("--sensitive-steps", 1, "--batch", 2),
)
"""Options of calibration and finetuning, none of them a default."""

SMALL: dict[str, StageOptions] = {
    "calibrate": CalibrateOptions(samples=8),
    "finetune": FinetuneOptions(temporal_steps=2, sensitive_steps=3, batch=4),
    "benchmark": BenchmarkOptions(batch=(2,), runs=2, warmup=1),
    "generate": GenerateOptions(prompt=("cat",), steps=3),
    "evaluate": EvaluateOptions(images=4, steps=3),
}
"""The chain's few samples and steps."""


@pytest.fixture
def run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`run` on onnxruntime with ``SMALL`` for options."""
    everything = pipeline.run
    monkeypatch.setattr(
        pipeline,
        "run",
        lambda opened, backends, options, *others: everything(opened, backends, SMALL, *others),
    )

    def command(*options: str, backends: Iterable[str] = ("onnxruntime",)) -> Outcome:
        return cli(
            "run",
            "-w",
            workspace,
            *(part for name in backends for part in ("--backend", name)),
            *options,
        )

    return command


def test_run_goes_on_from_what_is_finished_and_a_second_run_changes_no_file(
    run: Callable[..., Any], workspace: Path
) -> None:
    first = run("--json")
    assert first.code == 0, first.err
    up_to_date = [line for line in first.err.splitlines() if line.endswith(": up to date")]
    assert len(up_to_date) == len(STAGES) - 2
    assert "generate/onnxruntime: done" in first.err
    assert "report: done" in first.err
    assert [name.split()[0] for name in first.json if name not in NO_STAGES] == list(STAGES)
    assert (first.json["left_out"], first.json["failed"]) == ({}, {})

    before = snapshot(workspace)
    second = run()
    assert second.code == 0
    assert sum(line.endswith(": up to date") for line in second.err.splitlines()) == len(STAGES)
    assert snapshot(workspace) == before
    assert "onnxruntime: verification PASSED" in second.out.split("== summary")[1]
    assert "Frechet distance (lower is better): FP32" in second.out
    assert second.out.endswith(f"report: {workspace / 'reports' / 'report.html'}\n")


def test_run_makes_again_what_was_damaged_and_what_depends_on_it(
    run: Callable[..., Any], workspace: Path
) -> None:
    assert run().code == 0
    (workspace / "engines" / "onnxruntime" / "lowered.onnx").unlink()
    ended = run()
    assert ended.code == 0
    assert "build-engine/onnxruntime: done" in ended.err
    assert "export: up to date" in ended.err


def test_run_builds_engines_with_records_of_another_version_again(
    run: Callable[..., Any], workspace: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quest_deploy.stages.options.VERSION", 1)
        assert run().code == 0
    ended = run()
    assert ended.code == 0
    assert "build-engine/onnxruntime: done" in ended.err
    assert "export: up to date" in ended.err


def test_run_keeps_the_options_that_calibration_and_finetuning_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> NoReturn:
        raise InputError("far enough")

    monkeypatch.setattr(export, "work", stop)
    root = tmp_path / "w"
    assert cli("calibrate", "-w", root, *CALIBRATED).code == 0
    assert cli("finetune", "-w", root, *TRAINED).code == 0
    before = snapshot(root)
    ended = cli("run", "-w", root)
    assert ended.message.endswith("far enough")
    assert [line for line in ended.err.splitlines() if "up to date" in line] == [
        "calibrate: up to date",
        "finetune: up to date",
    ]
    assert snapshot(root) == before

    assert cli("run", "-w", root, "--method", "mse", "--seed", 1).message.endswith("far enough")
    stages = Workspace.open(root).stages
    given = {
        name: value for name, value in stages["calibrate"].options.items() if value is not None
    }
    assert given == {"samples": 8, "steps": 4, "method": "mse", "seed": 1, "reconstruction": {}}
    assert stages["finetune"].options["sensitive_layers"] == ["conv_out", "conv_in"]
    assert stages["finetune"].options["seed"] == 1


def test_run_goes_on_with_the_options_of_what_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    root = tmp_path / "w"
    with monkeypatch.context() as patch:
        patch.setattr("quest_deploy.calibration.trajectories.record_trajectories", interrupt)
        assert cli("calibrate", "-w", root, *CALIBRATED).code == 130
    with monkeypatch.context() as patch:
        patch.setattr("quest_deploy.finetuning.train.finetune", interrupt)
        assert cli("run", "-w", root).code == 130
        calibrated = Workspace.open(root).stages["calibrate"].options
        assert [calibrated[key] for key in ("samples", "steps", "method")] == [8, 4, "minmax"]
        assert cli("finetune", "-w", root, *TRAINED).code == 130
        kept = Workspace.open(root).options_of("finetune")
    started: list[FinetuneOptions] = []
    monkeypatch.setattr(
        finetune, "work", lambda w, options, progress: started.append(options) or interrupt()
    )
    assert cli("run", "-w", root).code == 130
    assert kept["sensitive_layers"] == ["conv_out", "conv_in"]
    assert [options.to_json() for options in started] == [
        kept | {"sensitive_layers": ("conv_out", "conv_in")}
    ]


def test_run_refuses_an_unknown_method_before_it_makes_a_workspace(tmp_path: Path) -> None:
    ended = cli("run", "-w", tmp_path / "w", "--method", "median")
    ended.assert_refused("--method")
    assert not (tmp_path / "w").exists()


def test_run_goes_on_with_the_other_backends_where_one_fails_its_verification(
    run: Callable[..., Any], workspace: Path
) -> None:
    fail_verification(workspace, "openvino")
    first = run("--json", backends=("openvino", "onnxruntime"))
    first.assert_refused("openvino", "layer conv_in: wrong", code=1)
    assert list(first.json["failed"]) == ["openvino"]
    assert "layer conv_in: wrong" in first.json["failed"]["openvino"]
    after = [
        name
        for name in first.json
        if name.split()[0] in ("verify", "benchmark", "generate", "evaluate")
    ]
    assert after == [
        "verify openvino",
        *(f"{stage} onnxruntime" for stage in ("verify", "benchmark", "generate", "evaluate")),
    ]

    before = snapshot(workspace)
    second = run(backends=("openvino", "onnxruntime"))
    assert second.code == 1
    assert snapshot(workspace) == before
    summary = second.out.split("== summary")[1]
    assert "openvino: verification FAILED: " in summary
    assert "layer conv_in: wrong" in summary
    assert "layer conv_out" not in summary
    assert "onnxruntime: verification PASSED" in summary
    assert "onnxruntime-0.png" in summary


def test_run_where_no_engine_passes_names_what_it_leaves_out(
    run: Callable[..., Any], workspace: Path
) -> None:
    fail_verification(workspace, "onnxruntime")
    ended = run()
    ended.assert_refused("layer conv_in: wrong", code=1)
    assert_holds(ended.out.split("== summary")[1], "pictures", "evaluation", "left out")
    assert not (workspace / "images" / "onnxruntime-0.png").exists()


def test_run_verifies_an_engine_whose_weights_were_changed_and_says_that_it_fails(
    run: Callable[..., Any], workspace: Path
) -> None:
    lower = OnnxRuntimeBackend.lower

    def wrong(
        backend: OnnxRuntimeBackend, model: ir.Model, options: EngineOptions, **further: Any
    ) -> ir.Model:
        lowered = lower(backend, model, options, **further)
        change(lowered, "conv_in.bias", 0, by=1.0)
        return lowered

    opened = Workspace.open(workspace)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxRuntimeBackend, "lower", wrong)
        assert cli("build-engine", "-w", opened.root, "--backend", "onnxruntime").code == 0
    ended = run("--json")
    assert ended.code == 1
    assert list(ended.json["failed"]) == ["onnxruntime"]
    assert "benchmark onnxruntime" not in ended.json


@pytest.mark.parametrize("option", ["--backend", "--build-only"])
def test_run_goes_on_past_a_backend_that_cannot_build_and_draws_with_the_others(
    run: Callable[..., Any], workspace: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise QuestDeployError("the runtime refuses this graph")

    assert run().code == 0
    monkeypatch.setattr(OpenVinoBackend, "compile", refuse)
    shutil.rmtree(workspace / "engines" / "openvino", ignore_errors=True)
    ended = run(option, "openvino", "--json")
    assert ended.code == 1
    assert "the runtime refuses this graph" in ended.json["failed"]["openvino"]
    assert not [name for name in ended.json if name.endswith(" openvino")]
    assert {"verify onnxruntime", "evaluate onnxruntime"} <= ended.json.keys()
    summary = run(option, "openvino").out.split("== summary")[1]
    assert "openvino: FAILED" in summary
    assert "onnxruntime: verification PASSED" in summary
    assert "onnxruntime-0.png" in summary
    assert "no engine passed" not in summary


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine for which there is no openvino."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *further: None if name == "openvino" else find(name, *further),
    )


@pytest.mark.usefixtures("without_openvino")
def test_run_if_available_leaves_out_by_name_what_the_machine_lacks(
    run: Callable[..., Any],
) -> None:
    ended = run(
        "--build-only", "openvino", "--if-available", "--json", backends=("openvino", "onnxruntime")
    )
    assert ended.code == 0, ended.err
    assert list(ended.json["left_out"]) == ["openvino"]
    assert not [name for name in ended.json if name.endswith(" openvino")]
    assert "evaluate onnxruntime" in ended.json
    assert (
        "openvino: left out"
        in run("--if-available", backends=("openvino", "onnxruntime")).out.split("== summary")[1]
    )


@pytest.mark.usefixtures("without_openvino")
@pytest.mark.parametrize("option", ["--backend", "--build-only"])
def test_run_refuses_a_backend_that_the_machine_lacks_before_it_makes_a_workspace(
    tmp_path: Path, option: str
) -> None:
    ended = cli("run", "-w", tmp_path / "w", "--backend", "onnxruntime", option, "openvino")
    assert (ended.code, "openvino" in ended.message) == (2, True)
    assert not (tmp_path / "w").exists()


@pytest.mark.usefixtures("without_openvino")
@pytest.mark.parametrize("backend", ["openvino", "no-such-backend"])
def test_run_if_available_refuses_an_unknown_backend_and_a_machine_that_lacks_all(
    tmp_path: Path, backend: str
) -> None:
    ended = cli("run", "-w", tmp_path / "w", "--backend", backend, "--if-available")
    assert (ended.code, backend in ended.message) == (2, True)
    assert not (tmp_path / "w").exists()


@pytest.fixture
def small_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run `export` in a new workspace, which calibrates the model first."""
    monkeypatch.setattr(api, "CalibrateOptions", lambda: CalibrateOptions(samples=1))
    return lambda *options: cli(
        "export", "-w", tmp_path / "ws", "--buckets", "1", "--bits", "w8a8", *options
    )


def test_export_without_a_checkpoint_calibrates_one_warns_and_records_it(
    small_export: Callable[..., Outcome], tmp_path: Path
) -> None:
    ended = small_export("--json")
    assert ended.code == 0
    assert_holds(ended.err, "warning", "PTQ")
    assert (ended.json["method"], ended.json["buckets"], ended.json["float_sites"]) == (
        "ptq",
        1,
        {},
    )
    stages = Workspace.open(tmp_path / "ws").stages
    assert list(stages) == ["calibrate", "export"]
    assert stages["export"].inputs == {"calibrate": stages["calibrate"].digest}


def test_export_and_inspect_say_what_computes_in_float_and_why(
    small_export: Callable[..., Outcome], tmp_path: Path
) -> None:
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
    def refuse(*_: object, **__: object) -> NoReturn:
        raise PreconditionError("site x: its convolutions pad differently")

    monkeypatch.setattr("exporters.torch_to_qdq.portable_graph", refuse)
    ended = small_export()
    ended.assert_refused("calibrated.safetensors", "its convolutions pad differently", code=1)


def test_a_checkpoint_that_a_pass_finds_damaged_is_bad_input(
    small_export: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise PostconditionError("a pass") from InputError("it was changed")

    monkeypatch.setattr("exporters.torch_to_qdq.portable_graph", refuse)
    small_export().assert_refused("it was changed", code=2)
