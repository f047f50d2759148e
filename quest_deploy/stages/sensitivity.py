"""Measure how much each layer hurts when it alone is quantized."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.workspace import (
    CALIBRATED,
    IMAGES,
    REPORTS,
    SENSITIVITY_REPORT,
    TRAJECTORIES,
)
from quest_deploy.calibration.sensitivity import measure_sensitivity, select_sensitive
from quest_deploy.calibration.sensitivity_plot import plot_sensitivity
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.files import write_json
from quest_deploy.models.loading import load_model

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import SensitivityOptions
    from quest_deploy.stages.results import Sensitivity


def work(
    workspace: Workspace, options: SensitivityOptions, progress: Progress
) -> tuple[list[Path], Sensitivity]:
    """Quantize each layer of the calibrated model alone; write the report and its plot."""
    started = time.monotonic()
    measured = measure_sensitivity(
        load_model(workspace.source).load_unet(),
        load_checkpoint(workspace.path(CALIBRATED)),
        Trajectories.load(workspace.path(TRAJECTORIES)),
        options.samples,
        options.batch,
        progress,
    )
    content = measured.to_json()
    selected = select_sensitive(content)
    report = workspace.new(REPORTS, SENSITIVITY_REPORT)
    picture = workspace.new(IMAGES, "sensitivity.png")
    write_json(report, content)
    plot_sensitivity(measured, selected, picture)
    return [report, picture], {
        "samples": measured.samples,
        "seconds": time.monotonic() - started,
        "selected": list(selected),
        "layers": [
            {
                "layer": layer["layer"],
                "group": layer["group"],
                "mse": layer["mse"],
                "relative_mse": layer["relative_mse"],
            }
            for layer in content["layers"]
        ],
    }
