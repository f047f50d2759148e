"""The denoising loop, around anything that predicts like the UNet: a torch model or an engine."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from quest_deploy.calibration.trajectories import chunked
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.models.channels import IMAGE_CONDITION, for_scheduler, guidance_of, joined
from quest_deploy.models.schedulers import first_scale, scaled_input, set_steps
from quest_deploy.progress import no_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from quest_deploy.models.registry import DiffusionModel
    from quest_deploy.progress import Progress


class Denoiser(Protocol):
    """Predicts for sample [B, ...] at timestep [B] under conditions [B, ...]."""

    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """The prediction, float32 [B, ...]."""


@torch.no_grad()
def sample_images(
    model: DiffusionModel,
    denoise: Denoiser,
    labels: NDArray[np.int64],
    *,
    scheduler: str = "ddim",
    steps: int = 20,
    guidance: float = 1.0,
    image_guidance: float | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> NDArray[np.float32]:
    """Draw one image per label; the noise depends on ``seed`` alone, so two denoisers can be
    compared image by image.

    Labels are what :class:`quest_deploy.models.registry.DiffusionModel` calls so.

    Args:
        labels: int64 [B].
        guidance: the guidance weight; where it is classifier-free and above 1, both halves run as
            one batch.
        image_guidance: the weight of the image that is edited, the model's where it is None.

    Returns:
        Images [B, C, H, W] in [-1, 1].
    """
    if not (math.isfinite(guidance) and guidance >= 0):
        raise InputError(f"expected a guidance weight of 0 or more, not {guidance}")
    generator = torch.Generator().manual_seed(seed)
    schedule = model.load_scheduler(scheduler)
    set_steps(schedule, steps)
    guide = guidance_of(model, guidance, image_guidance)
    asked = model.conditions(labels)
    parts = guide.parts(asked, model.null_conditions(len(labels)) if guide.guided else None)
    conditions = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    image = conditions.pop(IMAGE_CONDITION, None)
    channels = model.sample_shape[0]
    latents = torch.randn(len(labels), *model.sample_shape, generator=generator) * first_scale(
        schedule
    )
    # Not all schedulers take a generator; those that add noise need one.
    takes_generator = "generator" in inspect.signature(schedule.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    for i, timestep in enumerate(schedule.timesteps):
        scaled = scaled_input(schedule, latents, timestep)
        batch = joined(scaled.repeat(len(parts), 1, 1, 1), image)
        prediction = chunked(
            denoise,
            model.forward_rows,
            batch,
            timestep=timestep.float().expand(len(batch)),
            **conditions,
        )
        guided = guide.combine(list(prediction.chunk(len(parts))), channels)
        taken = for_scheduler(schedule, guided, channels)
        latents = schedule.step(taken, timestep, latents, **extra).prev_sample
        if not torch.isfinite(latents).all():
            raise QuestDeployError(
                f"the latents are not finite after step {i + 1} of {len(schedule.timesteps)}"
            )
        progress("denoising", i + 1, len(schedule.timesteps))
    return model.images(latents.float().numpy())


def float_denoiser(unet: nn.Module) -> Denoiser:
    """A diffusers UNet as a denoiser."""

    def denoise(sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        prediction: Tensor = unet(sample, timestep, **conditions, return_dict=False)[0]
        return prediction

    return denoise
