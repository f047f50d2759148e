"""`quest-deploy report`: a page that shows a workspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.descriptions import report_page
from quest_deploy.cli.options import command, opened
from quest_deploy.stages import api
from quest_deploy.stages.arguments import ReportArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(ReportArguments)
def report(chosen: dict[str, Any], console: Console) -> None:
    """Write a page that shows the workspace: one HTML file with its images, the verification layer
    by layer, activation ranges over time, speed, sizes, and the provenance of every file.
    """
    details = api.report(**chosen, progress=console)
    root = opened(chosen).root
    console.result({"workspace": str(root), **details}, report_page(details))
