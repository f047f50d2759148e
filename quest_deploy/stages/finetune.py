"""Finetune the calibrated model selectively, as QuEST does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from quest_deploy.artifacts.workspace import (
    CALIBRATED,
    CHECKPOINT,
    FINETUNE_STATE,
    FINETUNE_TARGETS,
    TRAJECTORIES,
)
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.finetuning import train
from quest_deploy.finetuning.threads import at_most_threads
from quest_deploy.models.loading import load_model

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.models.registry import DiffusionModel
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import FinetuneOptions
    from quest_deploy.stages.results import Finetuning


def work(
    workspace: Workspace, options: FinetuneOptions, progress: Progress
) -> tuple[list[Path], Finetuning]:
    """Finetune; write the checkpoint to be deployed."""
    model, losses, started = load_model(workspace.source), list[float](), time.monotonic()
    settings = _settings(model, options)

    def on_step(step: train.Step) -> None:
        losses.append(step.loss)

    checkpoint = _compute(workspace, model, settings, options, progress=progress, on_step=on_step)
    path = workspace.new(CHECKPOINT)
    save_checkpoint(checkpoint, path)
    return [path], {
        "steps": settings.steps,
        "seconds": time.monotonic() - started,
        "final_loss": sum(losses[-50:]) / len(losses[-50:]) if losses else None,
        "checkpoint_bytes": path.stat().st_size,
    }


def join(workspace: Workspace, options: FinetuneOptions) -> None:
    """Compute the share of a further process of a distributed run; the main one locks the
    workspace, checks it and writes what all of them compute.
    """
    model = load_model(workspace.source)
    _compute(workspace, model, _settings(model, options), options)


def _settings(model: DiffusionModel, options: FinetuneOptions) -> train.FinetuneOptions:
    """The options with the model's own for what they leave open."""
    return train.FinetuneOptions(
        family=model.layer_set_name, **{**model.finetuning, **options.to_json()}
    )


def _compute(
    workspace: Workspace,
    model: DiffusionModel,
    settings: train.FinetuneOptions,
    options: FinetuneOptions,
    **reporting: Any,
) -> Checkpoint:
    with at_most_threads(model.finetuning_threads):
        return train.finetune(
            model.load_unet,
            load_checkpoint(workspace.path(CALIBRATED)),
            Trajectories.load(workspace.path(TRAJECTORIES)),
            settings,
            state_path=workspace.path(FINETUNE_STATE),
            targets_path=workspace.path(FINETUNE_TARGETS),
            **options.execution,
            **reporting,
        )
