"""`calibrate --low-rank`: through every command, to engines that verify."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.workspace import MANIFEST, Workspace
from tests.helpers import assert_holds
from tests.quest_deploy.support import CHAIN, cli

pytestmark = pytest.mark.usefixtures("mini_emoji")
CALIBRATE = ("--bits", "w4a4", "--samples", "4", "--buckets", "3")
CONV, LINEAR = (
    "up_blocks.0.resnets.0.conv1",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
)
BRANCHES = ("--low-rank", "4", "--low-rank-layers", f"{CONV},*.ff.net.2")
VERIFIED = ("onnxruntime", "openvino")


@pytest.mark.slow
def test_a_model_with_branches_goes_through_every_command_and_its_engines_verify(
    tmp_path: Path,
) -> None:
    root = tmp_path / "ws"

    def run(command: str, *options: str) -> str:
        ended = cli(command, "-w", root, *options)
        assert ended.code == 0, ended.err
        return ended.out

    assert "2 layers with branches of rank 4" in run("calibrate", *CALIBRATE, *BRANCHES)
    assert f"{LINEAR}.residual" in run("sensitivity", *CHAIN["sensitivity"], "--json")
    run("finetune", *CHAIN["finetune"])
    checkpoint = load_checkpoint(root / "checkpoint.safetensors")
    assert checkpoint.architecture.low_rank == {CONV: 4, LINEAR: 4}
    shown = cli("inspect", root / "checkpoint.safetensors", "--json").json
    assert {x["layer"]: x["rank"] for x in shown["branches"]} == {CONV: 4, LINEAR: 4}
    words = cli("inspect", root / "checkpoint.safetensors").out
    assert_holds(words, "branches of rank 4", f"{CONV},", "*.ff.net.2", "branch of low rank")
    run("export")
    graph = ir.load(root / "unet.onnx").graph
    halves = [x for x in graph.initializers.values() if x.dtype is ir.DataType.FLOAT16]
    assert len(halves) == 4
    run("reference")
    for backend in (*VERIFIED, "tensorrt-rtx"):
        run("build-engine", "--backend", backend, *CHAIN.get(f"build-engine {backend}", []))
    for backend in VERIFIED:
        run("verify", "--backend", backend)
    speed = json.loads(run("benchmark", *CHAIN["benchmark onnxruntime"], "--json"))
    assert speed["speedup_over_fp32"]
    run("report")
    assert "rank 4" in (root / "reports" / "report.html").read_text()


@pytest.mark.parametrize(
    "options",
    [
        ("--low-rank", "4"),
        ("--low-rank-layers", "*.ff.net.2"),
        ("--low-rank", "0", "--low-rank-layers", "*.ff.net.2"),
    ],
    ids=" ".join,
)
def test_half_of_what_branches_take_is_refused_before_a_workspace_is_made(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    ended = cli("calibrate", "-w", tmp_path / "ws", *CALIBRATE, *options)
    ended.assert_refused("--low-rank", "--low-rank-layers")
    assert not (tmp_path / "ws").exists()


def test_layers_that_the_model_has_not_are_refused(tmp_path: Path) -> None:
    options = ("--low-rank", "4", "--low-rank-layers", "*.nothing")
    cli("calibrate", "-w", tmp_path, *CALIBRATE, *options).assert_refused("*.nothing")
    assert not (tmp_path / "calibrated.safetensors").exists()


def test_a_workspace_without_branches_says_nothing_of_them_and_takes_none(tmp_path: Path) -> None:
    assert cli("calibrate", "-w", tmp_path, *CALIBRATE, "--low-rank", "0").code == 0
    assert "low_rank" not in (tmp_path / MANIFEST).read_text()
    assert Workspace.open(tmp_path).scheme.to_json()["version"] == 3
    refused = cli("calibrate", "-w", tmp_path, *CALIBRATE, *BRANCHES)
    refused.assert_refused("low rank", tmp_path)
