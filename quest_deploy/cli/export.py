"""`quest-deploy export`: the portable QDQ graph with one activation-scale set per timestep
bucket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import command, opened
from quest_deploy.stages import api
from quest_deploy.stages.arguments import ExportArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(ExportArguments)
def export(chosen: dict[str, Any], console: Console) -> None:
    """Export the checkpoint as a portable ONNX graph; calibrates one where there is none. A
    workspace that is given alone must be there.
    """
    api.export(**chosen, progress=console)
    report(console, opened(chosen), "export")
