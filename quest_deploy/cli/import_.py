"""`quest-deploy import`: a checkpoint that the official QuEST or Q-Diffusion code wrote, as a
workspace.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.artifacts.model_source import IMPORTED
from quest_deploy.artifacts.workspace import (
    CALIBRATED,
    MANIFEST,
    TRAJECTORIES,
    Workspace,
    check_vacant,
)
from quest_deploy.cli.console import Console, in_float, size
from quest_deploy.cli.options import JsonOption, WorkspaceOption
from quest_deploy.cli.stage import run_stage
from quest_deploy.errors import InputError
from quest_deploy.files import sha256_of
from quest_deploy.importers.settings import ImportSettings, Source

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.artifacts.scheme import Scheme
    from quest_deploy.cli.console import Update

EXAMPLES, CALIBRATION_SAMPLES = 4, 64
"""Samplings that are recorded: to trace and verify the model with, and to recalibrate it on."""


def import_stage(
    root: Path | None,
    console: Console,
    checkpoint: Path,
    unet: Path,
    settings: ImportSettings,
    *,
    recalibrate: bool = False,
    samples: int | None = None,
    seed: int = 0,
) -> tuple[Workspace, dict[str, Any]]:
    """Make a workspace of ``checkpoint``; writes trajectories.safetensors and
    calibrated.safetensors.

    Args:
        root: the workspace's folder; None for quest-out/imported-<bits>.
        unet: the CompVis UNet's configuration.
        recalibrate: keep the rounded weights, but choose new activation scales that can be
            deployed.
        samples: samplings to record, None for EXAMPLES or CALIBRATION_SAMPLES.

    Raises:
        InputError: the checkpoint does not fit the configuration and the settings, or the folder
            holds something else.
    """
    from quest_deploy.artifacts.checkpoint import save_checkpoint
    from quest_deploy.calibration.ptq import CalibrationOptions
    from quest_deploy.importers import convert
    from quest_deploy.importers.architecture import UNetConfig
    from quest_deploy.importers.read import read
    from quest_deploy.importers.trajectories import random_inputs, record_imported

    official = read(checkpoint, UNetConfig.load(unet), settings)
    rounded = convert.rounded_layers(official)
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed: expected an integer from 0 to 2^63 - 1, not {seed}")
    imported = (
        None
        if recalibrate
        else convert.import_checkpoint(official, rounded, random_inputs(official, 2, seed))
    )
    scheme = convert.import_scheme(official) if imported is None else imported.checkpoint.scheme
    root = root or Path("quest-out") / f"{IMPORTED}-{scheme.name}"
    opened = _opened(root, scheme)
    with console.progress("record") as update:
        trajectories = record_imported(
            official,
            convert.float_model(official),
            samples=samples or (CALIBRATION_SAMPLES if recalibrate else EXAMPLES),
            seed=seed,
            on_progress=lambda done, total: update("recording trajectories", done, total),
        )
        result = imported or convert.recalibrate(
            official, rounded, trajectories, CalibrationOptions(seed=seed), update
        )
    # Not before: an import that fails leaves no workspace.
    workspace = opened or Workspace.create(root, IMPORTED, scheme)

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        trajectories.save(workspace.path(TRAJECTORIES))
        save_checkpoint(result.checkpoint, workspace.path(CALIBRATED))
        weights, macs = result.checkpoint.share_at(4)
        details = {
            "from": settings.source.value,
            "recalibrated": recalibrate,
            "layers": len(result.checkpoint.layers),
            "sites": len(result.checkpoint.sites),
            "buckets": scheme.buckets,
            "in_float": result.in_float,
            "weights_at_4_bits": weights,
            "macs_at_4_bits": macs,
            "checkpoint_bytes": workspace.path(CALIBRATED).stat().st_size,
        }
        return [workspace.path(TRAJECTORIES), workspace.path(CALIBRATED)], details

    options = {
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": sha256_of(checkpoint),
        "unet": str(unet),
        "unet_sha256": sha256_of(unet),
        "recalibrate": recalibrate,
        "samples": samples,
        "seed": seed,
    }
    return workspace, run_stage(
        workspace, console, "import", inputs=(), options=options, reuse=False, work=work
    )


def _opened(root: Path, scheme: Scheme) -> Workspace | None:
    """The workspace in ``root``, or None where one can be made there."""
    if not (root / MANIFEST).exists():
        check_vacant(root)
        return None
    opened = Workspace.open(root)
    if opened.model != IMPORTED or opened.scheme != scheme:
        raise InputError(f"{root} holds another model or scheme; give another folder with -w")
    return opened


def describe(workspace: Workspace, details: dict[str, Any]) -> str:
    """The details in words."""
    lines = [
        f"{details['layers']} layers, {details['sites']} quantized tensors, each with "
        f"{details['buckets']} sets of scales, "
        f"at {workspace.scheme.name}",
        f"{workspace.path(CALIBRATED)} ({size(details['checkpoint_bytes'])})",
        *in_float(details["in_float"], details["sites"]),
    ]
    if details["in_float"]:
        lines.append("--recalibrate chooses scales that do not")
    return "\n".join(lines)


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
            show_default=f"{EXAMPLES}, or {CALIBRATION_SAMPLES} to recalibrate",
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
    for path in (checkpoint, unet):
        if not path.is_file():
            raise InputError(f"{path} does not exist")
    console = Console(as_json=as_json)
    options = {
        "timesteps": _numbers(timesteps),
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "first_last_bits": first_last_bits,
        "softmax_bits": softmax_bits,
        "symmetric": symmetric,
        "context_tokens": context_tokens,
    }
    given = ImportSettings.gather(source, options, settings)
    opened, details = import_stage(
        workspace,
        console,
        checkpoint,
        unet,
        given,
        recalibrate=recalibrate,
        samples=samples,
        seed=seed,
    )
    console.result({"workspace": str(opened.root), **details}, describe(opened, details))


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.replace(",", " ").split()]
    except ValueError as e:
        raise InputError(
            f"--timesteps: expected numbers separated by commas, found {text!r}"
        ) from e
