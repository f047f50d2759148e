"""`quest-deploy schedule`: a scheduler as a table, for the C++ runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.cli.console import Console
from quest_deploy.cli.options import (
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
)
from quest_deploy.models.schedulers import SCHEDULERS
from quest_deploy.stages.workspaces import open_workspace

if TYPE_CHECKING:
    from quest_deploy.artifacts.workspace import Workspace

SCHEDULES = "schedules"


def write_schedule(
    workspace: Workspace, scheduler: str, steps: int, output: Path | None
) -> dict[str, Any]:
    """Write the table of ``steps`` steps of a scheduler, with the model's noise schedule; raise
    InputError where no table holds it.
    """
    from quest_deploy.models.registry import load_model
    from quest_deploy.models.schedulers import set_steps
    from quest_deploy.serving.schedule import schedule_from_scheduler

    model = load_model(workspace.source)

    def make() -> Any:
        made = model.load_scheduler(scheduler)
        set_steps(made, steps)
        return made

    schedule = schedule_from_scheduler(make)
    path = output or workspace.path(SCHEDULES, f"{scheduler}-{steps}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    schedule.save(path)
    noisy = any(step.noise_scale for step in schedule.steps)
    return {
        "schedule": str(path),
        "scheduler": schedule.scheduler,
        "steps": len(schedule.steps),
        "noise": noisy,
    }


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
    console = Console(as_json=as_json)
    opened = open_workspace(workspace, model, bits)
    details = write_schedule(opened, scheduler, steps, output)
    noise = ", with fresh noise at each step" if details["noise"] else ""
    console.result(
        {"workspace": str(opened.root), **details},
        f"{details['schedule']}: {details['steps']} calls of the model, as {details['scheduler']} "
        f"makes them{noise}",
    )
