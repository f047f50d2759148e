"""Quality, side by side: the FP32 model, the calibrated and the finetuned fake-quantized ones, the
engines.

All of them draw the same labels from the same noise, so their images can also be compared one by
one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from quest_deploy.calibration.trajectories import chunked
from quest_deploy.evaluation.sampling import sample_images
from quest_deploy.progress import no_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quest_deploy.artifacts.scheme import Scheme
    from quest_deploy.calibration.trajectories import Trajectories
    from quest_deploy.evaluation.retrieval import Judge, Judgement
    from quest_deploy.evaluation.sampling import Denoiser
    from quest_deploy.models.registry import DiffusionModel
    from quest_deploy.progress import Progress


HELD_OUT_SEED = 1_000_003
"""Trajectories for the epsilon-MSE are drawn with a seed of their own, not the calibration's."""
HELD_OUT_SAMPLES = 32
SSIM_WINDOW = 11
"""The sides of the window that SSIM sees an image through, in pixels."""
SSIM_BATCH = 8


@dataclass(frozen=True)
class SamplingOptions:
    """How images are drawn: ``images`` of them, labels taken in turn."""

    images: int
    steps: int = 20
    guidance: float = 1.0
    image_guidance: float | None = None
    scheduler: str = "ddim"
    seed: int = 2024


@dataclass(frozen=True)
class Quality:
    """One contestant's quality.

    Attributes:
        psnr: the likeness to FP32's images of the same noise, in decibels, 10 log10(4 / pixel_mse);
            None where there is no difference.
        ssim: the structural similarity to them (Wang et al., 2004), at most 1; None where they are
            smaller than its window.
        pixel_mse: the mean squared difference to them, pixels in [-1, 1].
        epsilon_mse: against FP32's predictions on FP32's trajectories, mean over each timestep
            bucket, [K]; None for a bucket never visited.
        judgement: what the model's judge says, where it has one.
    """

    psnr: float | None
    ssim: float | None
    pixel_mse: float
    epsilon_mse: list[float | None]
    judgement: Judgement | None = None

    def to_json(self) -> dict[str, Any]:
        """The quality as a JSON value, flat."""
        found = asdict(self)
        return found | (found.pop("judgement") or {})


def draw(
    model: DiffusionModel,
    denoise: Denoiser,
    options: SamplingOptions,
    progress: Progress = no_progress,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Draw the images to be judged, and their labels."""
    labels = np.arange(options.images) % model.labels
    images = sample_images(
        model,
        denoise,
        labels,
        scheduler=options.scheduler,
        steps=options.steps,
        guidance=options.guidance,
        image_guidance=options.image_guidance,
        seed=options.seed,
        progress=progress,
    )
    return images, labels


def evaluate_images(
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    fp32_images: NDArray[np.float32],
    epsilon_mse: list[float | None],
    judge: Judge | None = None,
) -> Quality:
    """Judge one contestant's images [N, C, H, W] in [-1, 1], asked for as ``labels`` [N], by how
    near they come to FP32's of the same noise, and by ``judge``.
    """
    mse = float(np.square(images - fp32_images).mean())
    return Quality(
        10 * math.log10(4 / mse) if mse > 0 else None,
        _ssim(images, fp32_images),
        mse,
        epsilon_mse,
        None if judge is None else judge(images, labels, fp32_images),
    )


def _ssim(images: NDArray[np.float32], others: NDArray[np.float32]) -> float | None:
    """The mean structural similarity of pairs of images [N, C, H, W] in [-1, 1]; None where they
    are smaller than its window.
    """
    if min(images.shape[2:]) < SSIM_WINDOW:
        return None
    # Its luminance term is a ratio of means: black must be 0, or middle greys would count as dark.
    pairs = zip(
        *(((torch.from_numpy(x) + 1) / 2).split(SSIM_BATCH) for x in (images, others)), strict=True
    )
    found: list[Any] = [
        structural_similarity_index_measure(one, other, data_range=1.0, reduction="none")
        for one, other in pairs
    ]
    return float(torch.cat(found).mean())


@torch.no_grad()
def epsilon_mse(
    denoise: Denoiser, trajectories: Trajectories, scheme: Scheme, rows: int | None = None
) -> list[float | None]:
    """The mean squared difference of predictions on recorded trajectories, per bucket [K]; None for
    a bucket never visited.

    Args:
        rows: how many rows run at once; all of a step where it is None.
    """
    sums, counts = np.zeros(scheme.buckets), np.zeros(scheme.buckets)
    samples = trajectories.sample.shape[1]
    for step, timestep in enumerate(trajectories.timestep.tolist()):
        inputs = trajectories.inputs(torch.full((samples,), step), torch.arange(samples))
        error = (
            (chunked(denoise, rows, **inputs) - trajectories.output[step]).square().mean().item()
        )
        bucket = scheme.bucket_of(timestep)
        sums[bucket] += error
        counts[bucket] += 1
    return [float(s / c) if c else None for s, c in zip(sums, counts, strict=True)]
