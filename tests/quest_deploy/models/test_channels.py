"""UNets whose channels in and out differ: what is inpainted or edited, and a learned variance;
diffusers' own pipelines are the oracle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quest_deploy.artifacts.image_folder import ImageFolder
from quest_deploy.artifacts.model_source import ModelSource
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.calibration.trajectories import record_trajectories
from quest_deploy.evaluation.sampling import float_denoiser, sample_images
from quest_deploy.models.channels import IMAGE_CONDITION, Channels, Guidance, channels_of
from quest_deploy.models.image_inputs import ImageInput, made_image, read_image, resized
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.schedulers import SCHEDULERS
from tests.helpers import refused
from tests.quest_deploy.support import cli

PROMPTS = ["a red cat", "a photo of a dog"]
STEPS, SEED = 4, 5


@pytest.fixture
def pictures(tmp_path: Path) -> ImageFolder:
    """Two images with their masks."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(2):
        save(made_image(10 + i, 24, 20), folder / f"{i}.png", folder / f"{i}-mask.png")
    return ImageFolder.of(folder)


@pytest.fixture
def unmasked(pictures: ImageFolder) -> ImageFolder:
    """The same without masks."""
    for path in pictures.files():
        if path.stem.endswith("-mask"):
            path.unlink()
    return ImageFolder.of(pictures.path)


def save(made: ImageInput, image: Path, mask: Path) -> None:
    assert made.mask is not None
    made.image.save(image)
    made.mask.save(mask)


def loaded(
    folder: Path, images: ImageFolder | None = None, prompts: list[str] | None = PROMPTS
) -> PipelineModel:
    model = load_model(resolve_source(str(folder)), prompts, images)
    assert isinstance(model, PipelineModel)
    return model


def of_diffusers(model: PipelineModel, scheduler: str) -> Any:
    """Diffusers' own pipeline, loaded by diffusers itself."""
    made = model.pipeline_class().from_pretrained(model.folder)
    made.set_progress_bar_config(disable=True)
    made.scheduler = model.load_scheduler(scheduler)
    return made


def noise(model: PipelineModel, generator: torch.Generator | None = None) -> torch.Tensor:
    generator = generator or torch.Generator().manual_seed(SEED)
    return torch.randn(1, *model.sample_shape, generator=generator)


def drawn(model: PipelineModel, scheduler: str = "ddim", **weights: float) -> Any:
    """What the float model makes of the second prompt and the second image, [1, H, W, 3] in [0,
    1].
    """
    denoise, second = float_denoiser(model.load_unet()), np.asarray([1])
    settings: dict[str, Any] = {"scheduler": scheduler, "steps": STEPS, "seed": SEED, **weights}
    return sample_images(model, denoise, second, **settings).transpose(0, 2, 3, 1) / 2 + 0.5


def assert_same(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert expected.std() > 0.01


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
@pytest.mark.parametrize("name", ["inpaint", "inpaint-xl"])
def test_what_is_inpainted_is_what_diffusers_pipeline_inpaints(
    pipelines: Callable[[str], Path], pictures: ImageFolder, name: str, scheduler: str
) -> None:
    model = loaded(pipelines(name), pictures)
    of_path = {path.stem: read_image(path) for path in pictures.files()}
    made = of_diffusers(model, scheduler)
    expected = [
        made(
            PROMPTS[1],
            image=of_path["1"],
            mask_image=mask,
            guidance_scale=4.0,
            strength=1.0,
            num_inference_steps=STEPS,
            latents=noise(model),
            generator=torch.Generator().manual_seed(1),  # with which the second image is encoded
            output_type="np",
        ).images
        for mask in (of_path["1-mask"], of_path["0-mask"])
    ]
    found = drawn(model, scheduler, guidance=4.0)
    assert_same(found, expected[0])
    assert np.abs(found - expected[1]).max() > 0.01  # the mask counts


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 2.0])
def test_a_guidance_of_1_or_less_is_none_as_in_diffusers_pipeline(
    pipelines: Callable[[str], Path], guidance: float
) -> None:
    model = loaded(pipelines("sd"))
    expected = of_diffusers(model, "ddim")(
        PROMPTS[1],
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        latents=noise(model),
        output_type="np",
    ).images
    assert_same(drawn(model, guidance=guidance), expected)
    recorded = record_trajectories(
        model, model.load_unet(), steps=1, samples=1, seed=0, guidance=guidance
    )
    assert recorded.sample.shape[1] == (2 if guidance > 1 else 1)


