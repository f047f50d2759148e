"""`quest-deploy finetune`: QuEST's two-stage selective finetuning of the calibrated model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.cli.console import Console, size
from quest_deploy.cli.options import BitsOption, JsonOption, ModelOption, WorkspaceOption, open_workspace
from quest_deploy.cli.stage import run_stage
from quest_deploy.workspace import CALIBRATED, CHECKPOINT, FINETUNE_STATE, TRAJECTORIES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.cli.console import Update
    from quest_deploy.workspace import Workspace


def finetune_stage(
    workspace: Workspace, console: Console, choices: dict[str, Any] | None = None, *, reuse: bool = False
) -> dict[str, Any]:
    """Finetune; writes checkpoint.safetensors. ``choices`` override the defaults of FinetuneOptions."""
    given = {"seed": 0, **(choices or {})}

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        from quest_deploy.checkpoint import load_checkpoint, save_checkpoint
        from quest_deploy.finetune.train import FinetuneOptions, Progress, finetune
        from quest_deploy.models.registry import load_model
        from quest_deploy.trajectories import Trajectories

        model = load_model(workspace.model)
        options = FinetuneOptions(family=model.family, **given)
        losses: list[float] = []

        def report(progress: Progress) -> None:
            losses.append(progress.loss)
            update(f"{progress.stage}, loss {progress.loss:.4f}", progress.step, progress.steps)

        started = time.monotonic()
        checkpoint = finetune(
            model.load_unet(),
            load_checkpoint(workspace.path(CALIBRATED)),
            Trajectories.load(workspace.path(TRAJECTORIES)),
            options,
            state_path=workspace.path(FINETUNE_STATE),
            on_progress=report,
        )
        save_checkpoint(checkpoint, workspace.path(CHECKPOINT))
        workspace.path(FINETUNE_STATE).unlink(missing_ok=True)
        details = {
            "steps": options.temporal_steps + options.sensitive_steps,
            "seconds": time.monotonic() - started,
            "final_loss": sum(losses[-50:]) / len(losses[-50:]) if losses else None,
            "checkpoint_bytes": workspace.path(CHECKPOINT).stat().st_size,
        }
        return [workspace.path(CHECKPOINT)], details

    return run_stage(workspace, console, "finetune", inputs=("calibrate",), options=given, reuse=reuse, work=work)


def describe(workspace: Workspace, details: dict[str, Any]) -> str:
    """The details in words."""
    loss = "" if details["final_loss"] is None else f", loss over the last 50: {details['final_loss']:.4f}"
    checkpoint = f"{workspace.path(CHECKPOINT)} ({size(details['checkpoint_bytes'])})"
    return f"{details['steps']} steps, the last run took {details['seconds']:.0f} s{loss}\n{checkpoint}"


def finetune(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    temporal_steps: Annotated[int | None, typer.Option(min=0, help="Optimizer steps of stage 1, the temporal layers.")] = None,
    sensitive_steps: Annotated[int | None, typer.Option(min=0, help="Optimizer steps of stage 2, the sensitive layers.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples a step.")] = None,
    weight_rate: Annotated[float | None, typer.Option(min=0, help="Learning rate of the weights.")] = None,
    scale_rate: Annotated[float | None, typer.Option(min=0, help="Learning rate of the activation scales.")] = None,
    seed: int | None = None,
    as_json: JsonOption = False,
) -> None:
    """Finetune the calibrated model with QuEST; resumes where it was interrupted."""
    console = Console(as_json=as_json)
    opened = open_workspace(workspace, model, bits)
    choices = {
        "temporal_steps": temporal_steps,
        "sensitive_steps": sensitive_steps,
        "batch": batch,
        "weight_rate": weight_rate,
        "scale_rate": scale_rate,
        "seed": seed,
    }
    details = finetune_stage(opened, console, {name: value for name, value in choices.items() if value is not None})
    console.result({"workspace": str(opened.root), **details}, describe(opened, details))
