"""What a graph takes besides its model's own inputs, and the inputs that it is traced and verified
with.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quest_deploy.artifacts.workspace import TRAJECTORIES
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.errors import InputError
from quest_deploy.models.networks import network_of
from quest_deploy.models.residuals import check_unrecorded, flag, kind_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from quest_deploy.artifacts.checkpoint import Architecture
    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.models.residuals import Residual

logger = logging.getLogger(__name__)
STAND_IN = 0.1
"""The standard deviation of what stands for residuals where none were recorded."""


def recorded_inputs(
    workspace: Workspace, architecture: Architecture, wanted: Mapping[str, bool | None]
) -> Trajectories:
    """The workspace's trajectories, with residuals exactly where a graph takes them.

    Args:
        wanted: of each of ``KINDS``, whether it does; None for whether it was calibrated with one.
            Where that was not, normal numbers stand for them, in half of the rows.

    Raises:
        InputError: the UNet takes none, or took none when it was calibrated and cannot now.
    """
    found = Trajectories.load(workspace.path(TRAJECTORIES))
    recorded = {kind_of(name) for name in found.residuals}
    config = {"_class_name": architecture.class_name, **architecture.config}
    residuals: dict[str, Tensor] = {}
    network = network_of(architecture.class_name)
    for kind, given in wanted.items():
        if kind in recorded and given is not False:
            # The model's order: a file has the alphabet's, where 10 stands before 2.
            residuals |= {name: found.residuals[name] for name in network.residuals(config, kind)}
        elif given:
            if architecture.official_sums:
                raise InputError(
                    f"{flag(kind)}-inputs: expected a diffusers model, and an imported checkpoint "
                    "computes as the official code does, which has no such inputs"
                )
            shapes = network.residuals(config, kind)
            check_unrecorded(workspace.scheme, kind)
            residuals |= _stand_ins(found, shapes, kind)
    return replace(found, residuals=residuals)


def _stand_ins(
    recorded: Trajectories, shapes: Mapping[str, Residual], kind: str
) -> dict[str, Tensor]:
    logger.warning(
        "calibrated without %s: the scales were chosen without what it adds, and random numbers "
        "stand for it",
        flag(kind),
    )
    steps, samples, height, width = (recorded.sample.shape[i] for i in (0, 1, -2, -1))
    rows, generator = recorded.controlled or -(-samples // 2), torch.Generator().manual_seed(0)
    return {
        # The same at every step and in every row, in the memory of one.
        name: (STAND_IN * torch.randn(1, 1, *x.shape(height, width), generator=generator)).expand(
            steps, rows, -1, -1, -1
        )
        for name, x in shapes.items()
    }
