"""`quest-deploy sensitivity`: which layers hurt most when they are quantized."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.artifacts.workspace import CALIBRATED, IMAGES, REPORTS, TRAJECTORIES
from quest_deploy.cli.console import Console, table
from quest_deploy.cli.options import (
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    open_workspace,
)
from quest_deploy.cli.stage import run_stage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.cli.console import Update

DEFAULT_SAMPLES, DEFAULT_BATCH = 4, 32
LISTED = 12
SENSITIVITY = "sensitivity.json"


def sensitivity_stage(
    workspace: Workspace,
    console: Console,
    samples: int = DEFAULT_SAMPLES,
    batch: int = DEFAULT_BATCH,
    *,
    reuse: bool = False,
) -> dict[str, Any]:
    """Quantize each layer of the calibrated model alone; writes reports/sensitivity.json and
    images/sensitivity.png.
    """

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        from quest_deploy.artifacts.checkpoint import load_checkpoint
        from quest_deploy.calibration.sensitivity import measure_sensitivity, select_sensitive
        from quest_deploy.calibration.sensitivity_plot import plot_sensitivity
        from quest_deploy.calibration.trajectories import Trajectories
        from quest_deploy.files import write_json
        from quest_deploy.models.loading import load_model

        started = time.monotonic()
        measured = measure_sensitivity(
            load_model(workspace.source).load_unet(),
            load_checkpoint(workspace.path(CALIBRATED)),
            Trajectories.load(workspace.path(TRAJECTORIES)),
            samples,
            batch,
            update,
        )
        content = measured.to_json()
        selected = select_sensitive(content)
        report, picture = (
            workspace.path(REPORTS, SENSITIVITY),
            workspace.path(IMAGES, "sensitivity.png"),
        )
        write_json(report, content)
        plot_sensitivity(measured, selected, picture)
        details = {
            "samples": measured.samples,
            "seconds": time.monotonic() - started,
            "selected": list(selected),
            "layers": [
                {key: layer[key] for key in ("layer", "group", "mse", "relative_mse")}
                for layer in content["layers"]
            ],
        }
        return [report, picture], details

    options = {"samples": samples, "batch": batch}
    return run_stage(
        workspace,
        console,
        "sensitivity",
        inputs=("calibrate",),
        options=options,
        reuse=reuse,
        work=work,
    )


def describe(workspace: Workspace, details: dict[str, Any]) -> str:
    """The most sensitive layers and the kinds of layers as tables, and what stage 2 of finetuning
    would train.
    """
    from quest_deploy.calibration.sensitivity import SENSITIVE_SHARE

    layers, selected = details["layers"], details["selected"]
    worst = [
        [
            x["layer"],
            x["group"],
            f"{x['mse']:.1e}",
            f"{x['relative_mse']:.1e}",
            "yes" if x["layer"] in selected else "",
        ]
        for x in sorted(layers, key=lambda layer: -layer["mse"])[:LISTED]
    ]
    total = sum(x["mse"] for x in layers) or 1.0
    groups: dict[str, list[float]] = {}
    for x in layers:
        groups.setdefault(x["group"], []).append(x["mse"])
    kinds = [
        [group, str(len(errors)), f"{sum(errors):.1e}", f"{sum(errors) / total:.1%}"]
        for group, errors in sorted(groups.items(), key=lambda item: -sum(item[1]))
    ]
    return "\n".join(
        [
            f"{len(layers)} layers, each quantized alone, {details['samples']} samplings; the "
            "worst:",
            table(["layer", "kind", "e-MSE", "relative", "picked"], worst),
            "",
            table(["kind", "layers", "summed e-MSE", "share"], kinds),
            "",
            f"picked for stage 2: {len(selected)} layers, which make {SENSITIVE_SHARE:.0%} of the "
            "error "
            "of all but "
            "time_emb_proj and products, every bucket counting the same",
            f"{workspace.path(REPORTS, SENSITIVITY)}, {workspace.path(IMAGES, 'sensitivity.png')}",
        ]
    )


def sensitivity(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Recorded samplings to run through, at all their steps.")
    ] = DEFAULT_SAMPLES,
    batch: Annotated[int, typer.Option(min=1, help="Rows that run at once.")] = DEFAULT_BATCH,
    as_json: JsonOption = False,
) -> None:
    """Measure how much each layer hurts when it alone is quantized, and pick the layers for stage 2
    of finetuning.
    """
    console = Console(as_json=as_json)
    opened = open_workspace(workspace, model, bits)
    details = sensitivity_stage(opened, console, samples, batch)
    console.result({"workspace": str(opened.root), **details}, describe(opened, details))
