"""`quest-deploy client`: let a Triton server draw an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quest_deploy.cli.console import Console
from quest_deploy.cli.options import JsonOption, given
from quest_deploy.stages import api


def client(
    url: Annotated[
        str,
        typer.Argument(
            metavar="HOST:PORT", help="The server's gRPC service, such as 127.0.0.1:8001."
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option(help="What to draw, of a text-to-image model.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    label: Annotated[
        int | None, typer.Option(help="The class to draw, of a class-conditional model.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps.", show_default="the server's")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="A diffusers scheduler by its short name.", show_default="the server's"),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance weight; 1 is none.", show_default="the model's"
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="The same seed draws the same image.", show_default="the server's choice"
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write the PNG file.")
    ] = Path("image.png"),
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for each step.")] = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Ask a server started by a package's serve.py for an image; Ctrl-C cancels it there too."""
    chosen, console = given(locals()), Console(as_json=as_json)
    drawn = api.client(**chosen, progress=console)
    console.result({**drawn}, f"{output}: seed {drawn['seed']}, {drawn['seconds']:.2f} s")