@pytest.mark.parametrize(("guidance", "image_guidance"), [(4.0, 1.5), (6.0, 3.0), (1.0, 2.0)])
@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
@pytest.mark.parametrize("name", ["pix2pix", "pix2pix-xl"])
def test_what_is_edited_is_what_diffusers_pipeline_edits(
    pipelines: Callable[[str], Path],
    unmasked: ImageFolder,
    name: str,
    scheduler: str,
    guidance: float,
    image_guidance: float,
) -> None:
    model = loaded(pipelines(name), unmasked)
    image = resized(read_image(unmasked.files()[1]), model.image_size)
    expected = of_diffusers(model, scheduler)(
        PROMPTS[1],
        image=image,
        guidance_scale=guidance,
        image_guidance_scale=image_guidance,
        num_inference_steps=STEPS,
        latents=noise(model),
        output_type="np",
    ).images
    assert_same(drawn(model, scheduler, guidance=guidance, image_guidance=image_guidance), expected)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_learned_variance_is_for_ddpm_and_the_mean_for_all(
    pipelines: Callable[[str], Path], scheduler: str
) -> None:
    import diffusers

    model = loaded(pipelines("learned-variance"), prompts=None)
    unet = model.load_unet()
    config = model.scheduler_config()
    theirs = getattr(diffusers, SCHEDULERS[scheduler]).from_config(
        config if scheduler == "ddpm" else {**config, "variance_type": None}
    )
    theirs.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(SEED)
    sample = noise(model, generator) * theirs.init_noise_sigma
    extra = {"generator": generator} if scheduler in ("ddpm", "lcm") else {}
    with torch.no_grad():
        for t in theirs.timesteps:
            output = unet(theirs.scale_model_input(sample, t), t, return_dict=False)[0]
            assert output.shape[1] == 6
            given = output if scheduler == "ddpm" else output[:, :3]
            sample = theirs.step(given, t, sample, **extra).prev_sample
    expected = sample.clamp(-1, 1).numpy().transpose(0, 2, 3, 1) / 2 + 0.5
    settings: dict[str, Any] = {"scheduler": scheduler, "steps": STEPS, "seed": SEED}
    found = sample_images(model, float_denoiser(unet), np.asarray([0]), **settings)
    assert_same(found.transpose(0, 2, 3, 1) / 2 + 0.5, expected)


def test_diffusers_own_pipeline_draws_the_same_with_a_learned_variance(
    pipelines: Callable[[str], Path],
) -> None:
    from diffusers import DDPMPipeline

    model = loaded(pipelines("learned-variance"), prompts=None)
    made = DDPMPipeline.from_pretrained(model.folder)
    made.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    expected = made(generator=generator, num_inference_steps=STEPS, output_type="np").images
    settings: dict[str, Any] = {"scheduler": "ddpm", "steps": STEPS, "seed": SEED}
    found = sample_images(model, float_denoiser(model.load_unet()), np.asarray([0]), **settings)
    assert_same(found.transpose(0, 2, 3, 1) / 2 + 0.5, expected)


@torch.no_grad()
def test_calibration_records_what_the_unet_sees_along_the_edited_trajectory(
    pipelines: Callable[[str], Path], unmasked: ImageFolder
) -> None:
    model = loaded(pipelines("pix2pix"), unmasked)
    unet = model.load_unet()
    recorded = record_trajectories(
        model, unet, steps=STEPS, samples=2, seed=0, guidance=4.0, image_guidance=2.0, rows=3
    )
    assert IMAGE_CONDITION not in recorded.conditions
    assert recorded.sample.shape == (STEPS, 6, 8, 8, 8)
    assert recorded.output.shape == (STEPS, 6, 4, 8, 8)
    latents, images = recorded.sample[:, :, :4], recorded.sample[:, :, 4:]
    encoded = torch.stack([model.conditions(np.asarray([i]))[IMAGE_CONDITION][0] for i in (0, 1)])
    texts, null = recorded.conditions["encoder_hidden_states"], model.null_conditions(1)
    for sampling in range(2):
        rows = slice(3 * sampling, 3 * sampling + 3)
        assert torch.equal(latents[:, rows], latents[:, rows][:, :1].expand(-1, 3, -1, -1, -1))
        image, same, nothing = images[0, rows]
        assert torch.equal(image, same)
        assert any(torch.equal(image, each) for each in encoded)
        assert not nothing.any()
        assert torch.equal(texts[rows][1:], null["encoder_hidden_states"].expand(2, -1, -1))
        assert not torch.equal(texts[rows][0], texts[rows][1])
    scheduler = model.load_scheduler("ddim")
    scheduler.set_timesteps(STEPS)
    text, image, nothing = (recorded.output[0, i::3] for i in range(3))
    guided = nothing + 4.0 * (text - image) + 2.0 * (image - nothing)
    following = scheduler.step(guided, scheduler.timesteps[0], latents[0, 0::3]).prev_sample
    torch.testing.assert_close(latents[1, 0::3], following, rtol=1e-5, atol=1e-6)


