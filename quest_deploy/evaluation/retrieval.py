"""How well images show what they were asked for, in the eyes of an image encoder that was trained,
with a text encoder, on the real pictures and their names.

The encoders know nothing of the model that draws, and nothing here enters calibration or
finetuning. ``scripts/make_emoji_model.py`` trains them for the embedded model; what is needed of
them to judge, the image encoder and the names' embeddings, ships in the model's folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

from quest_deploy.models.pipeline_model import quiet
from quest_deploy.models.weights import load_part

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]

STATISTICS = "statistics.safetensors"
"""Beside the image encoder: "names", the prompts' embeddings of length 1, [N, D]; "mean" [D] and
"covariance" [D, D] of the real pictures' embeddings.
"""
NEAREST = 5
BATCH = 256


@dataclass(frozen=True)
class Judgement:
    """What a judge says of images.

    Attributes:
        frechet_distance: to the real pictures, of the embeddings; lower is better.
        top1, top5: the shares of images to which the prompt asked for is the nearest of all, or one
            of the five nearest, in [0, 1].
        feature_distance: to FP32's images of the same noise: the squared distance between the
            normalized features of each patch, mean over patches and layers, as LPIPS (Zhang et al.,
            2018) has it without its learned weights; 0 is none.
    """

    frechet_distance: float
    top1: float
    top5: float
    feature_distance: float


class Judge:
    """An image encoder, the embeddings of the prompts, and the statistics of real pictures."""

    def __init__(self, folder: Path) -> None:
        """Read what ``scripts/make_emoji_model.py`` wrote into ``folder``."""
        with quiet():
            self._encoder = load_part(folder, CLIPVisionModelWithProjection)
        self._statistics = {
            name: value.double() for name, value in load_file(folder / STATISTICS).items()
        }

    def __call__(
        self,
        images: NDArray[np.float32],
        prompts: NDArray[np.int64],
        fp32_images: NDArray[np.float32],
    ) -> Judgement:
        """Judge images [N, 3, H, W] in [-1, 1], N at least 2, asked for by the prompts of these
        numbers [N].
        """
        seen, distances = [], []
        # Batch by batch: the features of a batch are a hundred times larger than its images.
        for batch, of_fp32 in zip(
            *(torch.from_numpy(x).split(BATCH) for x in (images, fp32_images)), strict=True
        ):
            embedding, features = self._see(batch)
            seen.append(embedding)
            pairs = zip(features, self._see(of_fp32)[1], strict=True)
            distances.append(np.mean([(a - b).square().sum(-1).mean() for a, b in pairs]))
        embeddings = torch.cat(seen)
        near = F.normalize(embeddings, dim=1) @ self._statistics["names"].T
        own = near.gather(1, torch.from_numpy(prompts)[:, None])
        rank = (near > own).sum(1)
        distance = frechet_distance(
            embeddings.mean(0).numpy(),
            np.cov(embeddings.numpy(), rowvar=False),
            self._statistics["mean"].numpy(),
            self._statistics["covariance"].numpy(),
        )
        return Judgement(
            distance,
            float((rank == 0).double().mean()),
            float((rank < NEAREST).double().mean()),
            float(np.average(distances, weights=[len(each) for each in seen])),
        )

    @torch.no_grad()
    def _see(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The embeddings, float64 [N, D], and of each layer the patches' features of length 1."""
        seen = self._encoder(pixel_values=images, output_hidden_states=True)
        # The first token is the class's.
        features = [F.normalize(layer[:, 1:], dim=-1) for layer in seen.hidden_states[1:]]
        return seen.image_embeds.double(), features


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
