"""The models by name, and what a model must offer to go through the toolchain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from quest_deploy.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

MODEL_NAMES = ("tiny",)
IMPORTED = "imported"
"""What a checkpoint from `quest-deploy import` calls its model, which is no model of the registry's."""
IMPORTED_ALONE = (
    "an imported checkpoint comes without the rest of its model (sampler, conditions, decoder), which this command needs; "
    "export, reference, build-engine, verify and benchmark work on it"
)


class DiffusionModel(Protocol):
    """A diffusion model as the toolchain sees it.

    Attributes:
        name: its name in the registry.
        family: which of QuEST's layer sets applies (see ``quest_deploy.finetune.layer_sets``).
        sample_shape: the shape of one latent sample, without the batch.
        train_timesteps: the number of steps it was trained with.
        calibration_samples, calibration_steps: how many samplings, of how many steps, are recorded for it unless told otherwise.
    """

    name: str
    family: str
    sample_shape: tuple[int, ...]
    train_timesteps: int
    calibration_samples: int
    calibration_steps: int

    def load_unet(self) -> nn.Module:
        """The float model, FP32, in evaluation mode."""

    def load_scheduler(self, name: str, **overrides: Any) -> Any:
        """A new diffusers scheduler, its configuration the model's but for ``overrides``; raise InputError for an unknown name."""

    def draw_conditions(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Random conditions as the model meets them in use, the unconditional one included; each [count, ...]."""

    def conditions(self, labels: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """The conditions for ``labels`` [B], each [B, ...]; raise InputError for a label outside the model's range."""

    def null_conditions(self, count: int) -> dict[str, torch.Tensor]:
        """The unconditional conditions, each [count, ...]."""

    def images(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Decode latents [B, ...] to images [B, C, H, W] in [-1, 1]."""


def check_model_name(name: str) -> None:
    """Raise InputError where no model is called ``name``."""
    if name not in MODEL_NAMES:
        raise InputError(f"unknown model {name!r}: expected one of {', '.join(MODEL_NAMES)}")


def load_model(name: str) -> DiffusionModel:
    """The model called ``name``; raise InputError where there is none."""
    if name == IMPORTED:
        raise InputError(IMPORTED_ALONE)
    check_model_name(name)
    from quest_deploy.models.tiny import TinyModel

    return TinyModel()
