"""`quest-deploy import`: a checkpoint that the official QuEST or Q-Diffusion code wrote, as a
workspace.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quest_deploy.cli.console import Console
from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import JsonOption, WorkspaceOption, given, parse_numbers
from quest_deploy.importers.settings import Source
from quest_deploy.stages import api
from quest_deploy.stages.options import IMPORT_SAMPLES, RECALIBRATION_SAMPLES


def import_command(
    checkpoint: Annotated[Path, typer.Argument(help="The official checkpoint (ckpt.pth).")],
    source: Annotated[Source, typer.Option("--from", help="The code that wrote it.")],
    unet: Annotated[
        Path,
        typer.Option(
            help="The CompVis UNet's configuration, YAML or JSON: an LDM config, or its UNet's "
            "parameters."
        ),
    ],
    timesteps: Annotated[
        str | None,
        typer.Option(
            help="QuEST: the calibrated timesteps, largest first, separated by commas.",
            show_default=False,
        ),
    ] = None,
    weight_bits: Annotated[
        int | None, typer.Option(help="Bits of weights: 4 or 8.", show_default=False)
    ] = None,
    activation_bits: Annotated[
        int | None, typer.Option(help="Bits of activations: 4 or 8.", show_default=False)
    ] = None,
    first_last_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of what the first and the last layer read: QuEST's commands set 8.",
            show_default=False,
        ),
    ] = None,
    softmax_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of attention's softmax: 4, 8 or 16 (--sm_abit).", show_default=False
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Whether activations are symmetric (--a_sym).",
            show_default=False,
        ),
    ] = None,
    context_tokens: Annotated[
        int | None,
        typer.Option(
            help="Q-Diffusion: the length of the text or class condition.", show_default=False
        ),
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file with the settings above, by their names (timesteps a list).",
            show_default=False,
        ),
    ] = None,
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate",
            help="Keep the rounded weights; choose new activation scales, deployable ones.",
        ),
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samplings to record.",
            show_default=f"{IMPORT_SAMPLES}, or {RECALIBRATION_SAMPLES} to recalibrate",
        ),
    ] = None,
    seed: int = 0,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Import a checkpoint of the official QuEST or Q-Diffusion code: the same results, in a
    workspace to export from.

    What the file does not say must be given; nothing is guessed.
    """
    chosen, console = given(locals(), timesteps=parse_numbers), Console(as_json=as_json)
    report(console, api.import_checkpoint(**chosen, progress=console), "import")
