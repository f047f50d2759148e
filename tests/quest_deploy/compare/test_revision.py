"""What the comparison's cells measure must not change unnoticed: cells of before and after would stand side by side in one table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from quest_deploy.compare.methods import REVISION
from quest_deploy.finetune.train import FinetuneOptions, Progress, finetune
from quest_deploy.quant.calibrate import CalibrationOptions, RangeMethod, calibrate
from quest_deploy.quant.reconstruct import ReconstructOptions, reconstruct
from quest_deploy.scheme import Granularity, Scheme

if TYPE_CHECKING:
    from torch import nn

    from quest_deploy.checkpoint import Checkpoint
    from quest_deploy.trajectories import Trajectories

FIGURES = {
    "minmax": 0.685784,
    "l2.4": 0.670766,
    "mse": 0.667014,
    "mse, free": 0.0601543,
    "reconstruction": 0.666456,
    "finetuning": 0.666753,
    "finetuning, loss": -3.320719,
}
MOVED_CODES = 0.05483
"""Of revision 1: geometric means of all scales, the share of weight codes that reconstruction moves, the last step's loss."""


def scale_of(checkpoint: Checkpoint) -> float:
    """The geometric mean of all activation scales and channel vectors."""
    values = [getattr(site, name).ravel() for site in checkpoint.sites.values() for name in ("scale", "channel") if hasattr(site, name)]
    return float(np.exp(np.log(np.concatenate(values)).mean()))


def test_what_cells_measure_changes_only_with_their_revision(mini_unet: nn.Module, mini_trajectories: Trajectories) -> None:
    """Where this fails by intent: raise REVISION, measure all cells again, and write the new figures above."""

    def calibrated(method: RangeMethod, granularity: Granularity = Granularity.FOLDED_CHANNEL) -> Checkpoint:
        scheme = Scheme.parse("w4a4", buckets=3, granularity=granularity)
        return calibrate("mini", mini_unet, mini_trajectories, scheme, CalibrationOptions(method))

    steps: list[Progress] = []
    start = calibrated(RangeMethod.MSE)
    learned = reconstruct(
        mini_unet, start, mini_trajectories, ReconstructOptions(samples=16, rounding_steps=20, scale_steps=20, batch=4)
    )
    options = FinetuneOptions(family="class-conditional", temporal_steps=3, sensitive_steps=3, batch=4)
    tuned = finetune(lambda: mini_unet, start, mini_trajectories, options, on_progress=steps.append)
    moved = [learned.layers[name].weight_codes != layer.weight_codes for name, layer in start.layers.items()]
    measured = {
        "minmax": scale_of(calibrated(RangeMethod.MINMAX)),
        "l2.4": scale_of(calibrated(RangeMethod.L24)),
        "mse": scale_of(start),
        "mse, free": scale_of(calibrated(RangeMethod.MSE, Granularity.FREE_CHANNEL)),
        "reconstruction": scale_of(learned),
        "finetuning": scale_of(tuned),
        "finetuning, loss": steps[-1].loss,
    }
    assert REVISION == 1
    assert measured == pytest.approx(FIGURES, rel=2e-4)
    assert float(np.concatenate([x.ravel() for x in moved]).mean()) == pytest.approx(MOVED_CODES, abs=1e-3)
