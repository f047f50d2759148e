from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.evaluation.quality import (
    Fidelity,
    Quality,
    SamplingOptions,
    draw,
    epsilon_mse,
    evaluate_images,
)
from tests.quest_deploy.support import strict_json

if TYPE_CHECKING:
    from quest_deploy.models.tiny import TinyModel


@pytest.fixture(scope="module")
def recorded() -> Trajectories:
    """Two samplings of three steps, in buckets 3, 3 and 0 of four; the float model answered 0."""
    zeros = torch.zeros(3, 2, 1, 2, 2)
    return Trajectories(
        zeros, torch.tensor([900.0, 800.0, 10.0]), zeros, {"tokens": torch.arange(2.0)[:, None]}
    )


def off_by_timestep(
    sample: torch.Tensor, timestep: torch.Tensor, **conditions: torch.Tensor
) -> torch.Tensor:
    return torch.ones_like(sample) * timestep.view(-1, 1, 1, 1) / 100


def test_epsilon_mse_is_the_mean_over_each_buckets_steps(recorded: Trajectories) -> None:
    errors = epsilon_mse(off_by_timestep, recorded, Scheme.parse("w4a4", buckets=4))
    assert errors[0] == pytest.approx(0.01)
    assert errors[3] == pytest.approx((81 + 64) / 2)


def test_epsilon_mse_gives_each_sample_its_own_conditions(recorded: Trajectories) -> None:
    def denoise(
        sample: torch.Tensor, timestep: torch.Tensor, **conditions: torch.Tensor
    ) -> torch.Tensor:
        return sample + conditions["tokens"].view(-1, 1, 1, 1)

    assert epsilon_mse(denoise, recorded, Scheme.parse("w4a4", buckets=1)) == [pytest.approx(0.5)]


def test_a_quality_with_a_bucket_that_was_never_visited_is_valid_json(
    recorded: Trajectories, tiny: TinyModel
) -> None:
    errors = epsilon_mse(off_by_timestep, recorded, Scheme.parse("w4a4", buckets=4))
    images = np.random.default_rng(0).uniform(-1, 1, (4, 1, 16, 16)).astype(np.float32)
    quality = evaluate_images(tiny, images, np.arange(4), images, errors)
    assert strict_json(json.dumps(quality.to_json()))["epsilon_mse"][3] == pytest.approx(72.5)


def test_labels_are_drawn_in_turn(tiny: TinyModel) -> None:
    images, labels = draw(
        tiny,
        lambda sample, timestep, **conditions: torch.zeros_like(sample),
        SamplingOptions(images=23, steps=1),
    )
    assert images.shape == (23, 1, 16, 16)
    assert labels.tolist() == [*range(10), *range(10), 0, 1, 2]


def test_two_denoisers_are_compared_on_the_same_noise(tiny: TinyModel) -> None:
    options = SamplingOptions(images=4, steps=1, seed=5)
    (one, _), (two, _) = (
        draw(
            tiny,
            lambda sample, timestep, shift=shift, **conditions: torch.full_like(sample, shift),
            options,
        )
        for shift in (0.0, 0.1)
    )
    spread = np.std(one - two)
    assert 0 < spread < 0.1 * np.std(one)


def test_fp32_itself_has_no_pixel_error_and_a_shift_its_square(tiny: TinyModel) -> None:
    images = np.random.default_rng(0).uniform(-0.5, 0.5, (4, 1, 16, 16)).astype(np.float32)
    labels = np.arange(4)
    assert evaluate_images(tiny, images, labels, images, []).pixel_mse == 0
    shifted = evaluate_images(tiny, images + np.float32(0.1), labels, images, [])
    assert shifted.pixel_mse == pytest.approx(0.01, rel=1e-3)


def test_images_are_judged_by_the_models_own_metric_and_else_by_their_distance_from_fp32(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).uniform(-0.5, 0.5, (4, 1, 16, 16)).astype(np.float32)
    assert isinstance(evaluate_images(tiny, images, np.arange(4), images, []), Quality)
    monkeypatch.setattr(type(tiny), "judge", lambda self, images, labels: None)
    near = evaluate_images(tiny, images + np.float32(0.2), np.arange(4), images, [])
    assert isinstance(near, Fidelity)
    assert near.psnr == pytest.approx(20, abs=0.01)
    same = evaluate_images(tiny, images, np.arange(4), images, [])
    assert isinstance(same, Fidelity)
    assert same.psnr is None
