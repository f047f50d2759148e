"""The embedded model's quality metric: a Frechet distance and an accuracy in the eyes of a digit
classifier.

The classifier is a scikit-learn MLP (256-128-32-10, ReLU) trained on the real digits alone; its
weights and the real images' feature statistics ship with the model, so that judging needs neither
scikit-learn nor the data. Nothing of this enters calibration or finetuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

CLASSIFIER = Path(__file__).parent / "tiny_assets" / "classifier.safetensors"


@dataclass(frozen=True)
class DigitQuality:
    """``frechet_distance`` against all 1797 real digits (lower is better), ``accuracy`` of the
    asked-for class in [0, 1].
    """

    frechet_distance: float
    accuracy: float


def frechet_distance(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (AB)^(1/2)), after Dowson and Landau; means [D],
    covariances [D, D].
    """
    # The eigenvalues of a product of two positive semi-definite matrices are real and non-negative;
    # what is not is rounding.
    root_trace = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return float(
        ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace
    )


def judge(images: NDArray[np.float32], labels: NDArray[np.int64]) -> DigitQuality:
    """Judge generated images [N, 1, 16, 16] in [-1, 1], asked for as ``labels`` [N] in 0..9. N must
    be at least 2.
    """
    weights = load_file(CLASSIFIER)
    features = features_of(images, weights)
    logits = features @ weights["weight.2"] + weights["bias.2"]
    distance = frechet_distance(
        features.mean(0), np.cov(features, rowvar=False), weights["real_mean"], weights["real_cov"]
    )
    return DigitQuality(distance, float((logits.argmax(1) == labels).mean()))


def features_of(images: NDArray[np.float32], weights: dict[str, NDArray[np.float64]]) -> Array:
    """The classifier's 32 penultimate activations, float64 [N, 32], of images [N, 1, 16, 16]."""
    hidden = images.reshape(len(images), -1).astype(np.float64)
    for layer in range(2):
        hidden = np.maximum(hidden @ weights[f"weight.{layer}"] + weights[f"bias.{layer}"], 0)
    return hidden
