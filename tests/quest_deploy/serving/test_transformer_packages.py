"""What packages of diffusion transformers draw is what diffusers' own pipelines draw; without a
server.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import TEXT_ENCODERS
from quest_deploy.models.schedulers import FLOW_SCHEDULERS
from quest_deploy.serving.part_graphs import model_parts
from quest_deploy.serving.triton.layout import Layout
from quest_deploy.serving.triton.models import write_decoder, write_text_encoder
from quest_deploy.serving.triton.options import TritonOptions
from quest_deploy.serving.triton.package import text_model
from quest_deploy.serving.triton.pipelines import pixels_per_latent, write_pipelines
from tests.quest_deploy.serving.local import LocalPipeline

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from quest_deploy.models.pipeline_model import PipelineModel

PROMPT = "a Red cat "
"""Some pipelines put it into lower case."""


class FloatPipeline(LocalPipeline):
    """A package's pipeline with the float network in the place of the engine's."""

    model: PipelineModel
    network: Any

    async def infer(self, model: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if model != "transformer":
            return await super().infer(model, inputs)
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        for name in given.keys() & {"timestep", "guidance", "class_labels"}:
            given[name] = given[name][:, 0]
        with torch.no_grad():
            return {"prediction": self.network(**given).sample.numpy()}


def packaged(source: Path, folder: Path) -> FloatPipeline:
    """What a package of the pipeline in ``source`` draws, written into ``folder``."""
    model = load_model(resolve_source(str(source)))
    factor = pixels_per_latent(model, model.sample_shape)
    layout = Layout(folder, TritonOptions(), None, model.sample_shape, 2, factor)
    parts = model_parts(model)
    signatures = {"vae_decoder": write_decoder(layout, parts["vae_decoder"].graph())}
    pipeline, tokens = None, None
    if model.network.prompt_encoder is not None:
        graphs = {name: parts[name].graph() for name in TEXT_ENCODERS if name in parts}
        pipeline, tokens, graph = text_model(model, graphs)
        signatures["text_encoder"] = write_text_encoder(layout, graph)
    write_pipelines(layout, model, pipeline, signatures, tokens=tokens)
    found = FloatPipeline(folder, max_size=256)
    found.model, found.network = model, model.load_unet()
    return found


@pytest.fixture(scope="module")
def both(
    pipelines: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[FloatPipeline, Any]]:
    """By a pipeline's name, what a package of it draws, and diffusers' own pipeline."""
    made: dict[str, tuple[FloatPipeline, Any]] = {}

    def make(name: str) -> tuple[FloatPipeline, Any]:
        if name not in made:
            source = pipelines(name)
            package = packaged(source, tmp_path_factory.mktemp(name))
            pipeline = package.model.pipeline_class().from_pretrained(source)
            pipeline.set_progress_bar_config(disable=True)
            made[name] = package, pipeline
        return made[name]

    return make


def assert_equal_images(
    both: tuple[FloatPipeline, Any], scheduler: str, guidance: float, **options: Any
) -> None:
    """Both draw the same image, but for the decoder's last bits."""
    package, pipeline = both
    pipeline.scheduler = package.model.load_scheduler(scheduler)
    usual = {"use_resolution_binning": False, "clean_caption": False}
    taken = signature(pipeline.__call__).parameters
    expected = pipeline(
        **options,
        **{name: x for name, x in usual.items() if name in taken},
        guidance_scale=guidance,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    if (label := options.pop("class_labels", None)) is not None:
        options["label"] = label[0]
    found = package.draw(steps=3, seed=5, scheduler=scheduler, guidance=guidance, **options)
    assert np.abs(found.astype(int) - np.asarray(expected, int)).max() <= 1


CASES = {
    "pixart": (("ddim", "dpm++"), 4.5, {"negative_prompt": "Blue", "height": 32, "width": 16}),
    "pixart-alpha": (("dpm++",), 4.5, {"height": 256, "width": 128}),
    "sd3": (("euler", "unipc"), 7.0, {"negative_prompt": "blue", "height": 20, "width": 16}),
    "sana": (("dpm++", "euler"), 4.5, {"negative_prompt": "blue", "height": 32, "width": 64}),
    "flux": (tuple(FLOW_SCHEDULERS), 3.3, {"height": 32, "width": 48}),
    "flux-schnell": (("euler", "unipc"), 1.0, {"height": 32, "width": 16}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_image_of_a_prompt_is_the_one_of_diffusers_pipeline(
    both: Callable[[str], tuple[FloatPipeline, Any]], name: str
) -> None:
    schedulers, guidance, options = CASES[name]
    for scheduler in schedulers:
        assert_equal_images(both(name), scheduler, guidance, prompt=PROMPT, **options)
    height, width = both(name)[0].generator.settings["size"]
    own = {"height": height, "width": width}
    assert_equal_images(both(name), schedulers[0], 1.0, prompt=PROMPT, **own)


def test_the_image_of_a_class_is_the_one_of_diffusers_pipeline(
    both: Callable[[str], tuple[FloatPipeline, Any]],
) -> None:
    for guidance in (1.0, 4.0):
        assert_equal_images(both("dit"), "ddim", guidance, class_labels=[207])


def test_what_a_model_without_classifier_free_guidance_is_not_asked_for_is_refused(
    both: Callable[[str], tuple[FloatPipeline, Any]],
) -> None:
    for name, wrong in (("flux", "negative_prompt"), ("flux-schnell", "guidance")):
        package, _ = both(name)
        given = {"negative_prompt": "blue", "guidance": 4.0}
        with pytest.raises(package.generation.InvalidRequestError, match=wrong):
            package.draw(prompt=PROMPT, **{wrong: given[wrong]})


def test_a_prompt_that_the_encoder_would_cut_is_refused(
    both: Callable[[str], tuple[FloatPipeline, Any]],
) -> None:
    for name, most in (("pixart", 300), ("pixart-alpha", 120), ("sana", 300), ("flux", 512)):
        package, _ = both(name)
        for asked in ("prompt", "negative_prompt")[: 1 + (name != "flux")]:
            with pytest.raises(package.generation.InvalidRequestError, match=asked):
                package.draw(**{"prompt": PROMPT, asked: "cat " * most})


def test_clip_reads_the_first_words_of_a_prompt_that_t5_reads_whole(
    both: Callable[[str], tuple[FloatPipeline, Any]],
) -> None:
    for name in ("flux", "sd3"):
        height, width = both(name)[0].generator.settings["size"]
        words = " ".join(f"cat {i}" for i in range(60))
        own = {"height": height, "width": width}
        assert_equal_images(both(name), "euler", 1.0, prompt=f"{words} dog", **own)


def test_a_size_beyond_the_networks_positions_is_refused(
    both: Callable[[str], tuple[FloatPipeline, Any]],
) -> None:
    package, _ = both("sd3")
    largest = package.generator.settings["largest"]
    with pytest.raises(package.generation.InvalidRequestError, match=str(largest)):
        package.draw(prompt=PROMPT, height=2 * largest, width=largest)


@pytest.mark.parametrize("scheduler", ["dpm++", "unipc"])
def test_a_schedule_that_begins_with_the_same_timestep_twice_is_run_to_its_end(
    both: Callable[[str], tuple[FloatPipeline, Any]], scheduler: str
) -> None:
    package, _ = both("flux")
    side = 256 * package.generator.settings["pixels_per_latent"]
    made = package.generator._scheduler(scheduler, 50, side, side)
    first, second, *_ = made.timesteps
    assert first == second
    sample = torch.zeros(1, 4, 2, 2)
    for timestep in made.timesteps:
        sample = made.step(torch.ones_like(sample), timestep, sample).prev_sample
    # Along a straight line, from pure noise to the picture.
    assert torch.allclose(sample, torch.full_like(sample, -1), atol=1e-3)


def test_a_package_draws_with_as_many_steps_as_its_model(
    both: Callable[[str], tuple[FloatPipeline, Any]],
) -> None:
    for name, steps in (("flux-schnell", 4), ("flux", 20)):
        package, _ = both(name)
        (job,) = package.generator.jobs({"prompt": np.asarray([[PROMPT]], np.object_)})
        assert job.steps == steps
