from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from quest_deploy.evaluation.retrieval import Judge
from quest_deploy.evaluation.sampling import Denoiser, float_denoiser, sample_images
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.schedulers import SCHEDULERS
from tests.helpers import refused

LABELS = np.arange(3)


class Recorder:
    """A denoiser that predicts nothing, or a constant for each half, and keeps what it was called
    with.
    """

    def __init__(self, halves: tuple[float, float] = (0.0, 0.0)) -> None:
        self.halves = halves
        self.calls: list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []

    def __call__(
        self, sample: torch.Tensor, timestep: torch.Tensor, **conditions: torch.Tensor
    ) -> torch.Tensor:
        self.calls.append((sample, timestep, conditions))
        first, second = (
            torch.full_like(half, value)
            for half, value in zip(sample.chunk(2), self.halves, strict=True)
        )
        return torch.cat([first, second])


@pytest.fixture(scope="module")
def unet(emoji: PipelineModel) -> Denoiser:
    return float_denoiser(emoji.load_unet())


def test_the_same_seed_draws_the_same_images_and_another_seed_others(
    emoji: PipelineModel, unet: Denoiser
) -> None:
    first, again, other = (
        sample_images(emoji, unet, LABELS, steps=2, seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_the_noise_of_every_scheduler_is_of_the_seed(
    emoji: PipelineModel, unet: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    sde = emoji.load_scheduler("dpm++", algorithm_type="sde-dpmsolver++").config
    monkeypatch.setattr(
        type(emoji), "load_scheduler", lambda *_: DPMSolverMultistepScheduler.from_config(sde)
    )
    first, again, other = (
        sample_images(emoji, unet, LABELS, steps=4, scheduler="dpm++", seed=seed)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_the_noise_is_the_same_whatever_denoises(emoji: PipelineModel) -> None:
    one, two = Recorder(), Recorder((1.0, -1.0))
    for denoise in (one, two):
        sample_images(emoji, denoise, np.arange(4), steps=2, seed=3)
    assert torch.equal(one.calls[0][0], two.calls[0][0])


def test_every_sample_gets_the_timestep_as_a_float(emoji: PipelineModel) -> None:
    denoise = Recorder()
    sample_images(emoji, denoise, np.arange(4), steps=5)
    assert [call[1].tolist() for call in denoise.calls] == [
        [float(t)] * 4 for t in (801, 601, 401, 201, 1)
    ]
    assert all(call[1].dtype is torch.float32 for call in denoise.calls)


def test_guidance_runs_both_halves_as_one_batch_with_the_unconditional_one_first(
    emoji: PipelineModel,
) -> None:
    denoise = Recorder()
    sample_images(emoji, denoise, LABELS, steps=2, guidance=3.0)
    assert [len(call[0]) for call in denoise.calls] == [6, 6]
    sample, timestep, conditions = denoise.calls[0]
    assert torch.equal(sample[:3], sample[3:])
    assert len(timestep) == 6
    states = conditions["encoder_hidden_states"]
    assert torch.equal(states[:3], emoji.null_conditions(3)["encoder_hidden_states"])
    assert torch.equal(states[3:], emoji.conditions(LABELS)["encoder_hidden_states"])


def test_without_guidance_only_the_conditional_half_runs(emoji: PipelineModel) -> None:
    denoise = Recorder()
    sample_images(emoji, denoise, np.arange(4), steps=1, guidance=1.0)
    assert torch.equal(
        denoise.calls[0][2]["encoder_hidden_states"],
        emoji.conditions(np.arange(4))["encoder_hidden_states"],
    )


def test_guidance_extrapolates_from_the_unconditional_to_the_conditional_prediction(
    emoji: PipelineModel,
) -> None:
    guided = sample_images(emoji, Recorder((0.1, 0.2)), np.arange(4), steps=2, guidance=3.0)
    constant = sample_images(
        emoji, Recorder((0.4, 0.4)), np.arange(4), steps=2
    )  # 0.1 + 3 (0.2 - 0.1)
    np.testing.assert_allclose(guided, constant, atol=1e-5)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws_the_prompts_asked_for(
    emoji: PipelineModel, unet: Denoiser, scheduler: str
) -> None:
    labels, done = np.arange(24), []
    images = sample_images(
        emoji,
        unet,
        labels,
        scheduler=scheduler,
        steps=10,
        guidance=4.0,
        progress=lambda phase, step, total: done.append((step, total)),
    )
    assert images.shape == (24, 3, 64, 64)
    assert np.abs(images).max() <= 1
    assert emoji.judge_folder is not None
    # By chance, 0.3% are among the five nearest of 1,633; PNDM in ten steps has 12.5%, DDIM 75%.
    assert Judge(emoji.judge_folder)(images, labels, images).top5 >= 0.1
    assert done == [(i + 1, len(done)) for i in range(len(done))]
    assert len(done) >= 10


def test_an_unknown_scheduler_is_an_input_error_that_lists_the_known_ones(
    emoji: PipelineModel,
) -> None:
    with refused("'heun'", "ddim", "ddpm"):
        sample_images(emoji, Recorder(), LABELS, scheduler="heun")
