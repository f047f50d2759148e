from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.calibration.trajectories import record_trajectories
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.registry import MODEL_NAMES, check_model_name
from quest_deploy.models.schedulers import SCHEDULERS
from quest_deploy.models.tiny import ASSETS, NULL_CLASS, latents_from_images
from tests.helpers import refused

if TYPE_CHECKING:
    from quest_deploy.models.tiny import TinyModel


def test_the_registry_knows_the_embedded_model_and_refuses_others() -> None:
    assert "tiny" in MODEL_NAMES
    assert load_model(resolve_source("tiny")).name == "tiny"
    for look_up in (check_model_name, resolve_source):
        with refused("'sd99'", "tiny", "sd14", "diffusers"):
            look_up("sd99")


def test_its_weights_are_safetensors_of_at_most_4_mb() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert {path.suffix for path in files} == {".safetensors", ".json"}


def test_the_unet_predicts_float32_in_the_samples_shape(tiny: TinyModel) -> None:
    unet = tiny.load_unet()
    assert not unet.training
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    sample = torch.randn(2, *tiny.sample_shape)
    output = unet(
        sample, torch.tensor([1.0, 900.0]), **tiny.conditions(np.asarray([3, 4])), return_dict=False
    )[0]
    assert output.shape == sample.shape


def test_decoding_undoes_the_pixel_unshuffle(tiny: TinyModel) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (3, 1, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(
        tiny.images(latents_from_images(torch.from_numpy(images)).numpy()), images
    )


def test_decoded_images_are_clipped(tiny: TinyModel) -> None:
    assert np.abs(tiny.images(np.full((1, 4, 8, 8), 7, np.float32))).max() == 1


def test_each_class_has_conditions_of_its_own_and_none_too(tiny: TinyModel) -> None:
    states = tiny.conditions(np.arange(10))["encoder_hidden_states"]
    null = tiny.null_conditions(1)["encoder_hidden_states"]
    assert states.shape == (10, 4, 32)
    assert len(torch.cat([states, null]).flatten(1).unique(dim=0)) == 11


@pytest.mark.parametrize("label", [-1, NULL_CLASS, 99])
def test_a_label_that_is_no_digit_is_refused(tiny: TinyModel, label: int) -> None:
    with refused(0, 9, label):
        tiny.conditions(np.asarray([3, label]))


def test_random_conditions_include_the_unconditional_one_and_depend_on_the_generator_alone(
    tiny: TinyModel,
) -> None:
    drawn, again = (
        tiny.draw_conditions(200, torch.Generator().manual_seed(0))["encoder_hidden_states"]
        for _ in range(2)
    )
    assert torch.equal(drawn, again)
    assert len(drawn.flatten(1).unique(dim=0)) == 11


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_has_the_models_own_noise_schedule(tiny: TinyModel, name: str) -> None:
    config = tiny.load_scheduler(name).config
    assert (config.num_train_timesteps, config.beta_start, config.beta_end) == (1000, 1e-4, 0.02)
    assert config.prediction_type == "epsilon"


@pytest.mark.parametrize("buckets", [1, 3, 20, 21, 300, 999, 1000])
def test_trajectories_visit_every_bucket_of_any_number_from_1_to_the_training_steps(
    tiny: TinyModel, buckets: int
) -> None:
    scheme = Scheme.parse("w4a4", buckets=buckets)

    def unet(
        sample: torch.Tensor, timestep: torch.Tensor, **conditions: object
    ) -> tuple[torch.Tensor]:
        return (torch.zeros_like(sample),)

    recorded = record_trajectories(tiny, unet, steps=20, samples=1, seed=0, scheme=scheme)  # type: ignore[arg-type]
    timesteps = recorded.timestep.tolist()
    assert {scheme.bucket_of(t) for t in timesteps} == set(range(buckets))
    assert timesteps == sorted(timesteps, reverse=True)
    assert all(0 <= t < 1000 for t in timesteps)
