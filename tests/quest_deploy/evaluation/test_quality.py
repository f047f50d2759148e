from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.cli.descriptions import evaluation
from quest_deploy.evaluation import quality
from quest_deploy.evaluation.quality import SamplingOptions, draw, epsilon_mse, evaluate_images
from quest_deploy.evaluation.retrieval import Judgement
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from tests.quest_deploy.support import strict_json

LABELS = np.arange(4)


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
    recorded: Trajectories,
) -> None:
    errors = epsilon_mse(off_by_timestep, recorded, Scheme.parse("w4a4", buckets=4))
    images = np.random.default_rng(0).uniform(-1, 1, (4, 1, 16, 16)).astype(np.float32)
    found = evaluate_images(images, np.arange(4), images, errors)
    assert strict_json(json.dumps(found.to_json()))["epsilon_mse"][3] == pytest.approx(72.5)


def test_labels_are_drawn_in_turn() -> None:
    images, labels = draw(
        load_model(resolve_source("emoji"), ["cat", "fly", "cat face"]),
        lambda sample, timestep, **conditions: torch.zeros_like(sample),
        SamplingOptions(images=5, steps=1),
    )
    assert images.shape == (5, 3, 64, 64)
    assert labels.tolist() == [0, 1, 2, 0, 1]


def test_two_denoisers_are_compared_on_the_same_noise(emoji: PipelineModel) -> None:
    options = SamplingOptions(images=4, steps=1, seed=5)
    (one, _), (two, _) = (
        draw(
            emoji,
            lambda sample, timestep, shift=shift, **conditions: torch.full_like(sample, shift),
            options,
        )
        for shift in (0.0, 0.1)
    )
    spread = np.std(one - two)
    assert 0 < spread < 0.1 * np.std(one)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, (4, 3, 16, 16)).astype(np.float32)


def test_fp32_itself_has_no_error_and_is_like_itself(images: np.ndarray) -> None:
    same = evaluate_images(images, LABELS, images, [])
    assert (same.pixel_mse, same.psnr) == (0, None)
    assert same.ssim == pytest.approx(1)


@pytest.mark.parametrize(("shift", "decibels"), [(0.2, 20), (0.02, 40)])
def test_a_shift_has_its_square_as_error_of_which_psnr_is_in_decibels_to_the_range_of_two(
    images: np.ndarray, shift: float, decibels: float
) -> None:
    near = evaluate_images(images + np.float32(shift), LABELS, images, [])
    assert near.pixel_mse == pytest.approx(shift**2, rel=1e-3)
    assert near.psnr == pytest.approx(decibels, abs=0.01)


def test_ssim_is_that_of_its_paper_with_mirrored_borders(images: np.ndarray) -> None:
    other = np.random.default_rng(1).uniform(-0.5, 0.5, images.shape).astype(np.float32)
    near = (0.7 * images + 0.3 * other).astype(np.float32)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def mean(x: np.ndarray) -> np.ndarray:
        x = np.pad(x, ((0, 0), (0, 0), (5, 5), (5, 5)), mode="reflect")
        return (np.lib.stride_tricks.sliding_window_view(x, (11, 11), (2, 3)) * window).sum((4, 5))

    a, b = ((x.astype(np.float64) + 1) / 2 for x in (near, images))  # black is 0
    one, two = 0.01**2, 0.03**2
    spread_a, spread_b = mean(a * a) - mean(a) ** 2, mean(b * b) - mean(b) ** 2
    expected = (
        (2 * mean(a) * mean(b) + one)
        * (2 * (mean(a * b) - mean(a) * mean(b)) + two)
        / ((mean(a) ** 2 + mean(b) ** 2 + one) * (spread_a + spread_b + two))
    )
    assert evaluate_images(near, LABELS, images, []).ssim == pytest.approx(
        expected.mean(), abs=1e-4
    )


def test_pictures_of_nearly_the_same_grey_are_alike() -> None:
    grey = np.zeros((1, 3, 16, 16), np.float32)
    ssim = evaluate_images(grey + np.float32(0.05), LABELS[:1], grey, []).ssim
    assert ssim is not None
    assert 0.99 < ssim < 1


def test_ssim_is_the_mean_over_images_in_any_number_of_batches(
    images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = images + np.linspace(0, 0.4, 4, dtype=np.float32).reshape(4, 1, 1, 1)
    alone = [evaluate_images(other[[i]], LABELS[:1], images[[i]], []).ssim for i in range(4)]
    monkeypatch.setattr(quality, "SSIM_BATCH", 3)
    assert evaluate_images(other, LABELS, images, []).ssim == pytest.approx(np.mean(alone))


@pytest.mark.parametrize(("height", "width"), [(4, 32), (32, 10)])
def test_images_smaller_than_its_window_have_no_ssim(height: int, width: int) -> None:
    small = np.zeros((2, 5, height, width), np.float32)
    judged = evaluate_images(small + np.float32(0.2), LABELS[:2], small, [0.5])
    assert judged.ssim is None
    assert judged.psnr == pytest.approx(20, abs=0.01)
    details: Any = {
        "results": {"FP32": judged.to_json()},
        "sampling": {"images": 2, "steps": 1, "scheduler": "ddim", "guidance": 1.0},
        "picture": "compare.png",
    }
    assert "20.00" in evaluation(details)


def test_what_a_judge_says_stands_beside_the_distances_and_is_asked_for_where_there_is_one(
    images: np.ndarray,
) -> None:
    said = Judgement(1.0, 0.5, 0.75, 0.25)
    asked: list[tuple[Any, ...]] = []

    def judge(*given: Any) -> Judgement:
        asked.append(given)
        return said

    judged = evaluate_images(images + 1, LABELS, images, [0.5], judge)  # type: ignore[arg-type]
    plain = evaluate_images(images + 1, LABELS, images, [0.5])
    assert judged.to_json() == {**plain.to_json(), **dataclasses.asdict(said)}
    assert list(plain.to_json()) == ["psnr", "ssim", "pixel_mse", "epsilon_mse"]
    for found, given in zip(*asked, (images + 1, LABELS, images), strict=True):
        np.testing.assert_array_equal(found, given)
