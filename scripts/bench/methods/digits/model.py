"""A class-conditional latent-diffusion UNet of 16x16 digits.

It has Stable Diffusion's block topology (cross-attention down and up blocks, skip concatenations,
GEGLU) at 1/600 of its size. ``make.py`` trains it from nothing; its weights lie in ``assets/``.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from quest_deploy.errors import InputError
from quest_deploy.files import read_json
from quest_deploy.models.schedulers import make_scheduler

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import nn


ASSETS = Path(__file__).parent / "assets"
NULL_CLASS = 10
"""The class of no class: the unconditional half of classifier-free guidance."""
TOKENS = 4
IMAGE_SIZE = 16
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SCHEDULER_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}


class DigitsModel:
    """The model as the toolchain sees it: see
    :class:`quest_deploy.models.registry.DiffusionModel`.
    """

    name = "tiny"
    family = "class-conditional"
    sample_shape: tuple[int, ...] = (4, 8, 8)
    train_timesteps = 1000
    labels = NULL_CLASS
    guidance = 1.0
    image_guidance: float | None = None
    calibration_samples = 512
    calibration_steps = 20
    forward_rows: int | None = 250
    # Fewer, smaller batches than the defaults, at twice the rates: nearly as good, in a third of
    # the time.
    finetuning: Mapping[str, Any] = MappingProxyType(
        {
            "temporal_steps": 60,
            "sensitive_steps": 340,
            "batch": 16,
            "weight_rate": 2e-3,
            "scale_rate": 1e-2,
        }
    )
    # Its operations are too small to share: two threads are no faster than one, and far slower
    # where other work takes a core.
    finetuning_threads: int | None = 1
    asked_for: Literal["prompt", "label"] | None = "label"
    evaluation_images = 1000

    def load_unet(self) -> nn.Module:
        """The FP32 UNet: sample [B, 4, 8, 8], timestep [B], encoder_hidden_states [B, 4, 32] ->
        epsilon [B, 4, 8, 8].
        """
        unet: nn.Module = UNet2DConditionModel.from_pretrained(
            ASSETS / "unet", torch_dtype=torch.float32
        )
        return unet.eval()

    def load_scheduler(self, name: str, **overrides: Any) -> Any:
        return make_scheduler(name, {**self.scheduler_config(), **overrides})

    def scheduler_config(self) -> dict[str, Any]:
        config: dict[str, Any] = read_json(ASSETS / "scheduler" / "scheduler_config.json")
        return config

    def draw_conditions(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return self._embed(torch.randint(NULL_CLASS + 1, (count,), generator=generator))

    def conditions(self, labels: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        if labels.size and not (labels.min() >= 0 and labels.max() < NULL_CLASS):
            raise InputError(f"labels must be digits 0 to 9, found {sorted(set(labels.tolist()))}")
        return self._embed(torch.from_numpy(labels))

    def null_conditions(self, count: int) -> dict[str, torch.Tensor]:
        return self._embed(torch.full((count,), NULL_CLASS))

    def images(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Undo the lossless 2x2 pixel unshuffle: [B, 4, 8, 8] -> [B, 1, 16, 16], clipped to [-1,
        1].
        """
        batch, _, height, width = latents.shape
        pixels = (
            latents.reshape(batch, 2, 2, height, width)
            .transpose(0, 3, 1, 4, 2)
            .reshape(batch, 1, 2 * height, 2 * width)
        )
        return np.clip(pixels, -1.0, 1.0)

    def _embed(self, classes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Four tokens a class: encoder_hidden_states, float32 [B, 4, 32]."""
        table = load_file(ASSETS / "class_embedding.safetensors")["weight"].float()
        return {"encoder_hidden_states": table[classes].unflatten(1, (TOKENS, -1))}


def latents_from_images(images: torch.Tensor) -> torch.Tensor:
    """The lossless "VAE": a 2x2 pixel unshuffle, [B, 1, 16, 16] -> [B, 4, 8, 8]."""
    return F.pixel_unshuffle(images, 2)
