"""A diffusers pipeline as a model: its UNet, its conditions, and what is recorded of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quest_deploy.artifacts.model_source import ModelSource
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.calibration.trajectories import record_trajectories
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from tests.helpers import refused
from tests.pipelines import CLASSES, PIPELINES, TEXT_WIDTH, TWO_LEVELS, text_to_image, with_tiny_vae

FAMILIES = {
    "sd": "text-to-image",
    "sd-v": "text-to-image",
    "sdxl": "text-to-image",
    "ldm": "unconditional",
    "class-tokens": "class-conditional",
    "class-labels": "unconditional",
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def recast(folder: Path, **changes: Any) -> Path:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("name", "given", "drawn"),
    [
        ("sd", "StableDiffusionImg2ImgPipeline", "StableDiffusionPipeline"),
        ("sd", "LatentConsistencyModelImg2ImgPipeline", "LatentConsistencyModelPipeline"),
        ("sdxl", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPipeline"),
    ],
)
def test_an_image_to_image_pipeline_is_drawn_by_its_text_to_image_class(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str, given: str, drawn: str
) -> None:
    folder = recast(shutil.copytree(pipelines(name), tmp_path / "m"), _class_name=given)
    if name == "sdxl":
        recast(folder, requires_aesthetics_score=False)
    model = load_model(resolve_source(str(folder)))
    assert isinstance(model, PipelineModel)
    pipeline = model.load_pipeline(unet=model.load_unet())
    assert type(pipeline).__name__ == drawn


def test_parts_of_the_safety_checker_that_are_missing_are_left_out_with_it(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = recast(
        shutil.copytree(pipelines("sd"), tmp_path / "m"),
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
    )
    model = load_model(resolve_source(str(folder)))
    assert isinstance(model, PipelineModel)
    pipeline = model.load_pipeline(unet=model.load_unet())
    assert (pipeline.safety_checker, pipeline.feature_extractor) == (None, None)


def test_a_tiny_decoder_of_sdxl_says_its_levels_by_its_own_channels(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = with_tiny_vae(pipelines("sdxl"), tmp_path / "m")
    model = load_model(resolve_source(str(folder)))
    assert isinstance(model, PipelineModel)
    assert model.image_size == (32, 32)
    assert model.images(np.ones((1, 4, 8, 8), np.float32)).shape == (1, 3, 32, 32)
    assert model.conditions(np.asarray([0]))["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]


def test_a_level_without_transformer_layers_is_loaded(tmp_path: Path) -> None:
    depths = {**TWO_LEVELS, "transformer_layers_per_block": (0, 1)}
    model = load_model(resolve_source(str(text_to_image(tmp_path / "m", **depths))))
    assert isinstance(model, PipelineModel)
    assert model.load_unet().config.transformer_layers_per_block == [0, 1]


def test_a_folder_called_like_the_embedded_model_takes_prompts(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(pipelines("sd"), tmp_path / "emoji")
    assert load_model(resolve_source(str(folder)), ["a cat", "a dog"]).labels == 2


@pytest.mark.parametrize(
    ("kind", "needed", "parts"),
    [
        ("StableDiffusionControlNetPipeline", "controlnet", {}),
        ("StableDiffusionUpscalePipeline", "image", {}),
        ("StableDiffusionDepth2ImgPipeline", "depth_estimator", {}),
        ("StableDiffusionAttendAndExcitePipeline", "token_indices", {}),
        ("LDMTextToImagePipeline", "bert", {"bert": ["latent_diffusion", "LDMBertModel"]}),
        ("FluxPipeline", "UNet", {"unet": [None, None]}),
        ("OfAnotherLibrary", "UNet", {"unet": [None, None]}),
    ],
)
def test_a_pipeline_that_needs_more_than_is_given_here_is_refused_by_its_class(
    pipelines: Callable[[str], Path], tmp_path: Path, kind: str, needed: str, parts: dict[str, Any]
) -> None:
    folder = shutil.copytree(pipelines("sd"), tmp_path / "m")
    shutil.rmtree(folder / "unet")  # the class is named before a file is missed
    with refused(kind, needed):
        load_model(resolve_source(str(recast(folder, _class_name=kind, **parts))))


@torch.no_grad()
def test_a_folder_called_like_a_known_model_has_the_heads_of_its_configuration(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    from diffusers import UNet2DModel

    folder = shutil.copytree(pipelines("ldm"), tmp_path / "ldm-church")
    theirs: Any = UNet2DModel.from_pretrained(folder / "unet")
    sample = torch.randn(1, 3, 8, 8, generator=seeded())
    ours = load_model(resolve_source(str(folder))).load_unet()
    assert torch.equal(ours(sample, 5).sample, theirs.eval()(sample, 5).sample)


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
@torch.no_grad()
def test_every_family_predicts_in_the_samples_shape_and_decodes_to_pixels(
    models: Callable[[str], PipelineModel], name: str, family: str
) -> None:
    model = models(name)
    assert model.family == family
    sample = torch.randn(3, *model.sample_shape, generator=seeded())
    output = model.load_unet()(
        sample,
        torch.tensor([1.0, 500.0, 990.0]),
        **model.draw_conditions(3, seeded()),
        return_dict=False,
    )[0]
    assert output.shape == sample.shape
    images = model.images(sample.numpy())
    assert images.shape == (3, 3, 16, 16)
    assert np.abs(images).max() <= 1


@torch.no_grad()
def test_sdxls_flat_conditions_mean_what_diffusers_packs(
    pipelines: Callable[[str], Path], models: Callable[[str], PipelineModel]
) -> None:
    from diffusers import UNet2DConditionModel

    model, theirs = models("sdxl"), UNet2DConditionModel.from_pretrained(pipelines("sdxl") / "unet")
    unet, inputs = model.load_unet(), model.draw_conditions(2, seeded())
    assert unet.state_dict().keys() == theirs.state_dict().keys()
    sample, timestep = (
        torch.randn(2, *model.sample_shape, generator=seeded()),
        torch.tensor([10.0, 700.0]),
    )
    added = {name: inputs[name] for name in ("text_embeds", "time_ids")}
    expected = theirs(
        sample,
        timestep,
        inputs["encoder_hidden_states"],
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    assert torch.equal(unet(sample, timestep, **inputs, return_dict=False)[0], expected)
    other = {**inputs, "time_ids": inputs["time_ids"] + 100}
    assert not torch.equal(unet(sample, timestep, **other, return_dict=False)[0], expected)


@torch.no_grad()
def test_class_labels_mean_what_diffusers_embeds(
    pipelines: Callable[[str], Path], models: Callable[[str], PipelineModel]
) -> None:
    from diffusers import UNet2DModel

    model, theirs = (
        models("class-labels"),
        UNet2DModel.from_pretrained(pipelines("class-labels") / "unet"),
    )
    sample, timestep = (
        torch.randn(2, *model.sample_shape, generator=seeded()),
        torch.tensor([10.0, 700.0]),
    )
    expected = theirs(sample, timestep, torch.tensor([3, 0]), return_dict=False)[0]
    assert torch.equal(
        model.load_unet()(
            sample, timestep, **model.conditions(np.asarray([3, 0])), return_dict=False
        )[0],
        expected,
    )


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_prompts_are_encoded_as_the_pipeline_itself_does(
    pipelines: Callable[[str], Path], name: str
) -> None:
    from diffusers import DiffusionPipeline

    model = load_model(resolve_source(str(pipelines(name))), ["a cat", "a red dog"])
    theirs = DiffusionPipeline.from_pretrained(pipelines(name))
    with torch.no_grad():
        encoded = theirs.encode_prompt(
            prompt=["a red dog"],
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
    states, null = model.conditions(np.asarray([1])), model.null_conditions(1)
    torch.testing.assert_close(states["encoder_hidden_states"], encoded[0])
    torch.testing.assert_close(null["encoder_hidden_states"], encoded[1])
    if name == "sdxl":
        torch.testing.assert_close(states["text_embeds"], encoded[2])
        assert states["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]


def test_every_prompt_is_drawn_before_one_is_drawn_again(pipelines: Callable[[str], Path]) -> None:
    model = load_model(resolve_source(str(pipelines("sd"))), ["a cat", "a dog", "a house"])
    drawn = model.draw_conditions(6, seeded())["encoder_hidden_states"].flatten(1)
    assert len(drawn[:3].unique(dim=0)) == len(drawn[3:].unique(dim=0)) == 3


@pytest.mark.parametrize("name", ["ldm", "class-tokens"])
def test_prompts_are_for_text_to_image_models(pipelines: Callable[[str], Path], name: str) -> None:
    with refused("--prompts", name):
        load_model(resolve_source(str(pipelines(name))), ["a cat"])


def test_a_class_is_its_tables_row_and_no_class_the_last(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("class-tokens")
    states = model.conditions(np.arange(CLASSES))["encoder_hidden_states"]
    null = model.null_conditions(2)["encoder_hidden_states"]
    assert states.shape == (CLASSES, 1, TEXT_WIDTH)
    assert null.shape == (2, 1, TEXT_WIDTH)
    assert len(torch.cat([states, null]).flatten(1).unique(dim=0)) == CLASSES + 1
    with refused("labels", CLASSES - 1, [CLASSES]):
        model.conditions(np.asarray([CLASSES]))


@pytest.mark.parametrize("name", ["ldm", "class-labels"])
def test_a_model_without_an_unconditional_condition_refuses_guidance(
    models: Callable[[str], PipelineModel], name: str
) -> None:
    model = models(name)
    assert model.guidance == 1
    with refused("guidance", 1):
        record_trajectories(model, model.load_unet(), steps=1, samples=2, seed=0, guidance=3.0)


@torch.no_grad()
def test_both_halves_of_guidance_are_recorded_along_the_guided_trajectory(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("sd")
    unet, scheme = model.load_unet(), Scheme.parse("w4a4", buckets=3)
    recorded = record_trajectories(
        model, unet, steps=3, samples=2, seed=0, scheme=scheme, guidance=3.0, rows=3
    )
    assert recorded.sample.shape == (3, 4, *model.sample_shape)
    assert torch.equal(recorded.sample[:, 0::2], recorded.sample[:, 1::2])
    states = recorded.conditions["encoder_hidden_states"]
    assert torch.equal(states[0::2], model.null_conditions(2)["encoder_hidden_states"])
    expected = unet(recorded.sample[1], recorded.timestep[1], states, return_dict=False)[0]
    torch.testing.assert_close(recorded.output[1], expected, rtol=1e-5, atol=1e-6)
    scheduler = model.load_scheduler("ddim")
    scheduler.set_timesteps(3)
    null, conditional = recorded.output[0, 0::2], recorded.output[0, 1::2]
    following = scheduler.step(
        null + 3.0 * (conditional - null), scheduler.timesteps[0], recorded.sample[0, 0::2]
    ).prev_sample
    torch.testing.assert_close(recorded.sample[1, 0::2], following, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PIPELINES)
def test_random_weights_need_nothing_of_the_folder_but_its_configurations(
    pipelines: Callable[[str], Path], name: str
) -> None:
    model = load_model(ModelSource(name, str(pipelines(name)), random_weights=True))
    conditions = model.draw_conditions(2, seeded())
    assert {key: value.shape[1:] for key, value in conditions.items()}.keys() == FLAT.get(
        name, {"encoder_hidden_states"}
    )
    with refused(name, "random", "draw"):
        model.images(np.zeros((1, *model.sample_shape), np.float32))


XL = {"encoder_hidden_states", "text_embeds", "time_ids"}
FLAT = {
    "ldm": set(),
    "learned-variance": set(),
    "class-labels": {"class_labels"},
    "sdxl": XL,
    "controlled-xl": XL,
    "controlled-inpaint": {"encoder_hidden_states", "image_condition"},
    "inpaint": {"encoder_hidden_states", "image_condition"},
    "pix2pix": {"encoder_hidden_states", "image_condition"},
    "inpaint-xl": {*XL, "image_condition"},
    "pix2pix-xl": {*XL, "image_condition"},
}


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (
            {"_class_name": "DiTTransformer2DModel"},
            "UNet2DConditionModel UNet2DModel DiTTransformer2DModel",
        ),
        ({"time_cond_proj_dim": 32}, "time_cond_proj_dim"),
        ({"addition_embed_type": "image"}, "addition_embed_type"),
    ],
)
def test_a_unet_that_takes_other_conditions_is_refused(
    pipelines: Callable[[str], Path], tmp_path: Path, change: dict[str, Any], facts: str
) -> None:
    import json
    import shutil

    shutil.copytree(pipelines("sd"), tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with refused(*facts.split()):
        load_model(resolve_source(str(tmp_path / "model")))
