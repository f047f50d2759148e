"""`quest-deploy finetune`: QuEST's selective finetuning of the calibrated model."""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.artifacts.workspace import (
    CALIBRATED,
    CHECKPOINT,
    FINETUNE_STATE,
    FINETUNE_TARGETS,
    REPORTS,
    TRAJECTORIES,
)
from quest_deploy.cli.console import Console, size
from quest_deploy.cli.options import (
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    open_workspace,
)
from quest_deploy.cli.sensitivity import SENSITIVITY
from quest_deploy.cli.stage import run_stage
from quest_deploy.errors import InputError
from quest_deploy.files import read_json
from quest_deploy.finetuning.distributed import is_main_process

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from quest_deploy.artifacts.checkpoint import Checkpoint
    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.cli.console import Update
    from quest_deploy.finetuning.train import FinetuneOptions, Progress


def finetune_stage(
    workspace: Workspace,
    console: Console,
    choices: dict[str, Any] | None = None,
    execution: dict[str, Any] | None = None,
    *,
    reuse: bool = False,
) -> dict[str, Any]:
    """Finetune; writes checkpoint.safetensors.

    Args:
        choices: override the model's own options, which override the defaults of FinetuneOptions.
        execution: override those of ``finetune`` that do not shape the result (device,
            gradient_checkpointing, ...).
    """
    given = {"seed": 0, **(choices or {})}

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        from quest_deploy.artifacts.checkpoint import save_checkpoint

        options = _options(workspace, given)
        losses: list[float] = []

        def report(progress: Progress) -> None:
            losses.append(progress.loss)
            low, high = progress.buckets
            update(
                f"{progress.stage} layers",
                progress.step,
                progress.steps,
                f"buckets {low}-{high}, loss {progress.loss:.4f}",
            )

        started = time.monotonic()
        checkpoint = _finetune(
            workspace,
            options,
            **(execution or {}),
            on_progress=report,
            on_target=lambda step: update("targets from the float model", step, options.steps),
            notify=console.note,
        )
        save_checkpoint(checkpoint, workspace.path(CHECKPOINT))
        workspace.path(FINETUNE_STATE).unlink(missing_ok=True)
        details = {
            "steps": options.steps,
            "seconds": time.monotonic() - started,
            "final_loss": sum(losses[-50:]) / len(losses[-50:]) if losses else None,
            "checkpoint_bytes": workspace.path(CHECKPOINT).stat().st_size,
        }
        return [workspace.path(CHECKPOINT)], details

    return run_stage(
        workspace, console, "finetune", inputs=("calibrate",), options=given, reuse=reuse, work=work
    )


def _options(workspace: Workspace, given: dict[str, Any]) -> FinetuneOptions:
    from quest_deploy.finetuning.train import FinetuneOptions
    from quest_deploy.models.loading import load_model

    model = load_model(workspace.source)
    try:
        return FinetuneOptions(family=model.family, **{**model.finetuning, **given})
    except TypeError as e:
        raise InputError(
            f"{workspace.root}: finetuned with options that are unknown here ({e}); run "
            "`quest-deploy finetune`"
        ) from e


def _finetune(workspace: Workspace, options: FinetuneOptions, **execution: Any) -> Checkpoint:
    from quest_deploy.artifacts.checkpoint import load_checkpoint
    from quest_deploy.calibration.trajectories import Trajectories
    from quest_deploy.finetuning.train import finetune
    from quest_deploy.models.loading import load_model

    model = load_model(workspace.source)
    with _threads(model.finetuning_threads):
        return finetune(
            model.load_unet,
            load_checkpoint(workspace.path(CALIBRATED)),
            Trajectories.load(workspace.path(TRAJECTORIES)),
            options,
            state_path=workspace.path(FINETUNE_STATE),
            targets_path=workspace.path(FINETUNE_TARGETS),
            **execution,
        )


