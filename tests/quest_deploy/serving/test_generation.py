"""What the pipelines draw is what diffusers' own pipeline draws with the same engine, and what they
refuse; without a server.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.evaluation.sampling import sample_images
from quest_deploy.models.control_images import edges
from quest_deploy.models.controls import load_control
from quest_deploy.models.image_inputs import made_image
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_classes import controlled_class
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.residuals import CONTROLNET, controlnet_residuals, packed, unet_residuals
from quest_deploy.models.schedulers import SCHEDULERS
from quest_deploy.serving.part_graphs import model_parts
from quest_deploy.serving.pipeline import load_pipeline
from quest_deploy.serving.triton.graphs import text_encoder
from quest_deploy.serving.triton.layout import Layout
from quest_deploy.serving.triton.models import (
    write_controlnet,
    write_decoder,
    write_encoder,
    write_text_encoder,
)
from quest_deploy.serving.triton.options import TritonOptions
from quest_deploy.serving.triton.pipelines import pixels_per_latent, write_pipelines
from quest_deploy.serving.triton.readme import shared_memory
from tests.helpers import refused
from tests.pipelines import TOKENS, controlnet
from tests.quest_deploy.serving.local import LocalPipeline
from tests.quest_deploy.support import Chain, cli, png_of

PROMPT = "a red cat"
ASKED: dict[str, Any] = {"prompt": PROMPT, "seed": 5}


def assert_theirs(found: np.ndarray, pipeline: Any, steps: int, **given: Any) -> None:
    """That the image is the one that diffusers' pipeline draws of ``ASKED``, but for the decoder's
    last bits.
    """
    generator = torch.Generator().manual_seed(ASKED["seed"])
    drawn = pipeline(PROMPT, num_inference_steps=steps, generator=generator, **given).images[0]
    assert np.abs(found.astype(int) - np.asarray(drawn, int)).max() <= 1


@pytest.fixture(scope="module")
def package(text_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text-to-image pipeline's package; not to be changed."""
    folder = tmp_path_factory.mktemp("package") / "triton"
    ended = cli("package", "--triton", folder, "-w", text_chain.root, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["models"] == ["text_encoder", "unet", "vae_decoder"]
    return folder


@pytest.fixture(scope="module")
def local(package: Path) -> LocalPipeline:
    """Its pipeline."""
    return LocalPipeline(package)


@pytest.fixture(scope="module")
def diffusers_pipeline(text_chain: Chain) -> Any:
    """Diffusers' pipeline with the workspace's engine. Its scheduler may be changed."""
    made = load_pipeline(text_chain.root, "onnxruntime")
    made.set_progress_bar_config(disable=True)
    return made


CASES: dict[str, dict[str, Any]] = {
    "guidance and a negative prompt": {"negative_prompt": "blue", "guidance": 7.5},
    "guidance alone, another size": {"guidance": 3.0, "height": 32, "width": 16},
    "no guidance": {"guidance": 1.0},
    "a guidance of 0, which is none": {"guidance": 0.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_image_is_the_one_of_diffusers_pipeline(
    local: LocalPipeline, diffusers_pipeline: Any, text_chain: Chain, scheduler: str, case: str
) -> None:
    choices = CASES[case]
    diffusers_pipeline.scheduler = load_model(
        Workspace.open(text_chain.root).source
    ).load_scheduler(scheduler)
    found = local.draw(**ASKED, steps=4, scheduler=scheduler, **choices)
    theirs = {"guidance_scale" if k == "guidance" else k: x for k, x in choices.items()}
    assert_theirs(found, diffusers_pipeline, 4, **theirs)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, "expected inputs"),
        ({"steps": 2}, "prompt: expected one"),
        (
            {"prompt": "red " * TOKENS},
            f"prompt: expected at most {TOKENS} tokens, 2 of them marks of the start or the end; "
            "found",
        ),
        (
            {"prompt": PROMPT, "negative_prompt": "red " * TOKENS},
            "negative_prompt: expected at most",
        ),
        ({"prompt": "x" * 20000}, "prompt: expected at most 16384 bytes, found 20000"),
        ({"prompt": "é" * 10000}, "prompt: expected at most 16384 bytes, found 20000"),
        ({"prompt": b"\xff"}, "prompt: expected UTF-8"),
        (
            {"prompt": PROMPT, "guidance": 3e38},
            "guidance: expected a weight from 0 to 1000, found 3e+38",
        ),
        ({"prompt": PROMPT, "height": 0}, "height: expected a multiple of"),
        ({"prompt": PROMPT, "width": 66}, "width: expected a multiple of"),
        ({"prompt": PROMPT, "scheduler": "lcm", "steps": 60}, "steps: lcm does not take 60"),
        ({"prompt": PROMPT, "scheduler": "pndm", "steps": 3}, "steps: pndm does not take 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_reason(
    local: LocalPipeline, request_: dict[str, Any], words: str
) -> None:
    with pytest.raises(local.generation.InvalidRequestError) as refused:
        local.draw(**request_)
    assert words in str(refused.value)


@pytest.mark.parametrize(("model", "fact"), [("unet", "step 1 of 2"), ("vae_decoder", "decoder")])
def test_of_what_is_not_finite_no_image_is_made(package: Path, model: str, fact: str) -> None:
    class Overflowing(LocalPipeline):
        async def infer(self, name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = await super().infer(name, inputs)
            return (
                {key: value + np.float32("inf") for key, value in found.items()}
                if name == model
                else found
            )

    pipeline = Overflowing(package)
    with refused(fact, error=pipeline.generation.NotFiniteError):
        pipeline.draw(prompt=PROMPT, steps=2)


def test_a_limit_that_is_missing_or_no_whole_number_of_1_or_more_is_refused(
    local: LocalPipeline,
) -> None:
    limits = local.generation.Limits
    given = {
        name: {"string_value": "7"}
        for name in ("max_steps", "max_size", "max_in_flight", "model_timeout", "cpu_threads")
    }
    assert limits.of(given) == limits(7, 7, 7, 7)
    for wrong in ("0", "-1", "1.5", "", "many"):
        with refused("max_in_flight", "config.pbtxt", repr(wrong), error=ValueError):
            limits.of({**given, "max_in_flight": {"string_value": wrong}})
    with refused("max_size", error=ValueError):
        limits.of({name: value for name, value in given.items() if name != "max_size"})


class Reference(LocalPipeline):
    """A pipeline with the float UNet in the place of the engine's."""

    unet: Any

    async def infer(self, model: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if model != "unet":
            return await super().infer(model, inputs)
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        added = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
        with torch.no_grad():
            found = self.unet(
                given["sample"],
                given["timestep"][:, 0],
                given["encoder_hidden_states"],
                added_cond_kwargs=added or None,
                **packed({name: x for name, x in given.items() if "_residual" in name}),
            ).sample
        return {"prediction": found.numpy()}


def reference(
    source: Path, folder: Path, scheduler: str = "ddim", net: Path | None = None
) -> tuple[Reference, Any]:
    """What a package of a pipeline draws, written into ``folder``, and diffusers' own pipeline, of
    both with the ControlNet in ``net``.
    """
    model = PipelineModel(resolve_source(str(source)))
    kind: Any = model.pipeline_class()
    parts: dict[str, Any] = {}
    if net is not None:
        kind = controlled_class(kind, "controlnet")
        parts["controlnet"] = load_control(net, model, CONTROLNET)
    made = kind.from_pretrained(source, **parts)
    made.set_progress_bar_config(disable=True)
    made.scheduler = model.load_scheduler(scheduler)
    factor = pixels_per_latent(model, model.sample_shape)
    layout = Layout(folder, TritonOptions(), None, model.sample_shape, 2, factor)
    pipeline, decoder = model.load_pipeline(vae=None), model.load_decoder()
    graphs = {name: part.graph() for name, part in model_parts(model).items()}
    encoders = [graph for name, graph in graphs.items() if name.startswith("text_encoder")]
    signatures = {
        "text_encoder": write_text_encoder(layout, text_encoder(encoders)),
        "vae_decoder": write_decoder(layout, graphs["vae_decoder"]),
    }
    if model.channels.image:
        scale = model.image_scale(decoder.config.scaling_factor)
        signatures["vae_encoder"] = write_encoder(layout, graphs["vae_encoder"], scale)
    residuals = {} if net is None else unet_residuals(model.config)
    if net is not None:
        conditions = model.null_conditions(2)
        net_of_it = parts["controlnet"]
        signatures["controlnet"] = write_controlnet(layout, net_of_it, residuals, conditions)
    write_pipelines(layout, model, pipeline, signatures, residuals)
    found = Reference(folder)
    found.unet = made.unet
    return found, made


@pytest.fixture(scope="module")
def xl(
    pipelines: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Reference, Any]:
    """The small Stable Diffusion XL: what a package of it draws, and diffusers' own pipeline."""
    return reference(pipelines("sdxl"), tmp_path_factory.mktemp("xl"))


def test_a_scheduler_that_does_not_know_zero_terminal_snr_is_refused_by_name(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "zero"
    shutil.copytree(pipelines("sd-v"), source)
    config = source / "scheduler" / "scheduler_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "rescale_betas_zero_snr": True})
    )
    pipeline, _ = reference(source, tmp_path / "package")
    with refused("scheduler", "pndm", error=pipeline.generation.InvalidRequestError):
        pipeline.draw(prompt=PROMPT, steps=4, scheduler="pndm")
    assert pipeline.draw(prompt=PROMPT, steps=4, scheduler="unipc").shape == (16, 16, 3)


@pytest.mark.parametrize("negative", [None, "blue"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_stable_diffusion_xl_s_image_is_the_one_of_diffusers_pipeline(
    xl: tuple[Reference, Any], negative: str | None, guidance: float
) -> None:
    pipeline, made = xl
    sizes = {"height": 24, "width": 16}
    given = sizes if negative is None else {**sizes, "negative_prompt": negative}
    found = pipeline.draw(**ASKED, steps=3, guidance=guidance, **given)
    assert_theirs(found, made, 3, guidance_scale=guidance, **given)


@pytest.fixture(scope="module")
def from_images(
    pipelines: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Reference, Any]]:
    """What a package of a pipeline that inpaints or edits draws, and diffusers' own pipeline."""
    made: dict[str, tuple[Reference, Any]] = {}

    def make(name: str) -> tuple[Reference, Any]:
        if name not in made:
            made[name] = reference(pipelines(name), tmp_path_factory.mktemp(name), "ddpm")
        return made[name]

    return make


GIVEN = made_image(7, 24, 16)
FILES = {"init_image": png_of(GIVEN.image)}
assert GIVEN.mask is not None
MASKED = {**FILES, "mask_image": png_of(GIVEN.mask)}
EITHER: dict[str, dict[str, bytes]] = {"inpaint": MASKED, "pix2pix": FILES}


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", ["inpaint", pytest.param("inpaint-xl", marks=pytest.mark.slow)])
def test_an_inpainted_image_is_the_one_of_diffusers_pipeline(
    from_images: Callable[[str], tuple[Reference, Any]], name: str, guidance: float
) -> None:
    pipeline, made = from_images(name)
    sizes = {"height": 24, "width": 16}
    asked = {**ASKED, "steps": 3, "guidance": guidance, "scheduler": "ddpm"}
    found = pipeline.draw(**asked, **sizes, **MASKED)
    masked = {"image": GIVEN.image, "mask_image": GIVEN.mask, "strength": 1.0}
    assert_theirs(found, made, 3, guidance_scale=guidance, **masked, **sizes)
    everywhere = png_of(Image.new("L", (16, 24), 255))
    other = pipeline.draw(**asked, **sizes, **{**MASKED, "mask_image": everywhere})
    assert np.abs(found.astype(int) - other.astype(int)).max() > 1


@pytest.mark.parametrize(("guidance", "image_guidance"), [(1.0, 2.0), (5.0, 1.0), (5.0, 2.5)])
@pytest.mark.parametrize("negative", [None, "blue"])
@pytest.mark.parametrize("name", ["pix2pix", pytest.param("pix2pix-xl", marks=pytest.mark.slow)])
def test_an_edited_image_is_the_one_of_diffusers_pipeline(
    from_images: Callable[[str], tuple[Reference, Any]],
    name: str,
    negative: str | None,
    guidance: float,
    image_guidance: float,
) -> None:
    pipeline, made = from_images(name)
    sizes = {"height": 24, "width": 16}
    found = pipeline.draw(
        **ASKED,
        steps=3,
        guidance=guidance,
        image_guidance=image_guidance,
        scheduler="ddpm",
        **({} if negative is None else {"negative_prompt": negative}),
        **sizes,
        **FILES,
    )
    assert_theirs(
        found,
        made,
        3,
        image=GIVEN.image,
        negative_prompt=negative,
        guidance_scale=guidance,
        image_guidance_scale=image_guidance,
        **(sizes if "xl" in name else {}),  # Stable Diffusion's takes the image's own
    )


def bomb() -> bytes:
    """A small file of many pixels."""
    return png_of(Image.new("1", (2**13, 2**13)))


@pytest.mark.parametrize(
    ("name", "change", "facts"),
    [
        ("inpaint", {"mask_image": None}, "mask_image"),
        ("inpaint", {"init_image": None}, "init_image"),
        ("inpaint", {"init_image": b"text"}, "init_image PNG"),
        ("inpaint", {"mask_image": MASKED["mask_image"][:60]}, "mask_image"),
        ("inpaint", {"mask_image": b""}, "mask_image"),
        ("inpaint", {"init_image": b"\0" * (2**25 + 1)}, f"init_image {2**25}"),
        ("inpaint", {"init_image": bomb()}, f"init_image {2**24} 8192x8192"),
        ("pix2pix", {"mask_image": MASKED["mask_image"]}, "mask_image"),
        ("pix2pix", {"image_guidance": 0.5}, "image_guidance 1 0.5"),
        ("pix2pix", {"image_guidance": float("nan")}, "image_guidance"),
        ("pix2pix", {"image_guidance": 3e38}, "image_guidance"),
    ],
)
def test_images_that_cannot_be_drawn_from_are_refused(
    from_images: Callable[[str], tuple[Reference, Any]],
    name: str,
    change: dict[str, Any],
    facts: str,
) -> None:
    pipeline, _ = from_images(name)
    request = {"prompt": PROMPT, **EITHER[name], **change}
    with refused(*facts.split(), error=pipeline.generation.InvalidRequestError):
        pipeline.draw(**{key: value for key, value in request.items() if value is not None})


def test_a_model_that_takes_no_image_refuses_one(local: LocalPipeline) -> None:
    with refused("init_image", error=local.generation.InvalidRequestError):
        local.draw(prompt=PROMPT, **FILES)


def test_the_longest_prompt_is_drawn(local: LocalPipeline) -> None:
    assert local.draw(prompt="red " * (TOKENS - 2), steps=1).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("label", np.ones((1, 1), np.float32), "label: expected the type int32, found float32"),
        ("label", np.ones((1, 2), np.int32), "label: expected the shape [images, 1], found [1, 2]"),
        ("colour", np.ones((1, 1), np.int32), "colour: unknown"),
    ],
)
def test_inputs_of_another_type_shape_or_name_are_refused(
    local: LocalPipeline, name: str, value: np.ndarray, words: str
) -> None:
    with pytest.raises(local.generation.InvalidRequestError) as refused:
        local.generator.jobs({name: value})
    assert words in str(refused.value)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_an_unconditional_model_draws_what_the_engine_draws_in_this_process(
    ldm_chain: Chain, tmp_path: Path, scheduler: str
) -> None:
    ended = cli("package", "--triton", tmp_path / "out", "-w", ldm_chain.root, "--json")
    assert ended.code == 0, ended.err
    workspace = Workspace.open(ldm_chain.root)
    pipeline = LocalPipeline(tmp_path / "out")
    model = load_model(workspace.source)

    def denoise(
        sample: torch.Tensor, timestep: torch.Tensor, **conditions: torch.Tensor
    ) -> torch.Tensor:
        inputs = {"sample": sample.numpy(), "timestep": timestep.numpy().reshape(-1, 1)}
        (output,) = asyncio.run(pipeline.infer("unet", inputs)).values()
        return torch.from_numpy(output)

    expected = sample_images(
        model, denoise, np.zeros(1, np.int64), scheduler=scheduler, steps=3, seed=4
    )[0].transpose(1, 2, 0)
    found = pipeline.draw(seed=4, steps=3, scheduler=scheduler).astype(int)
    assert (
        np.abs(found - (expected + 1) * 127.5).max() <= 1
    )  # rounding, and the decoder's last bits
    with refused("guidance", 2, error=pipeline.generation.InvalidRequestError):
        pipeline.draw(seed=4, guidance=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["controlled-xl", "controlled-inpaint"])
def test_with_a_controlnet_the_image_is_the_one_of_diffusers_pipeline(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    net = controlnet(tmp_path / "net", pipelines(name))
    pipeline, made = reference(pipelines(name), tmp_path / "package", net=net)
    shown = edges(GIVEN.image)
    request = {**ASKED, "steps": 3, "guidance": 5.0}
    if name == "controlled-inpaint":
        request |= MASKED | {"height": 24}
        image = {"image": GIVEN.image, "mask_image": GIVEN.mask, "control_image": shown}
    else:
        image = {"image": shown}
    found = pipeline.draw(**request, control_image=png_of(shown), control_scale=0.5)
    sizes = {"height": request.get("height", 16), "width": 16}
    scales = {"controlnet_conditioning_scale": 0.5, "guidance_scale": 5.0}
    assert_theirs(found, made, 3, **image, **sizes, **scales)
    assert np.abs(found.astype(int) - pipeline.draw(**request).astype(int)).max() > 1


def test_shared_memory_holds_what_a_controlnet_adds_to_every_image_in_flight(
    tmp_path: Path,
) -> None:
    config = {
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    }
    residuals = {k: (x.channels, x.divisor) for k, x in controlnet_residuals(config).items()}
    for in_flight in (4, 16, 64):
        layout = Layout(tmp_path, TritonOptions(max_in_flight=in_flight), None, (4, 64, 64), 8, 8)
        assert shared_memory(layout, {}, 0) == 1
        # Stable Diffusion 1.5: 54 MB for both rows of an image, twice, in each pipeline.
        least = 1 + in_flight * 2 * 2 * 53.8e6 / 2**30
        assert least <= shared_memory(layout, residuals, 0) < least + 1.1


def test_shared_memory_holds_the_states_of_every_prompt_in_flight(tmp_path: Path) -> None:
    states = 4 * 333 * 4096  # Stable Diffusion 3's
    for in_flight in (16, 64, 256):
        layout = Layout(tmp_path, TritonOptions(max_in_flight=in_flight), None, (16, 64, 64), 2, 8)
        least = 1 + in_flight * 2 * 2 * states / 2**30
        assert least <= shared_memory(layout, {}, states) < least + 1.1
        more = 1 + 1.5 * (least - 1)  # an edited image has three rows
        assert more <= shared_memory(layout, {}, states, 3) < more + 1.1
