"""`quest-deploy generate`: draw images with the engine as the UNet of the sampling loop."""

from __future__ import annotations

from typing import Annotated

import typer

from quest_deploy.cli.console import Console
from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import (
    BackendOption,
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    given,
)
from quest_deploy.models.schedulers import SCHEDULERS
from quest_deploy.stages import api
from quest_deploy.stages.options import DEFAULT_BACKEND, GRID_ROWS, GenerateOptions
from quest_deploy.stages.workspaces import open_workspace

DEFAULTS = GenerateOptions()


def generate(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    backend: BackendOption = DEFAULT_BACKEND,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What to draw, for a text-to-image model; may be repeated.",
            show_default="one of ours",
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="The classes to draw, one column each: 0123, or 207,360 where there are more.",
            show_default="the first ten",
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images of each.",
            show_default=f"{GRID_ROWS}, or 1 for a text-to-image model",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = DEFAULTS.steps,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance weight; 1 is none.", show_default="the model's"
        ),
    ] = None,
    scheduler: Annotated[
        str, typer.Option(help=f"A diffusers scheduler: {', '.join(SCHEDULERS)}.")
    ] = DEFAULTS.scheduler,
    height: Annotated[
        int | None,
        typer.Option(min=8, help="Pixels, for a text-to-image model.", show_default="the model's"),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=8, help="Pixels, for a text-to-image model.", show_default="the model's"),
    ] = None,
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Draw PNG pictures with the engine."""
    chosen, console = given(locals()), Console(as_json=as_json)
    api.generate(**chosen, progress=console)
    report(console, open_workspace(workspace, model, bits), "generate", backend)
