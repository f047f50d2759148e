"""`quest-deploy schedule`: a scheduler as a table, for the C++ runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.options import command, opened
from quest_deploy.stages import api
from quest_deploy.stages.arguments import ScheduleArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(ScheduleArguments)
def schedule(chosen: dict[str, Any], console: Console) -> None:
    """Write a scheduler's steps as a table, which the C++ runtime denoises by."""
    details = api.schedule(**chosen)
    noise = ", with fresh noise at each step" if details["noise"] else ""
    console.result(
        {"workspace": str(opened(chosen).root), **details},
        f"{details['schedule']}: {details['steps']} calls of the model, as {details['scheduler']} "
        f"makes them{noise}",
    )
