"""`quest-deploy evaluate`: quality of FP32, PTQ, QuEST and the engines, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import command, opened
from quest_deploy.stages import api
from quest_deploy.stages.arguments import EvaluateArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(EvaluateArguments)
def evaluate(chosen: dict[str, Any], console: Console) -> None:
    """Judge FP32, the fake-quantized models and the engine: how near their images come
    to FP32's, and how well the embedded model's show what they were asked for.
    """
    api.evaluate(**chosen, progress=console)
    report(console, opened(chosen), "evaluate", chosen["backend"])
