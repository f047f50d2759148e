"""Diffusers' pipelines that inpaint and edit images, around an engine: its stand-in is the float
UNet here, so that the images must be those of diffusers' own pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import GRAPH, Workspace
from quest_deploy.models.image_inputs import made_image
from quest_deploy.models.loading import resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.serving.pipeline import PipelineUNet
from tests.pipelines import as_pipeline, text_to_image
from tests.quest_deploy.support import cli

GIVEN = made_image(3, 16, 24)
INPAINTING: dict[str, Any] = {"image": GIVEN.image, "mask_image": GIVEN.mask, "strength": 1.0}
EDITING: dict[str, Any] = {"image": GIVEN.image, "image_guidance_scale": 2.0}
SIZE = {"height": 16, "width": 24}
CASES: dict[str, dict[str, Any]] = {
    "inpaint": INPAINTING | SIZE,
    "inpaint-xl": INPAINTING | SIZE,
    "pix2pix": EDITING,
    "pix2pix-xl": EDITING | SIZE,
}


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", CASES)
def test_around_an_engine_that_predicts_as_the_unet_the_pipeline_draws_as_diffusers_own(
    pipelines: Callable[[str], Path], name: str, guidance: float
) -> None:
    model = PipelineModel(resolve_source(str(pipelines(name))))
    unet, sizes = model.load_unet(), []

    def predict(sample: torch.Tensor, timestep: torch.Tensor, **conditions: torch.Tensor) -> Any:
        sizes.append(tuple(sample.shape))
        return unet(sample, timestep, **conditions, return_dict=False)[0]

    engine: Any = predict
    ours = model.load_pipeline(unet=PipelineUNet(engine, model.config))
    theirs = model.pipeline_class().from_pretrained(pipelines(name))
    images = []
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
        images.append(
            pipeline(
                "a red cat",
                guidance_scale=guidance,
                num_inference_steps=3,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
                **CASES[name],
            ).images
        )
    np.testing.assert_allclose(images[0], images[1], atol=1e-5)
    rows = 1 if guidance == 1 else 2 if "inpaint" in name else 3
    assert sizes == [(rows, model.config["in_channels"], 8, 12)] * 3


def test_around_an_engine_that_predicts_a_variance_too_the_pipeline_draws_as_diffusers_own(
    pipelines: Callable[[str], Path],
) -> None:
    model = PipelineModel(resolve_source(str(pipelines("learned-variance"))))
    unet = model.load_unet()
    engine: Any = lambda sample, timestep: unet(sample, timestep, return_dict=False)[0]  # noqa: E731
    ours = model.load_pipeline(unet=PipelineUNet(engine, model.config))
    images = []
    for pipeline in (ours, model.pipeline_class().from_pretrained(model.folder)):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(generator=generator, num_inference_steps=3, output_type="np").images)
    np.testing.assert_allclose(images[0], images[1], atol=1e-5)


def test_a_unet_without_channels_for_an_image_inpaints_in_diffusers_pipeline_and_not_in_a_package(
    tmp_path: Path,
) -> None:
    folder = as_pipeline(text_to_image(tmp_path / "model"), "StableDiffusionInpaintPipeline")
    model = PipelineModel(resolve_source(str(folder)))
    assert (model.channels.image, model.channels.image_kind) == (0, "inpainting")
    assert_not_packaged(folder, tmp_path, "model", "load_pipeline")


def test_a_text_encoder_that_masks_its_padding_is_not_packaged(tmp_path: Path) -> None:
    folder = text_to_image(tmp_path / "model")
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_attention_mask": True}))
    assert_not_packaged(folder, tmp_path, path, "use_attention_mask", "load_pipeline")


def assert_not_packaged(folder: Path, tmp_path: Path, *facts: object) -> None:
    """A workspace of the model in ``folder`` is refused before its graph is read."""
    workspace = Workspace.create(tmp_path / "ws", resolve_source(str(folder)), Scheme.parse("w4a4"))
    workspace.path(GRAPH).write_bytes(b"a graph")
    workspace.record("export", inputs=(), options={}, files=[workspace.path(GRAPH)], details={})
    ended = cli("package", "--triton", tmp_path / "out", "-w", workspace.root)
    ended.assert_refused(*facts)
    assert not (tmp_path / "out").exists()
