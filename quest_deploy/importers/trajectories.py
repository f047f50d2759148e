"""Inputs for an imported model: its own float sampling, from noise, under random conditions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.progress import no_progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quest_deploy.importers.read import OfficialCheckpoint
    from quest_deploy.progress import Progress

QDIFF_STEPS = 20


def random_inputs(official: OfficialCheckpoint, samples: int, seed: int) -> dict[str, Tensor]:
    """Inputs of the diffusers model: noise, each sample with a timestep of its own."""
    config, generator = official.config, torch.Generator().manual_seed(seed)
    size = (config.in_channels, config.image_size, config.image_size)
    inputs = {
        "sample": torch.randn(samples, *size, generator=generator),
        "timestep": torch.rand(samples, generator=generator) * config.train_timesteps,
    }
    if config.context_dim is not None:
        inputs["encoder_hidden_states"] = torch.randn(
            samples, official.context_tokens or 1, config.context_dim, generator=generator
        )
    return inputs


@torch.no_grad()
def record_imported(
    official: OfficialCheckpoint,
    unet: nn.Module,
    *,
    samples: int,
    seed: int,
    progress: Progress = no_progress,
) -> Trajectories:
    """Sample with DDIM at the calibrated timesteps (QDIFF_STEPS even ones where all share a scale)
    and record every step.

    The conditions are standard normal noise: an official checkpoint comes without its text encoder
    or class embedding.
    """
    config = official.config
    even = tuple(
        config.train_timesteps * (i + 0.5) // QDIFF_STEPS for i in reversed(range(QDIFF_STEPS))
    )
    timesteps = torch.tensor(official.settings.timesteps or even)
    conditions = random_inputs(official, samples, seed)
    sample = conditions.pop("sample")
    del conditions["timestep"]
    # The LDM "linear" schedule is linear in the root of beta.
    start, end = (beta**0.5 for beta in config.betas)
    kept = (
        1 - torch.linspace(start, end, config.train_timesteps, dtype=torch.float64) ** 2
    ).cumprod(0)
    signal = [*kept[timesteps.long()].tolist(), kept[0].item()]
    inputs, outputs = [], []
    for i, timestep in enumerate(timesteps):
        noise = unet(sample, timestep.expand(samples), **conditions, return_dict=False)[0]
        inputs.append(sample)
        outputs.append(noise)
        clean = (sample - (1 - signal[i]) ** 0.5 * noise) / signal[i] ** 0.5
        sample = signal[i + 1] ** 0.5 * clean + (1 - signal[i + 1]) ** 0.5 * noise
        progress("recording trajectories", i + 1, len(timesteps))
    return Trajectories(torch.stack(inputs), timesteps, torch.stack(outputs), conditions)
