"""`quest-deploy import`: a checkpoint that the official QuEST or Q-Diffusion code wrote, as a
workspace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import command
from quest_deploy.stages import api
from quest_deploy.stages.arguments import ImportArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(ImportArguments)
def import_command(chosen: dict[str, Any], console: Console) -> None:
    """Import a checkpoint of the official QuEST or Q-Diffusion code: the same results, in a
    workspace to export from.

    What the file does not say must be given; nothing is guessed.
    """
    report(console, api.import_checkpoint(**chosen, progress=console), "import")
