"""Write a scheduler's steps as a table. Not a stage: the manifest does not record it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.workspace import SCHEDULES
from quest_deploy.models.loading import load_model
from quest_deploy.models.schedulers import make_scheduler, set_steps
from quest_deploy.serving.schedule import schedule_from_scheduler

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.stages.results import Schedule


def write_schedule(
    workspace: Workspace,
    scheduler: str,
    steps: int | None,
    output: Path | None,
    height: int | None = None,
    width: int | None = None,
) -> Schedule:
    """Write the table of ``steps`` steps of a scheduler, the model's own number where it is None,
    with the model's noise schedule; raise InputError where no table holds it.

    Args:
        height, width: of the images, in pixels; None for the model's own.
    """
    model = load_model(workspace.source)
    count = model.steps if steps is None else steps
    config, size = model.scheduler_config(), ""
    if height is not None or width is not None:
        high, wide = (
            own if given is None else given
            for given, own in zip((height, width), model.image_size, strict=True)
        )
        config, size = model.schedule_of_size(high, wide), f"-{high}x{wide}"

    def make() -> Any:
        made = make_scheduler(scheduler, config)
        set_steps(made, count)
        return made

    schedule = schedule_from_scheduler(make)
    path = output or workspace.path(SCHEDULES, f"{scheduler}-{count}{size}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    schedule.save(path)
    return {
        "schedule": str(path),
        "scheduler": schedule.scheduler,
        "steps": len(schedule.steps),
        "noise": any(step.noise_scale for step in schedule.steps),
    }
