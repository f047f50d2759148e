"""`quest-deploy reference`: save the fake-quantized model's inputs and outputs, for
verification.
"""

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
    parse_sample_size,
)
from quest_deploy.stages import api
from quest_deploy.stages.options import ReferenceOptions
from quest_deploy.stages.workspaces import open_workspace

DEFAULTS = ReferenceOptions()


def reference(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    seed: int = DEFAULTS.seed,
    megabytes: Annotated[
        int,
        typer.Option(
            help="The largest record; where it cannot hold all quantized tensors, the records hold "
            "them in turn."
        ),
    ] = DEFAULTS.megabytes,
    measured: Annotated[
        int | None,
        typer.Option(
            help="In how many records the model's sensitivity to last-bit differences is measured.",
            show_default="all, or 2 where a record cannot hold all quantized tensors",
        ),
    ] = DEFAULTS.measured,
    sample_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|HEIGHTxWIDTH",
            help="Cut the recorded samples down to this size: a large model's records then hold "
            "more quantized tensors, in less time.",
            show_default="as recorded",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Save the fake-quantized torch model's inputs and outputs, per layer and end to end, for every
    bucket.
    """
    chosen, console = (
        given(
            locals(),
            sample_size=parse_sample_size,
        ),
        Console(as_json=as_json),
    )
    api.reference(**chosen, progress=console)
    report(console, open_workspace(workspace, model, bits), "reference")
