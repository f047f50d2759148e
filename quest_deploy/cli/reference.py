"""`quest-deploy reference`: save the fake-quantized model's inputs and outputs, for
verification.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import command, opened
from quest_deploy.stages import api
from quest_deploy.stages.arguments import ReferenceArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(ReferenceArguments)
def reference(chosen: dict[str, Any], console: Console) -> None:
    """Save the fake-quantized torch model's inputs and outputs, per layer and end to end, for every
    bucket.
    """
    api.reference(**chosen, progress=console)
    report(console, opened(chosen), "reference")
