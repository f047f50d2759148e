"""Bad input: one message that says what to do, exit code 2 (1 where the work failed), and an
untouched workspace.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from safetensors.numpy import load_file, save_file

from exporters.exactness import Exactness
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import MANIFEST, Workspace
from quest_deploy.backends import exactness
from quest_deploy.backends.registry import BACKENDS
from quest_deploy.calibration import trajectories
from quest_deploy.evaluation import quality
from quest_deploy.files import read_json, write_json
from tests.helpers import assert_holds, reseal
from tests.quest_deploy.support import Chain, cli, flip_byte, snapshot, truncate

BACKEND_COMMANDS = ("build-engine", "verify", "benchmark", "generate", "evaluate")


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A workspace in which nothing has run."""
    return Workspace.create(tmp_path / "fresh", "emoji", Scheme.parse("w4a4", buckets=3)).root


@pytest.mark.parametrize("command", ["calibrate", "export", "run"])
@pytest.mark.parametrize(
    ("option", "value", "facts"),
    [
        ("--model", "sd99", "'sd99' emoji"),
        ("--bits", "w3a3", "'w3a3' w4a4 w4a8 w8a8"),
        ("--buckets", "0", "buckets 1 1000 0"),
        ("--buckets", "1001", "buckets 1 1000 1001"),
        ("--buckets", "-5", "buckets 1 1000 -5"),
    ],
)
def test_an_unknown_choice_is_refused_before_a_workspace_is_made(
    tmp_path: Path, command: str, option: str, value: str, facts: str
) -> None:
    cli(command, "-w", tmp_path / "ws", option, value).assert_refused(*facts.split())
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize("command", BACKEND_COMMANDS)
def test_an_unknown_backend_is_refused_with_the_known_ones(fresh: Path, command: str) -> None:
    cli(command, "-w", fresh, "--backend", "tflite").assert_refused("'tflite'", *BACKENDS)


@pytest.mark.parametrize("option", ["--backend", "--build-only"])
def test_run_refuses_an_unknown_backend_before_it_starts(tmp_path: Path, option: str) -> None:
    cli("run", "-w", tmp_path / "ws", option, "tflite").assert_refused("'tflite'", *BACKENDS)
    assert not (tmp_path / "ws").exists()


def test_run_refuses_a_backend_that_cannot_run_here_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_count", lambda: 0)
    ended = cli("run", "-w", tmp_path / "ws", "--backend", "tensorrt-rtx")
    ended.assert_refused("tensorrt-rtx", "GPU")
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize("command", [*BACKEND_COMMANDS, "sensitivity", "finetune", "reference"])
def test_a_command_without_a_workspace_names_the_first_one(tmp_path: Path, command: str) -> None:
    ended = cli(command, "-w", tmp_path / "none")
    ended.assert_refused(f"quest-deploy calibrate -w {tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("sensitivity", "calibrate"),
        ("finetune", "calibrate"),
        ("reference", "calibrate"),
        ("build-engine", "export"),
        ("verify", "build-engine --backend openvino"),
        ("benchmark", "export"),
        ("generate", "build-engine --backend openvino"),
        ("evaluate", "calibrate"),
    ],
)
def test_a_missing_stage_is_named_with_its_command(fresh: Path, command: str, missing: str) -> None:
    before = snapshot(fresh)
    cli(command, "-w", fresh).assert_refused(f"quest-deploy {missing} -w {fresh}")
    assert snapshot(fresh) == before


def test_verify_without_a_reference_names_its_command(workspace: Path) -> None:
    reseal(workspace / MANIFEST, lambda manifest: manifest["stages"].pop("reference"))
    ended = cli("verify", "-w", workspace, "--backend", "onnxruntime")
    ended.assert_refused(f"quest-deploy reference -w {workspace}")


@pytest.mark.parametrize(
    "damage",
    [flip_byte, truncate, lambda path: path.unlink()],
    ids=["edited", "truncated", "removed"],
)
@pytest.mark.parametrize(
    ("path", "reader", "maker"),
    [
        ("calibrated.safetensors", "finetune", "calibrate"),
        ("trajectories.safetensors", "finetune", "calibrate"),
        ("trajectories.safetensors", "sensitivity", "calibrate"),
        ("checkpoint.safetensors", "export", "finetune"),
        ("checkpoint.safetensors", "reference", "finetune"),
        ("unet.onnx", "build-engine", "export"),
        ("unet.onnx.data", "build-engine", "export"),
        ("engines/openvino/lowered.onnx.data", "verify", "build-engine --backend openvino"),
        ("engines/openvino/engine.json", "generate", "build-engine --backend openvino"),
        ("reference/tables.safetensors", "verify", "reference"),
    ],
)
def test_a_damaged_file_is_named_with_the_command_that_makes_it_again(
    workspace: Path, path: str, reader: str, maker: str, damage: Callable[[Path], Any]
) -> None:
    damage(workspace / path)
    before = snapshot(workspace)
    ended = cli(reader, "-w", workspace)
    ended.assert_refused(workspace / path, f"quest-deploy {maker} -w {workspace}")
    assert snapshot(workspace) == before


