"""`quest-deploy generate`: draw images with the engine as the UNet of the sampling loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import command, opened
from quest_deploy.stages import api
from quest_deploy.stages.arguments import GenerateArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(GenerateArguments)
def generate(chosen: dict[str, Any], console: Console) -> None:
    """Draw PNG pictures with the engine."""
    api.generate(**chosen, progress=console)
    report(console, opened(chosen), "generate", chosen["backend"])
