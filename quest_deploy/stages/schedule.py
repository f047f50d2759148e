"""Write a scheduler's steps as a table. Not a stage: the manifest does not record it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.workspace import SCHEDULES
from quest_deploy.models.loading import load_model
from quest_deploy.models.schedulers import set_steps
from quest_deploy.serving.schedule import schedule_from_scheduler

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.stages.results import Schedule


def write_schedule(
    workspace: Workspace, scheduler: str, steps: int | None, output: Path | None
) -> Schedule:
    """Write the table of ``steps`` steps of a scheduler, the model's own number where it is None,
    with the model's noise schedule; raise InputError where no table holds it.
    """
    model = load_model(workspace.source)
    count = model.steps if steps is None else steps

    def make() -> Any:
        made = model.load_scheduler(scheduler)
        set_steps(made, count)
        return made

    schedule = schedule_from_scheduler(make)
    path = output or workspace.path(SCHEDULES, f"{scheduler}-{count}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    schedule.save(path)
    return {
        "schedule": str(path),
        "scheduler": schedule.scheduler,
        "steps": len(schedule.steps),
        "noise": any(step.noise_scale for step in schedule.steps),
    }
