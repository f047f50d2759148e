"""The quality of drawn digits: a Frechet distance and an accuracy in the eyes of a classifier, and
how near they come to FP32's.

The classifier is a scikit-learn MLP (256-128-32-10, ReLU) trained on the real digits alone; its
weights and the real images' feature statistics ship with the model, so that judging needs neither
scikit-learn nor the data. Nothing of this enters calibration or finetuning.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file

from quest_deploy.evaluation.retrieval import frechet_distance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

CLASSIFIER = Path(__file__).parent / "assets" / "classifier.safetensors"


@dataclass(frozen=True)
class DigitQuality:
    """One method's quality.

    Attributes:
        frechet_distance: to all 1797 real digits; lower is better.
        accuracy: the share of images that show the digit asked for, in [0, 1].
        pixel_mse: against FP32's images of the same noise, pixels in [-1, 1].
        epsilon_mse: against FP32's predictions on FP32's trajectories, mean over each timestep
            bucket, [K].
    """

    frechet_distance: float
    accuracy: float
    pixel_mse: float
    epsilon_mse: list[float | None]

    def to_json(self) -> dict[str, Any]:
        """The quality as a JSON value."""
        return asdict(self)


def judge(
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    fp32_images: NDArray[np.float32],
    epsilon_mse: list[float | None],
) -> DigitQuality:
    """Judge generated images [N, 1, 16, 16] in [-1, 1], asked for as ``labels`` [N] in 0..9. N must
    be at least 2.
    """
    weights = load_file(CLASSIFIER)
    features = features_of(images, weights)
    logits = features @ weights["weight.2"] + weights["bias.2"]
    distance = frechet_distance(
        features.mean(0), np.cov(features, rowvar=False), weights["real_mean"], weights["real_cov"]
    )
    return DigitQuality(
        distance,
        float((logits.argmax(1) == labels).mean()),
        float(np.square(images - fp32_images).mean()),
        epsilon_mse,
    )


def features_of(images: NDArray[np.float32], weights: dict[str, NDArray[np.float64]]) -> Array:
    """The classifier's 32 penultimate activations, float64 [N, 32], of images [N, 1, 16, 16]."""
    hidden = images.reshape(len(images), -1).astype(np.float64)
    for layer in range(2):
        hidden = np.maximum(hidden @ weights[f"weight.{layer}"] + weights[f"bias.{layer}"], 0)
    return hidden