def test_calibration_records_mask_and_masked_image(
    pipelines: Callable[[str], Path], pictures: ImageFolder
) -> None:
    model = loaded(pipelines("inpaint"), pictures)
    recorded = record_trajectories(model, model.load_unet(), steps=1, samples=2, seed=0)
    mask, masked = recorded.sample[0, :, 4], recorded.sample[0, :, 5:]
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(mask[0::2], mask[1::2])  # both halves of guidance
    assert torch.equal(masked[0::2], masked[1::2])
    assert not torch.equal(mask[0], mask[2])  # two images


def test_made_images_are_the_same_every_time_and_differ_by_number() -> None:
    first, again, other = (made_image(i, 40, 56) for i in (3, 3, 4))
    assert first.image.size == (56, 40)
    assert list(first.image.getdata()) == list(again.image.getdata())
    assert list(first.image.getdata()) != list(other.image.getdata())
    shares = []
    for i in range(20):
        mask = made_image(i, 40, 56).mask
        assert mask is not None
        shares.append(np.asarray(mask).mean() / 255)
    assert 0.05 < min(shares) < max(shares) < 0.6


def test_prompts_and_images_are_each_taken_in_turn(
    pipelines: Callable[[str], Path], unmasked: ImageFolder
) -> None:
    model = load_model(resolve_source(str(pipelines("pix2pix"))), [*PROMPTS, "a house"], unmasked)
    assert model.labels == 3
    images = model.conditions(np.arange(3))[IMAGE_CONDITION]
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    ("given", "predicted", "pipeline", "variance", "expected"),
    [
        (4, 4, "StableDiffusionPipeline", None, Channels(4)),
        (3, 3, "LDMPipeline", "fixed_small", Channels(3)),
        (9, 4, "StableDiffusionInpaintPipeline", None, Channels(4, 5, "inpainting")),
        (4, 4, "StableDiffusionInpaintPipeline", None, Channels(4, 0, "inpainting")),
        (33, 16, "StableDiffusionXLInpaintPipeline", None, Channels(16, 17, "inpainting")),
        (8, 4, "StableDiffusionInstructPix2PixPipeline", None, Channels(4, 4, "instruct-pix2pix")),
        (3, 6, "DDPMPipeline", "learned_range", Channels(3)),
        (3, 6, "DDPMPipeline", "fixed_small", None),
        (3, 3, "DDPMPipeline", "learned", None),
        (4, 8, "StableDiffusionInpaintPipeline", "learned", None),
        (9, 4, "StableDiffusionPipeline", None, None),
        (4, 8, "StableDiffusionPipeline", "learned_range", None),
        (8, 4, "StableDiffusionInpaintPipeline", None, None),
        (9, 4, "StableDiffusionInstructPix2PixPipeline", None, None),
        (4, 4, "StableDiffusionInstructPix2PixPipeline", None, None),
        (7, 4, "StableDiffusionUpscalePipeline", None, None),
        (6, 3, "LDMSuperResolutionPipeline", None, None),
        (7, 3, "LDMPipeline", None, None),
    ],
)
def test_channels_are_known_by_pipeline_and_variance_or_refused_by_both_numbers(
    given: int, predicted: int, pipeline: str, variance: str | None, expected: Channels | None
) -> None:
    unet = {"in_channels": given, "out_channels": predicted}
    text = pipeline.startswith("StableDiffusion")
    if expected is not None:
        assert channels_of("model", unet, pipeline, variance, text=text) == expected
        return
    with refused(f"in_channels {given}", f"out_channels {predicted}", pipeline, variance):
        channels_of("model", unet, pipeline, variance, text=text)


