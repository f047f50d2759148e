from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scripts.bench.methods.digits.model import DigitsModel, latents_from_images
from scripts.bench.methods.digits.quality import DigitQuality, judge
from tests.helpers import refused


def judged(images: np.ndarray, labels: np.ndarray) -> DigitQuality:
    return judge(images, labels, images, [])


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, np.ndarray]:
    """The real digits, as the model was trained on them: images [1797, 1, 16, 16] in [-1,
    1], and their labels.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    return (F.interpolate(images, size=16, mode="bilinear") / 8 - 1).numpy(), data.target


def test_real_digits_are_at_no_distance_and_recognized(
    real: tuple[np.ndarray, np.ndarray],
) -> None:
    images, labels = real
    quality = judged(images, labels)
    assert quality.frechet_distance == pytest.approx(0, abs=1e-3)
    assert quality.accuracy > 0.97


def test_accuracy_is_of_the_class_asked_for(real: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = real
    assert judged(images, (labels + 1) % 10).accuracy < 0.03


def test_noisier_digits_are_farther_away(real: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = real
    noise = np.random.default_rng(0).standard_normal(images.shape).astype(np.float32)
    distances = [
        judged(images + sigma * noise, labels).frechet_distance for sigma in (0.0, 0.1, 0.3, 0.6)
    ]
    assert distances == sorted(distances)
    assert distances[-1] > 1


def test_decoding_undoes_the_pixel_unshuffle_and_clips(digits: DigitsModel) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (3, 1, 16, 16)).astype(np.float32)
    latents = latents_from_images(torch.from_numpy(images)).numpy()
    np.testing.assert_array_equal(digits.images(latents), images)
    assert np.abs(digits.images(7 * latents)).max() == 1


def test_each_class_has_conditions_of_its_own_and_none_too(digits: DigitsModel) -> None:
    states = digits.conditions(np.arange(10))["encoder_hidden_states"]
    null = digits.null_conditions(1)["encoder_hidden_states"]
    assert len(torch.cat([states, null]).flatten(1).unique(dim=0)) == 11
    with refused(0, 9, 10):
        digits.conditions(np.asarray([3, 10]))