def test_inspect_says_what_is_damaged_in_a_workspace(workspace: Path) -> None:
    truncate(workspace / "unet.onnx.data")
    stages = cli("inspect", workspace, "--json").json["stages"]
    assert stages["finetune"]["state"] == "up to date"
    for stage in ("export", "build-engine/openvino"):
        assert stages[stage]["state"] == "outdated"
        assert_holds(stages[stage]["reason"], "unet.onnx.data", "quest-deploy export")


def test_export_makes_no_workspace_where_a_given_one_is_not_there(tmp_path: Path) -> None:
    cli("export", "-w", tmp_path / "typo").assert_refused(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    "name", ["checkpoint.safetensors", "unet.onnx", "manifest.json", "engines/openvino/engine.json"]
)
def test_inspecting_a_truncated_file_is_one_message(workspace: Path, name: str) -> None:
    truncate(workspace / name)
    path = workspace / name
    cli("inspect", path.parent if path.suffix == ".json" else path).assert_refused(path)


def test_inspecting_an_edited_manifest_says_how_to_go_on(workspace: Path) -> None:
    manifest = read_json(workspace / MANIFEST)
    manifest["stages"]["calibrate"]["inputs"] = {"finetune": "0"}
    write_json(workspace / MANIFEST, manifest)
    cli("inspect", workspace).assert_refused(workspace / MANIFEST, "-w")


def test_inspecting_an_engine_of_another_kind_is_one_message(workspace: Path) -> None:
    content = read_json(workspace / "engines/openvino/engine.json")
    write_json(
        workspace / "engines/openvino/engine.json",
        {"format": content["format"], "version": content["version"]},
    )
    cli("inspect", workspace / "engines/openvino").assert_refused("build-engine")


@pytest.mark.parametrize("name", ["missing.onnx", "notes.txt", "folder"])
def test_inspecting_something_else_is_one_message(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "folder").mkdir()
    cli("inspect", tmp_path / name).assert_refused(tmp_path / name)


def test_a_workspace_of_another_version_is_refused(workspace: Path) -> None:
    write_json(workspace / MANIFEST, read_json(workspace / MANIFEST) | {"version": 2})
    for command in ("calibrate", "export", "verify", "inspect"):
        ended = cli(command, *([workspace] if command == "inspect" else ["-w", workspace]))
        ended.assert_refused(workspace / MANIFEST, 1, 2)


@pytest.mark.parametrize("command", ["calibrate", "export", "run"])
def test_a_folder_that_holds_other_things_is_left_alone(tmp_path: Path, command: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    cli(command, "-w", tmp_path).assert_refused(tmp_path, "-w")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["calibrate", "--bits", "w8a8"], "bits w4a4 w8a8"),
        (["calibrate", "--buckets", "4"], "buckets 3 4"),
        (["export", "--granularity", "per_tensor"], "granularity folded_channel per_tensor"),
        (["verify", "--bits", "w4a8"], "bits w4a4 w4a8"),
    ],
)
def test_a_workspace_of_another_scheme_is_not_overwritten(
    fresh: Path, arguments: list[str], facts: str
) -> None:
    cli(*arguments, "-w", fresh).assert_refused(fresh, *facts.split())


@pytest.mark.parametrize("labels", ["12a", "", "-1", "1 2", "²", "٣"])
def test_labels_that_are_not_digits_are_refused(workspace: Path, labels: str) -> None:
    cli("generate", "-w", workspace, "--labels", labels).assert_refused("--labels", repr(labels))


