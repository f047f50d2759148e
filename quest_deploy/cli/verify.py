"""`quest-deploy verify`: compare an engine with the fake-quantized model, per layer and end to end,
per bucket.
"""

from __future__ import annotations

import typer

from quest_deploy.cli.console import Console
from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import (
    BackendOption,
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    given,
)
from quest_deploy.stages import api
from quest_deploy.stages.options import DEFAULT_BACKEND
from quest_deploy.stages.run import failure
from quest_deploy.stages.workspaces import open_workspace


def verify(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    backend: BackendOption = DEFAULT_BACKEND,
    as_json: JsonOption = False,
) -> None:
    """Verify an engine against the fake-quantized model; exit code 1 if it differs."""
    chosen, console = given(locals()), Console(as_json=as_json)
    result = api.verify(**chosen, progress=console)
    report(console, open_workspace(workspace, model, bits), "verify", backend)
    if not result["passed"]:
        # Beside the report, which --json keeps the only value on standard output.
        console.note(f"error: {failure(result)}")
        raise typer.Exit(1)
