"""`quest-deploy export-parts`: text encoders and VAE as graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import command, opened
from quest_deploy.stages import api
from quest_deploy.stages.arguments import ExportPartsArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(ExportPartsArguments)
def export_parts(chosen: dict[str, Any], console: Console) -> None:
    """Export text encoders and VAE as graphs."""
    api.export_parts(**chosen, progress=console)
    report(console, opened(chosen), "export-parts")