def test_evaluate_refuses_an_engine_that_is_not_exact_here_before_it_draws(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(*_: object, **__: object) -> NoReturn:
        raise AssertionError("drawn")

    # Elsewhere: on the machine that built it, the engine's record has the answer.
    monkeypatch.setattr(exactness, "processor_name", lambda: "another processor")
    monkeypatch.setattr(exactness, "measured", lambda _: Exactness())
    monkeypatch.setattr(quality, "draw", draw)
    monkeypatch.setattr(trajectories, "record_trajectories", draw)
    ended = cli("evaluate", "-w", workspace, "--backend", "onnxruntime")
    ended.assert_refused("build-engine")


def test_evaluate_refuses_an_images_weight_of_a_model_that_edits_none_before_it_draws(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(*_: object, **__: object) -> NoReturn:
        raise AssertionError("drawn")

    monkeypatch.setattr(trajectories, "record_trajectories", draw)
    ended = cli("evaluate", "-w", workspace, "--backend", "onnxruntime", "--image-guidance", "2")
    ended.assert_refused("--image-guidance", "emoji")


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_an_unknown_scheduler_is_refused_with_the_known_ones(workspace: Path, command: str) -> None:
    ended = cli(command, "-w", workspace, "--scheduler", "heun")
    ended.assert_refused("--scheduler", "ddim", "ddpm")


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["calibrate", "--method", "entropy"], "--method"),
        (["build-engine", "--provider", "rocm"], "--provider"),
        (
            ["build-engine", "--backend", "tensorrt-rtx", "--compute-capability", "12"],
            "'12'",
        ),
        (
            ["build-engine", "--backend", "tensorrt-rtx", "--pool-limit", "tactic_dram:2G"],
            "--pool-limit workspace:SIZE 'tactic_dram:2G'",
        ),
        (
            ["build-engine", "--backend", "tensorrt-rtx", "--weight-streaming-budget", "half"],
            "--weight-streaming-budget 'half'",
        ),
        (
            [
                *("build-engine", "--backend", "tensorrt", "--tactic-sources", "none"),
                *("--tactic-sources", "x"),
            ],
            "--tactic-sources none",
        ),
        (
            ["build-engine", "--backend", "tensorrt-rtx", "--quantize", "plugin"],
            "--quantize tensorrt-rtx",
        ),
        (["build-engine", "--quantize", "native"], "--quantize openvino"),
    ],
)
def test_an_unknown_choice_of_a_stage_is_refused(
    workspace: Path, arguments: list[str], facts: str
) -> None:
    cli(*arguments, "-w", workspace).assert_refused(*facts.split())


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["finetune", "--precision", "fp8"], "--precision float32 bf16 'fp8'"),
        (["finetune", "--device", "tpu"], "--device cpu cuda 'tpu'"),
        (["finetune", "--stages", "temporal,last"], "--stages temporal sensitive 'last'"),
        (["generate", "--guidance", "-1"], "--guidance 0"),
        (["evaluate", "--guidance", "-1"], "--guidance 0"),
        (["calibrate", "--guidance", "-1"], "--guidance 0"),
        (["schedule", "--scheduler", "heun"], "--scheduler ddim 'heun'"),
        (["package", "--triton", "out", "--max-batch", "1"], "--max-batch 2"),
    ],
)
def test_an_option_out_of_range_is_refused_before_the_workspace_is_looked_at(
    tmp_path: Path, arguments: list[str], facts: str
) -> None:
    cli(*arguments, "-w", tmp_path / "none").assert_refused(*facts.split())


def test_a_schedule_without_a_workspace_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys, quest_deploy as qd\n"
        "try: qd.schedule('none')\n"
        "except qd.InputError: print('torch' in sys.modules)"
    )
    line = [sys.executable, "-c", script]
    ended = subprocess.run(line, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert ended.stdout.strip() == "False"


def test_an_engine_that_replaces_one_of_other_options_says_so(workspace: Path) -> None:
    build = ("build-engine", "-w", workspace, "--backend", "onnxruntime", "--provider", "cuda")
    first, again = cli(*build), cli(*build)
    assert (first.code, again.code) == (0, 0), first.err
    assert "--provider cpu" in first.err
    assert "--provider" not in again.err


def test_tensorrt_without_its_sdk_says_what_to_install(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    ended = cli("build-engine", "-w", workspace, "--backend", "tensorrt")
    ended.assert_refused("pip install 'quest-deploy[gpu]'")


def test_an_engine_that_cannot_run_here_is_refused_by_every_command_that_runs_it(
    mini_chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_count", lambda: 0)
    for command in ("verify", "benchmark", "generate", "evaluate"):
        ended = cli(command, "-w", mini_chain.root, "--backend", "tensorrt-rtx")
        ended.assert_refused("tensorrt-rtx", "GPU")


def test_an_engine_of_a_graph_that_is_older_than_the_checkpoint_is_refused(workspace: Path) -> None:
    # As if `export` had run before `finetune`: its graph holds another checkpoint than the one that
    # is to be deployed.
    reseal(workspace / MANIFEST, lambda m: m["stages"]["export"]["inputs"].pop("finetune"))
    for command in ("build-engine", "generate"):
        ended = cli(command, "-w", workspace, "--backend", "onnxruntime")
        ended.assert_refused(f"quest-deploy export -w {workspace}")


def test_a_failing_verification_ends_with_exit_code_1_and_one_json_report(workspace: Path) -> None:
    path = next((workspace / "reference").glob("buckets-*"))
    tensors = load_file(path)
    tensors["layer.conv_out.y"] *= 1.01
    save_file(tensors, path)
    opened = Workspace.open(workspace)
    record = opened.stages["reference"]
    files = [workspace / name for name in record.files]
    opened.record(
        "reference",
        inputs=record.inputs,
        options=record.options,
        files=files,
        details=record.details,
    )
    ended = cli("verify", "-w", workspace, "--backend", "onnxruntime", "--json")
    ended.assert_refused("onnxruntime", "layer conv_out", code=1)
    assert read_json(workspace / "reports/verify-onnxruntime.json")["passed"] is False
    assert ended.json["passed"] is False


def test_errors_are_one_json_value_too(fresh: Path) -> None:
    ended = cli("verify", "-w", fresh, "--json")
    assert ended.json == {"error": ended.message, "exit_code": 2}


@pytest.mark.parametrize("buckets", ["1", "21"])
def test_any_number_of_buckets_is_calibrated(
    mini_emoji: None, tmp_path: Path, buckets: str
) -> None:
    ended = cli(
        "calibrate", "-w", tmp_path / "ws", "--buckets", buckets, "--samples", "1", "--json"
    )
    assert (ended.code, ended.json["buckets"]) == (0, int(buckets))
