"""`quest-deploy package`: write what a server needs to serve the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quest_deploy.cli.console import Console, size
from quest_deploy.cli.options import (
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    given,
)
from quest_deploy.errors import InputError
from quest_deploy.serving.triton.options import IO_DTYPES, TritonOptions
from quest_deploy.stages import api
from quest_deploy.stages.workspaces import open_workspace


def package(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    triton: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a package for Triton Inference Server there."),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            help="Rows that the UNet runs at once; with guidance an image is two.",
            show_default="the plan's, or 16",
        ),
    ] = None,
    max_steps: Annotated[
        int, typer.Option(help="The most denoising steps of a request.")
    ] = TritonOptions.max_steps,
    max_size: Annotated[
        int | None,
        typer.Option(
            help="The most pixels of a height or width.", show_default="the plan's, or the model's"
        ),
    ] = None,
    max_images: Annotated[
        int, typer.Option(help="The most images of a request.")
    ] = TritonOptions.max_images,
    max_in_flight: Annotated[
        int, typer.Option(help="Images that are drawn at the same time.")
    ] = TritonOptions.max_in_flight,
    max_queue: Annotated[
        int, typer.Option(help="Requests that may wait; more are refused at once.")
    ] = TritonOptions.max_queue,
    queue_delay: Annotated[
        int,
        typer.Option(
            help="Microseconds that a batch of the UNet waits for more requests, at every "
            "denoising "
            "step."
        ),
    ] = TritonOptions.queue_delay,
    io_dtype: Annotated[
        str, typer.Option(help=f"Of the models' inputs and outputs: {' or '.join(IO_DTYPES)}.")
    ] = TritonOptions.io_dtype,
    plugin_library: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A library of TensorRT plugins that the plan needs, besides its own; may be "
            "repeated.",
        ),
    ] = None,
    processor: Annotated[
        str,
        typer.Option(
            help="Without a GPU: native, exact on processors that compute as this one does, or "
            "any, "
            "exact on every x86-64."
        ),
    ] = TritonOptions.processor,
    as_json: JsonOption = False,
) -> None:
    """Write a package that serves the model: a model repository for Triton Inference Server."""
    chosen, console = given(locals()), Console(as_json=as_json)
    if triton is None:
        raise InputError("expected what to package for: --triton DIR")
    details = api.package(**chosen, progress=console)
    models = ", ".join([*details["models"], "pipeline", "pipeline_stream"])
    command = "python serve.py" if details["plan"] else "python serve.py --cpu"
    console.result(
        {
            "workspace": str(open_workspace(workspace, model, bits).root),
            "triton": str(triton),
            **details,
        },
        f"{triton} ({size(details['bytes'])}): {models}",
        f"serve it with `{command}` there, see README.md",
    )
