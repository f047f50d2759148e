"""`quest-deploy run`: every stage in order, skipping those whose inputs have not changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from quest_deploy.cli.descriptions import describe, summary
from quest_deploy.cli.options import command
from quest_deploy.stages import api
from quest_deploy.stages.arguments import RunArguments

if TYPE_CHECKING:
    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.cli.console import Console


@command(RunArguments)
def run(chosen: dict[str, Any], console: Console) -> None:
    """Go from the FP32 model to verified, benchmarked engines and a picture; goes on where it was
    interrupted.

    What was calibrated or finetuned with options of its own keeps them. An engine that fails its
    verification is neither benchmarked nor drawn with; the others are, and the exit code is 1.
    """

    def show(opened: Workspace, stage: str, details: Any) -> None:
        if not console.as_json:
            print(f"\n== {stage}\n{describe(opened, stage.replace(' ', '/'))}", flush=True)

    ended = api.run(**chosen, on_result=show, progress=console)
    results = {
        "workspace": str(ended.workspace.root),
        "left_out": ended.backends.left_out,
        "failed": ended.failed,
        **ended.results,
    }
    console.result(results, "", "== summary", summary(ended))
    if ended.failed:
        # After the result, which --json keeps one value.
        console.note(f"error: {'; '.join(ended.failed.values())}")
        raise typer.Exit(1)
