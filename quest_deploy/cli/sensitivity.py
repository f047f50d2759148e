"""`quest-deploy sensitivity`: which layers hurt most when they are quantized."""

from __future__ import annotations

from typing import Annotated

import typer

from quest_deploy.cli.console import Console
from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import (
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    given,
)
from quest_deploy.stages import api
from quest_deploy.stages.options import SensitivityOptions
from quest_deploy.stages.workspaces import open_workspace

DEFAULTS = SensitivityOptions()


def sensitivity(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Recorded samplings to run through, at all their steps.")
    ] = DEFAULTS.samples,
    batch: Annotated[int, typer.Option(min=1, help="Rows that run at once.")] = DEFAULTS.batch,
    as_json: JsonOption = False,
) -> None:
    """Measure how much each layer hurts when it alone is quantized, and pick the layers for stage 2
    of finetuning.
    """
    chosen, console = given(locals()), Console(as_json=as_json)
    api.sensitivity(**chosen, progress=console)
    report(console, open_workspace(workspace, model, bits), "sensitivity")
