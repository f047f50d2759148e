"""What the comparison's cells measure must not change unnoticed: cells of before and after would
stand side by side in one table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

from quest_deploy.artifacts.checkpoint import Checkpoint
from quest_deploy.artifacts.scheme import Granularity, Scheme
from quest_deploy.calibration.ptq import CalibrationOptions, RangeMethod, calibrate
from quest_deploy.calibration.reconstruction import ReconstructOptions, reconstruct
from quest_deploy.calibration.sensitivity import measure_sensitivity, select_sensitive
from quest_deploy.calibration.trajectories import Trajectories, record_trajectories
from quest_deploy.evaluation.quality import epsilon_mse, evaluate_images
from quest_deploy.evaluation.retrieval import Judge
from quest_deploy.evaluation.sampling import float_denoiser
from quest_deploy.finetuning.train import FinetuneOptions, Step, finetune
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from scripts.bench.methods.recipes import REVISION

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
"""Of revision 2: geometric means of all scales, the share of weight codes that reconstruction
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
    assert REVISION == 2
    assert measured == pytest.approx(FIGURES, rel=2e-4)
    assert float(np.concatenate([x.ravel() for x in moved]).mean()) == pytest.approx(
        MOVED_CODES, abs=1e-3
    )


@pytest.mark.slow
def test_what_methods_learn_from_and_how_they_are_judged_change_only_with_the_revision(
    pipelines: Callable[[str], Path], emoji: PipelineModel
) -> None:
    """As above, of a small text-to-image pipeline: what is recorded, which layers are found
    sensitive, and how the embedded model's judge sees images.
    """
    model = load_model(resolve_source(str(pipelines("sd"))))
    unet, scheme = model.load_unet(), Scheme.parse("w4a4", buckets=4)
    recorded = record_trajectories(model, unet, steps=4, samples=4, seed=0, scheme=scheme)
    checkpoint = calibrate("sd", unet, recorded, scheme, CalibrationOptions())
    sensitivity = measure_sensitivity(unet, checkpoint, recorded, samples=2, batch=8).to_json()
    exact = float_denoiser(unet)

    def rough(sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        return 1.1 * exact(sample, timestep, **conditions)

    errors = epsilon_mse(rough, recorded, scheme)
    noise = np.random.default_rng(0).uniform(-1, 1, (12, 3, 64, 64)).astype(np.float32)
    assert emoji.judge_folder is not None
    judge = Judge(emoji.judge_folder)
    quality = evaluate_images(noise, np.arange(12), noise * 0.9, errors, judge)
    assert quality.judgement is not None
    assert float(recorded.output.square().mean()) == pytest.approx(0.1418292, rel=2e-4)
    assert len(select_sensitive(sensitivity)) == 4
    assert errors == pytest.approx([0.00159575, 0.00150717, 0.00139584, 0.00117442], rel=1e-3)
    assert quality.psnr == pytest.approx(30.7998, rel=1e-3)
    assert quality.ssim == pytest.approx(0.994441, rel=1e-3)
    assert dataclasses.asdict(quality.judgement) == pytest.approx(
        {
            "frechet_distance": 210.108,
            "top1": 0.0,
            "top5": 0.0,
            "feature_distance": 0.000831464,
        },
        rel=1e-3,
    )
