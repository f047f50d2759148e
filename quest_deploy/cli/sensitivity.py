"""`quest-deploy sensitivity`: which layers hurt most when they are quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import command, opened
from quest_deploy.stages import api
from quest_deploy.stages.arguments import SensitivityArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(SensitivityArguments)
def sensitivity(chosen: dict[str, Any], console: Console) -> None:
    """Measure how much each layer hurts when it alone is quantized, and pick the layers for stage 2
    of finetuning.
    """
    api.sensitivity(**chosen, progress=console)
    report(console, opened(chosen), "sensitivity")
