"""The options of `finetune`: which layers, which stages, and what stands in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.calibration.sensitivity import select_sensitive
from quest_deploy.errors import InputError
from quest_deploy.files import read_json
from quest_deploy.finetuning.train import FinetuneOptions
from quest_deploy.models.pipeline_model import PipelineModel
from tests.helpers import assert_holds
from tests.quest_deploy.support import cli

FEW = ("--temporal-steps", "1", "--sensitive-steps", "1", "--batch", "2")


def test_layers_stages_losses_and_precision_are_options_and_are_recorded(workspace: Path) -> None:
    options = (
        *("--stages", "sensitive,temporal", "--layers", "conv_in, *.ff.net.*"),
        *("--temporal-layers", "all", "--output-loss", "2"),
    )
    ended = cli(
        "finetune",
        "-w",
        workspace,
        *FEW,
        *options,
        *("--block-loss", "0.5", "--guidance-loss", "0", "--precision", "bf16"),
        "--gradient-checkpointing",
    )
    assert ended.code == 0, ended.err
    made = load_checkpoint(workspace / "checkpoint.safetensors").provenance
    assert (made["stages"], made["temporal_layers"]) == (["sensitive", "temporal"], ["*"])
    assert made["sensitive_layers"] == ["conv_in", "*.ff.net.*"]
    assert (made["output_loss"], made["block_loss"], made["precision"]) == (2.0, 0.5, "bf16")
    assert made["guidance_loss"] == 0


def test_the_embedded_model_is_finetuned_with_its_own_options_and_threads_unless_told_otherwise(
    workspace: Path, emoji: PipelineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[FinetuneOptions, int]] = []

    def stop(
        teacher: Any, calibrated: Any, trajectories: Any, options: FinetuneOptions, **execution: Any
    ) -> NoReturn:
        seen.append((options, torch.get_num_threads()))
        raise InputError("far enough")

    monkeypatch.setattr("quest_deploy.finetuning.train.finetune", stop)
    before = torch.get_num_threads()
    assert cli("finetune", "-w", workspace).message == "far enough"
    assert cli("finetune", "-w", workspace, "--batch", "7").message == "far enough"
    own = dict(emoji.finetuning)
    assert [options for options, _ in seen] == [
        FinetuneOptions(emoji.family, **{**own, **told}) for told in ({}, {"batch": 7})
    ]
    assert {threads for _, threads in seen} == {emoji.finetuning_threads}
    assert torch.get_num_threads() == before


def test_layers_auto_takes_the_sensitivity_reports_choice(workspace: Path) -> None:
    chosen = select_sensitive(read_json(workspace / "reports" / "sensitivity.json"))
    assert cli("finetune", "-w", workspace, *FEW, "--layers", "auto").code == 0
    assert load_checkpoint(workspace / "checkpoint.safetensors").provenance[
        "sensitive_layers"
    ] == list(chosen)


def test_layers_auto_needs_the_sensitivity_report(workspace: Path) -> None:
    (workspace / "reports" / "sensitivity.json").unlink()
    ended = cli("finetune", "-w", workspace, *FEW, "--layers", "auto")
    ended.assert_refused(
        workspace / "reports" / "sensitivity.json", f"quest-deploy sensitivity -w {workspace}"
    )


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (("--layers", "*.spatial"), "*.spatial"),
        (("--stages", "spatial"), "--stages temporal sensitive 'spatial'"),
        (("--stages", ""), "stages temporal sensitive"),
        (("--precision", "int8"), "'int8' float32 bf16"),
        (("--device", "tpu"), "'tpu' cpu cuda"),
        (("--output-loss", "0", "--block-loss", "0"), "loss"),
    ],
)
def test_what_cannot_work_is_said_in_one_message(
    workspace: Path, options: tuple[str, ...], facts: str
) -> None:
    cli("finetune", "-w", workspace, *FEW, *options).assert_refused(*facts.split())


def test_a_damaged_state_is_said_to_be_ignored(workspace: Path) -> None:
    (workspace / "finetune-state.pt").write_bytes(b"no state")
    ended = cli("finetune", "-w", workspace, *FEW)
    assert ended.code == 0
    assert_holds(ended.err, "warning", workspace / "finetune-state.pt")
