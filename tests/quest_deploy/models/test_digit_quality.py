from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from quest_deploy.models.digit_quality import frechet_distance, judge

EYE = np.eye(3)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The real digits, as the embedded model was trained on them: images [1797, 1, 16, 16] in [-1,
    1], and their labels.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    return (F.interpolate(images, size=16, mode="bilinear") / 8 - 1).numpy(), data.target


def test_the_distance_between_gaussians_is_the_closed_form() -> None:
    mean = np.asarray([1.0, 2.0, 0.0])
    assert frechet_distance(mean, EYE, mean, EYE) == pytest.approx(0)
    assert frechet_distance(mean, EYE, np.zeros(3), EYE) == pytest.approx(5)
    assert frechet_distance(mean, 4 * EYE, mean, 9 * EYE) == pytest.approx(3 * (3 - 2) ** 2)


def test_the_distance_is_symmetric_where_covariances_do_not_commute() -> None:
    rng = np.random.default_rng(0)
    a, b = (x @ x.T for x in rng.standard_normal((2, 3, 3)))
    zero = np.zeros(3)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(frechet_distance(zero, b, zero, a))
    assert frechet_distance(zero, a, zero, b) > 0


def test_the_distance_survives_a_singular_covariance() -> None:
    singular = np.diag([1.0, 0.0, 0.0])
    assert frechet_distance(np.zeros(3), singular, np.zeros(3), EYE) == pytest.approx(2)


def test_real_digits_are_at_no_distance_and_recognized(
    digits: tuple[np.ndarray, np.ndarray],
) -> None:
    images, labels = digits
    quality = judge(images, labels)
    assert quality.frechet_distance == pytest.approx(0, abs=1e-3)
    assert quality.accuracy > 0.97


def test_accuracy_is_of_the_class_asked_for(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    assert judge(images, (labels + 1) % 10).accuracy < 0.03


def test_noisier_digits_are_farther_away(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    noise = np.random.default_rng(0).standard_normal(images.shape).astype(np.float32)
    distances = [
        judge(images + sigma * noise, labels).frechet_distance for sigma in (0.0, 0.1, 0.3, 0.6)
    ]
    assert distances == sorted(distances)
    assert distances[-1] > 1