@contextmanager
def _threads(most: int | None) -> Iterator[None]:
    """Let torch compute with at most so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, most or before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe(workspace: Workspace, details: dict[str, Any]) -> str:
    """The details in words."""
    loss = (
        ""
        if details["final_loss"] is None
        else f", loss over the last 50: {details['final_loss']:.4f}"
    )
    checkpoint = f"{workspace.path(CHECKPOINT)} ({size(details['checkpoint_bytes'])})"
    return (
        f"{details['steps']} steps, the last run took {details['seconds']:.0f} "
        f"s{loss}\n{checkpoint}"
    )


def finetune(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    stages: Annotated[
        str | None,
        typer.Option(
            help="The stages in order, separated by commas.", show_default="temporal,sensitive"
        ),
    ] = None,
    temporal_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers of the temporal stage: globs separated by commas, or all.",
            show_default="the model family's",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers of the sensitive stage: globs separated by commas, all, or auto "
            f"({REPORTS}/{SENSITIVITY} picks them).",
            show_default="the model family's",
        ),
    ] = None,
    carry_temporal: Annotated[
        bool | None,
        typer.Option(
            "--carry-temporal/--freeze-temporal",
            help="Whether the sensitive stage trains the temporal layers on, where their stage "
            "came "
            "first.",
            show_default="carry",
        ),
    ] = None,
    temporal_steps: Annotated[
        int | None, typer.Option(min=0, help="Optimizer steps of the temporal stage.")
    ] = None,
    sensitive_steps: Annotated[
        int | None, typer.Option(min=0, help="Optimizer steps of the sensitive stage.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples a step, over all processes.")
    ] = None,
    weight_rate: Annotated[
        float | None, typer.Option(min=0, help="Learning rate of the weights.")
    ] = None,
    scale_rate: Annotated[
        float | None, typer.Option(min=0, help="Learning rate of the activation scales.")
    ] = None,
    output_loss: Annotated[
        float | None, typer.Option(min=0, help="Weight of the loss at the model's output.")
    ] = None,
    block_loss: Annotated[
        float | None, typer.Option(min=0, help="Weight of the loss at its blocks' outputs.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="float32, or bf16 for the float arithmetic between the quantizers."),
    ] = None,
    seed: int | None = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            help="Compute activations again in the backward pass: less memory, more time."
        ),
    ] = False,
    target_cache: Annotated[
        int,
        typer.Option(min=1, help="MiB on disk for the float model's block outputs, per process."),
    ] = 1024,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between two saved states.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Finetune the calibrated model with QuEST; resumes where it was interrupted. Several
    processes: `accelerate launch`.
    """
    console = Console(as_json=as_json)
    opened = open_workspace(workspace, model, bits)
    choices = {
        "stages": _listed(stages),
        "temporal_layers": _patterns(temporal_layers),
        "sensitive_layers": _sensitive_layers(opened) if layers == "auto" else _patterns(layers),
        "carry_temporal": carry_temporal,
        "temporal_steps": temporal_steps,
        "sensitive_steps": sensitive_steps,
        "batch": batch,
        "weight_rate": weight_rate,
        "scale_rate": scale_rate,
        "output_loss": output_loss,
        "block_loss": block_loss,
        "precision": precision,
        "seed": seed,
    }
    choices = {name: value for name, value in choices.items() if value is not None}
    execution = {
        "device": device,
        "gradient_checkpointing": gradient_checkpointing,
        "target_cache": target_cache,
        "save_every": save_every,
    }
    if not is_main_process():
        # The main process holds the lock, checks the workspace, and writes what all of them
        # compute.
        _finetune(opened, _options(opened, {"seed": 0, **choices}), **execution)
        return
    details = finetune_stage(opened, console, choices, execution)
    console.result({"workspace": str(opened.root), **details}, describe(opened, details))


def _listed(given: str | None) -> tuple[str, ...] | None:
    return (
        None if given is None else tuple(part.strip() for part in given.split(",") if part.strip())
    )


def _patterns(given: str | None) -> tuple[str, ...] | None:
    return ("*",) if given == "all" else _listed(given)


def _sensitive_layers(workspace: Workspace) -> tuple[str, ...]:
    """The layers that the workspace's sensitivity report says to train; raise InputError where
    there is no up-to-date report.
    """
    from quest_deploy.calibration.sensitivity import select_sensitive

    workspace.require("sensitivity")
    return select_sensitive(read_json(workspace.path(REPORTS, SENSITIVITY)))
