"""What a graph takes besides its model's own inputs, and the inputs that it is traced and verified
with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quest_deploy.artifacts.workspace import TRAJECTORIES
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.errors import InputError
from quest_deploy.models.residuals import unet_residuals

if TYPE_CHECKING:
    from quest_deploy.artifacts.checkpoint import Architecture
    from quest_deploy.artifacts.workspace import Workspace

STAND_IN = 0.1
"""The standard deviation of what stands for a ControlNet's residuals where none were recorded."""


def recorded_inputs(
    workspace: Workspace, architecture: Architecture, *, controlnet: bool | None
) -> Trajectories:
    """The workspace's trajectories, with residuals exactly where a graph takes them.

    Args:
        controlnet: whether it does; None for whether it was calibrated with a ControlNet. Where
            that was not, normal numbers stand for them, in the first row.

    Raises:
        InputError: no ControlNet fits the UNet.
    """
    found = Trajectories.load(workspace.path(TRAJECTORIES))
    if controlnet is None or controlnet == bool(found.residuals):
        return found
    if not controlnet:
        return replace(found, residuals={})
    if architecture.official_sums:
        raise InputError(
            "--controlnet-inputs: expected a diffusers model, and an imported checkpoint computes "
            "as the official code does, which has no such inputs"
        )
    residuals = unet_residuals({"_class_name": architecture.class_name, **architecture.config})
    steps, height, width = (found.sample.shape[i] for i in (0, -2, -1))
    generator = torch.Generator().manual_seed(0)
    return replace(
        found,
        residuals={
            name: (
                STAND_IN * torch.randn(1, 1, *x.shape(height, width), generator=generator)
            ).expand(steps, -1, -1, -1, -1)  # the same at every step, in the memory of one
            for name, x in residuals.items()
        },
    )
