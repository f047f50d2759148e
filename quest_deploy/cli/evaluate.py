"""`quest-deploy evaluate`: quality of FP32, PTQ, QuEST and the engines, side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from quest_deploy.backends.registry import BACKENDS
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
from quest_deploy.stages.options import DEFAULT_BACKEND, EvaluateOptions
from quest_deploy.stages.workspaces import open_workspace

DEFAULTS = EvaluateOptions()


def evaluate(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    backend: Annotated[
        str, typer.Option(help=f"The engine to judge: {', '.join(BACKENDS)}.")
    ] = DEFAULT_BACKEND,
    images: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Images to draw with each.",
            show_default="the model's own",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = DEFAULTS.steps,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance weight; 1 is none.", show_default="the model's"
        ),
    ] = None,
    scheduler: Annotated[str, typer.Option(help="A diffusers scheduler.")] = DEFAULTS.scheduler,
    seed: int = DEFAULTS.seed,
    as_json: JsonOption = False,
) -> None:
    """Judge FP32, the fake-quantized models and the engine: digits by a classifier, other models by
    their distance from FP32.
    """
    chosen, console = given(locals()), Console(as_json=as_json)
    api.evaluate(**chosen, progress=console)
    report(console, open_workspace(workspace, model, bits), "evaluate", backend)
