"""`quest-deploy verify`: compare an engine with the fake-quantized model, per layer and end to end,
per bucket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import command, opened
from quest_deploy.stages import api
from quest_deploy.stages.arguments import VerifyArguments
from quest_deploy.stages.run import failure

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(VerifyArguments)
def verify(chosen: dict[str, Any], console: Console) -> None:
    """Verify an engine against the fake-quantized model; exit code 1 if it differs."""
    result = api.verify(**chosen, progress=console)
    report(console, opened(chosen), "verify", chosen["backend"])
    if not result["passed"]:
        # Beside the report, which --json keeps the only value on standard output.
        console.note(f"error: {failure(result)}")
        raise typer.Exit(1)
