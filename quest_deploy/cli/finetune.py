"""`quest-deploy finetune`: QuEST's selective finetuning of the calibrated model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import command, opened
from quest_deploy.stages import api
from quest_deploy.stages.arguments import FinetuneArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(FinetuneArguments)
def finetune(chosen: dict[str, Any], console: Console) -> None:
    """Finetune the calibrated model with QuEST; resumes where it was interrupted. Several
    processes: `accelerate launch`.
    """
    if api.finetune(**chosen, progress=console) is not None:  # else another process prints
        report(console, opened(chosen), "finetune")
