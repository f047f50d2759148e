"""What the comparison's cells measure must not change unnoticed: cells of before and after would
stand side by side in one table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from quest_deploy.artifacts.scheme import Granularity, Scheme
from quest_deploy.calibration.ptq import CalibrationOptions, RangeMethod, calibrate
from quest_deploy.calibration.reconstruction import ReconstructOptions, reconstruct
from quest_deploy.calibration.sensitivity import measure_sensitivity, select_sensitive
from quest_deploy.calibration.trajectories import record_trajectories
from quest_deploy.evaluation.quality import SamplingOptions, draw, epsilon_mse
from quest_deploy.evaluation.sampling import float_denoiser
from quest_deploy.finetuning.train import FinetuneOptions, Step, finetune
from scripts.bench.methods.cells import Cell
from scripts.bench.methods.digits.quality import judge
from scripts.bench.methods.recipes import REVISION, definition_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quest_deploy.artifacts.checkpoint import Checkpoint
    from quest_deploy.calibration.trajectories import Trajectories
    from scripts.bench.methods.digits.model import DigitsModel

FIGURES = {
    "minmax": 0.685784,
    "l2.4": 0.670766,
    "mse": 0.667014,
    "mse, free": 0.0601543,
    "reconstruction": 0.666456,
    "finetuning": 0.666753,
    "finetuning, loss": -3.253892,
}
MOVED_CODES = 0.05483
"""Of revision 1: geometric means of all scales, the share of weight codes that reconstruction
moves, the last step's loss.
"""


def scale_of(checkpoint: Checkpoint) -> float:
    """The geometric mean of all activation scales and smoothing scales."""
    values = [
        getattr(quantizer, name).ravel()
        for quantizer in checkpoint.quantizers.values()
        for name in ("scale", "channel")
        if hasattr(quantizer, name)
    ]
    return float(np.exp(np.log(np.concatenate(values)).mean()))


def test_what_methods_make_changes_only_with_the_revision(
    mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    """Where this fails by intent: raise REVISION, measure all cells again, and write the new
    figures above.
    """

    def calibrated(
        method: RangeMethod, granularity: Granularity = Granularity.FOLDED_CHANNEL
    ) -> Checkpoint:
        scheme = Scheme.parse("w4a4", buckets=3, granularity=granularity)
        return calibrate("mini", mini_unet, mini_trajectories, scheme, CalibrationOptions(method))

    steps: list[Step] = []
    start = calibrated(RangeMethod.MSE)
    learned = reconstruct(
        mini_unet,
        start,
        mini_trajectories,
        ReconstructOptions(samples=16, rounding_steps=20, scale_steps=20, batch=4),
    )
    options = FinetuneOptions(
        family="class-conditional", temporal_steps=3, sensitive_steps=3, batch=4
    )
    tuned = finetune(lambda: mini_unet, start, mini_trajectories, options, on_step=steps.append)
    moved = [
        learned.layers[name].weight_codes != layer.weight_codes
        for name, layer in start.layers.items()
    ]
    measured = {
        "minmax": scale_of(calibrated(RangeMethod.MINMAX)),
        "l2.4": scale_of(calibrated(RangeMethod.L24)),
        "mse": scale_of(start),
        "mse, free": scale_of(calibrated(RangeMethod.MSE, Granularity.PER_CHANNEL)),
        "reconstruction": scale_of(learned),
        "finetuning": scale_of(tuned),
        "finetuning, loss": steps[-1].loss,
    }
    assert REVISION == 1
    assert measured == pytest.approx(FIGURES, rel=2e-4)
    assert float(np.concatenate([x.ravel() for x in moved]).mean()) == pytest.approx(
        MOVED_CODES, abs=1e-3
    )


@pytest.mark.slow
def test_what_methods_learn_from_and_how_they_are_judged_change_only_with_the_revision(
    digits: DigitsModel,
) -> None:
    """As above, of the digits: what is recorded, which layers are found sensitive, and a
    model's quality.
    """
    unet, scheme = digits.load_unet(), Scheme.parse("w4a4", buckets=4)
    recorded = record_trajectories(digits, unet, steps=4, samples=4, seed=0, scheme=scheme)
    checkpoint = calibrate("tiny", unet, recorded, scheme, CalibrationOptions())
    sensitivity = measure_sensitivity(unet, checkpoint, recorded, samples=1, batch=4).to_json()
    exact = float_denoiser(unet)

    def rough(sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        return 1.1 * exact(sample, timestep, **conditions)

    sampling = SamplingOptions(images=20, steps=2)
    images, labels = draw(digits, rough, sampling)
    errors = epsilon_mse(rough, recorded, scheme)
    quality = judge(images, labels, draw(digits, exact, sampling)[0], errors)
    learned_from = definition_of(Cell("quest-k50", "w4a4", 0), digits)["recipe"]["trajectories"]
    assert learned_from == {"steps": 20, "samples": 409}
    assert float(recorded.output.square().mean()) == pytest.approx(1.17602, rel=2e-4)
    assert len(select_sensitive(sensitivity)) == 10
    assert quality.frechet_distance == pytest.approx(13.5796, rel=1e-3)
    assert quality.accuracy == 1
    assert quality.pixel_mse == pytest.approx(0.0816419, rel=1e-3)
    assert quality.epsilon_mse == pytest.approx(
        [0.0159254, 0.0103402, 0.0104054, 0.0103696], rel=1e-3
    )
