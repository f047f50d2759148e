"""`quest-deploy finetune`: QuEST's selective finetuning of the calibrated model."""

from __future__ import annotations

from typing import Annotated

import typer

from quest_deploy.artifacts.workspace import REPORTS, SENSITIVITY_REPORT
from quest_deploy.cli.console import Console
from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import (
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    given,
    parse_list,
    parse_patterns,
)
from quest_deploy.stages import api
from quest_deploy.stages.workspaces import open_workspace


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
            f"({REPORTS}/{SENSITIVITY_REPORT} picks them).",
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
    chosen = given(
        locals(),
        stages=parse_list,
        temporal_layers=parse_patterns,
        layers=lambda text: text if text == "auto" else parse_patterns(text),
    )
    console = Console(as_json=as_json)
    if api.finetune(**chosen, progress=console) is not None:  # else another process prints
        report(console, open_workspace(workspace, model, bits), "finetune")
