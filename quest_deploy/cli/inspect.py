"""`quest-deploy inspect`: what is in a workspace, a checkpoint, a graph or an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quest_deploy.cli.console import Console
from quest_deploy.cli.contents import describe_contents
from quest_deploy.cli.options import JsonOption
from quest_deploy.cli.precision import describe
from quest_deploy.stages import api


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="A workspace, a checkpoint (.safetensors), a graph (.onnx) or an engine's folder."
        ),
    ],
    layers: Annotated[
        bool, typer.Option("--layers", help="List each layer of a graph or engine, not each kind.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a file or folder holds: bits per layer, the precision an engine runs each in,
    buckets, sizes, provenance.
    """
    console = Console(as_json=as_json)
    content, precision = api.inspect(path, progress=console)
    lines = describe_contents(content)
    if precision is not None:
        lines.append(describe(precision, layers=layers))
    console.result({"path": str(path), **content}, *lines)