@pytest.mark.parametrize(
    ("name", "unet", "pipeline"),
    [
        ("sd", {"in_channels": 7}, "StableDiffusionPipeline"),
        ("sd", {"in_channels": 9}, "StableDiffusionPipeline"),
        ("ldm", {"in_channels": 6}, "LDMPipeline"),
        ("ldm", {"out_channels": 6}, "LDMPipeline"),
    ],
)
@pytest.mark.parametrize("extra", [(), ("--random-weights",)])
def test_the_first_command_refuses_other_channels_and_leaves_no_workspace(
    pipelines: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    unet: dict[str, int],
    pipeline: str,
    extra: tuple[str, ...],
) -> None:
    model, workspace = tmp_path / "model", tmp_path / "ws"
    shutil.copytree(pipelines(name), model)
    for file, change in (("unet/config.json", unet), ("model_index.json", {})):
        path = model / file
        known = json.loads(path.read_text())
        named = {"_class_name": pipeline} if file == "model_index.json" else change
        path.write_text(json.dumps({**known, **named}))
    config = json.loads((model / "unet" / "config.json").read_text())
    ended = cli("calibrate", "-w", workspace, "--model", model, *extra)
    ended.assert_refused(config["in_channels"], config["out_channels"], pipeline)
    assert not workspace.exists()


def test_guidance_is_of_the_mean_alone_and_the_variance_that_of_what_is_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = list(torch.randn(3, 2, 6, 2, 2, generator=generator))
    two, three = Guidance(3.0), Guidance(3.0, 2.0)
    found = two.combine(parts[:2], 3)
    torch.testing.assert_close(found[:, :3], -2 * parts[0][:, :3] + 3 * parts[1][:, :3])
    assert torch.equal(found[:, 3:], parts[1][:, 3:])
    found = three.combine(parts, 3)
    text, image, nothing = (part[:, :3] for part in parts)
    torch.testing.assert_close(found[:, :3], 3 * text - image - nothing)
    assert torch.equal(found[:, 3:], parts[0][:, 3:])


def test_no_table_holds_a_learned_variance(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    source = resolve_source(str(pipelines("learned-variance")))
    workspace = Workspace.create(tmp_path / "ws", source, Scheme.parse("w4a4"))
    ended = cli("schedule", "-w", workspace.root, "--scheduler", "ddpm", "--steps", "4")
    ended.assert_refused("DDPMScheduler", "variance", "--scheduler")
    assert cli("schedule", "-w", workspace.root, "--scheduler", "dpm++", "--steps", "4").code == 0


def test_images_are_for_models_that_take_them(
    pipelines: Callable[[str], Path], pictures: ImageFolder
) -> None:
    for source in (resolve_source(str(pipelines("sd"))), ModelSource("emoji")):
        with refused("--image-folder", source.name):
            load_model(source, None, pictures)
    with refused("--image-guidance", "inpaint"):
        model = loaded(pipelines("inpaint"))
        drawn(model, image_guidance=2.0)
    with refused("--image-guidance", 0.5):
        drawn(loaded(pipelines("pix2pix")), image_guidance=0.5)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a mask is missing": (lambda p: (p / "1-mask.png").unlink(), ("1",)),
    "a mask without an image": (lambda p: (p / "1.png").unlink(), ("1",)),
    "a damaged image": (lambda p: _truncate(p / "0.png"), ("0.png",)),
    "no image": (lambda p: (p / "0.png").write_text("text"), ("0.png",)),
    "a name twice": (lambda p: shutil.copy(p / "0.png", p / "0.webp"), ()),
    "a huge image": (
        lambda p: Image.new("1", (2**13 + 1, 2**13)).save(p / "0.png"),
        ("0.png", "8193x8192"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_images_that_cannot_be_used_are_named(
    pipelines: Callable[[str], Path], pictures: ImageFolder, tmp_path: Path, damage: str
) -> None:
    change, facts = DAMAGE[damage]
    change(tmp_path / "pictures")
    with refused(tmp_path / "pictures", *facts):
        loaded(pipelines("inpaint"), ImageFolder.of(tmp_path / "pictures")).conditions(
            np.asarray([0])
        )


def test_masks_are_refused_where_nothing_is_inpainted(
    pipelines: Callable[[str], Path], pictures: ImageFolder
) -> None:
    with refused("--image-folder", "masks"):
        loaded(pipelines("pix2pix"), pictures).conditions(np.asarray([0]))


def test_a_folder_without_images_or_with_others_than_recorded_is_refused(
    pictures: ImageFolder, tmp_path: Path
) -> None:
    with refused("--image-folder", tmp_path):
        ImageFolder.of(tmp_path)
    with refused("--image-folder", tmp_path / "none"):
        ImageFolder.of(tmp_path / "none")
    loop = tmp_path / "pictures" / "loop.png"
    loop.symlink_to(loop)
    for folder in (loop, loop.parent):
        with refused("--image-folder", loop):
            ImageFolder.of(folder)
    loop.unlink()
    (tmp_path / "pictures" / "0.png").unlink()
    with refused(pictures.path, "changed"):
        pictures.files()
