"""`quest-deploy lora`: LoRAs in a checkpoint that is quantized already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import command
from quest_deploy.stages import api
from quest_deploy.stages.arguments import LoraArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(LoraArguments)
def lora(chosen: dict[str, Any], console: Console) -> None:
    """Fold LoRAs into the integer weights of a workspace's checkpoint, as a new workspace; the
    activation scales stay, so that nothing is calibrated or finetuned again.
    """
    report(console, api.lora(**chosen, progress=console), "lora")
