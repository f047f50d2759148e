"""`quest-deploy benchmark`: the engine against FP32 and against static scales, on the same backend,
in one run.
"""

from __future__ import annotations

from typing import Annotated

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
from quest_deploy.stages.options import DEFAULT_BACKEND, BenchmarkOptions
from quest_deploy.stages.workspaces import open_workspace

DEFAULTS = BenchmarkOptions()


def benchmark(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    backend: BackendOption = DEFAULT_BACKEND,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="A batch size; may be repeated. [default: 1 and 16]"),
    ] = None,
    runs: Annotated[
        int, typer.Option(min=1, help="Timed inferences of each engine.")
    ] = DEFAULTS.runs,
    warmup: Annotated[
        int, typer.Option(min=0, help="Untimed inferences before.")
    ] = DEFAULTS.warmup,
    static: Annotated[
        bool,
        typer.Option(
            "--static/--no-static",
            help="Time static scales too; a large model's third engine may not fit into memory.",
        ),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Time the engine against FP32 and against static scales, on the same backend."""
    chosen, console = given(locals()), Console(as_json=as_json)
    api.benchmark(**chosen, progress=console)
    report(console, open_workspace(workspace, model, bits), "benchmark", backend)
