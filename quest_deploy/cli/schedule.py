"""`quest-deploy schedule`: a scheduler as a table, for the C++ runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quest_deploy.artifacts.workspace import SCHEDULES
from quest_deploy.cli.console import Console
from quest_deploy.cli.options import (
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    given,
)
from quest_deploy.models.schedulers import SCHEDULERS
from quest_deploy.stages import api
from quest_deploy.stages.workspaces import open_workspace


def schedule(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    scheduler: Annotated[
        str, typer.Option(help=f"The scheduler: {', '.join(SCHEDULERS)}.")
    ] = "ddim",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", show_default=f"{SCHEDULES}/<scheduler>-<steps>.json"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a scheduler's steps as a table, which the C++ runtime denoises by."""
    chosen, console = given(locals()), Console(as_json=as_json)
    details = api.schedule(**chosen)
    opened = open_workspace(workspace, model, bits)
    noise = ", with fresh noise at each step" if details["noise"] else ""
    console.result(
        {"workspace": str(opened.root), **details},
        f"{details['schedule']}: {details['steps']} calls of the model, as {details['scheduler']} "
        f"makes them{noise}",
    )
