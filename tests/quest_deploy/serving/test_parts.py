"""The text encoders and decoders beside the UNet: what diffusers computes with them, and their ONNX
files compute the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
import pytest
import torch

from quest_deploy.models.controls import load_control
from quest_deploy.models.loading import resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.residuals import CONTROLNET, unet_residuals
from quest_deploy.models.unets import ADDED_CONDITIONS
from quest_deploy.serving.triton.layout import Layout
from quest_deploy.serving.triton.models import IMAGE, write_controlnet
from quest_deploy.serving.triton.options import TritonOptions
from quest_deploy.serving.triton.parts import Decoder, TextEncoder, save_onnx
from tests.helpers import relative_error
from tests.pipelines import CONTROLLED, TOKENS, controlnet, text_to_image

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPTS = ["a red cat", "a photo of a blue house"]


@pytest.mark.parametrize("name", ["sdxl"])
def test_the_text_encoder_s_file_gives_diffusers_conditions(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    pipeline = PipelineModel(resolve_source(str(pipelines(name)))).load_pipeline(vae=None)
    found = [
        suffix
        for suffix in ("", "_2")
        if getattr(pipeline, f"text_encoder{suffix}", None) is not None
    ]
    module = TextEncoder(*(getattr(pipeline, f"text_encoder{suffix}") for suffix in found))
    example = {f"input_ids{suffix}": torch.zeros(2, TOKENS, dtype=torch.int32) for suffix in found}
    save_onnx(module, example, module.outputs, {0: "batch"}, tmp_path / "model.onnx")
    options = {"padding": "max_length", "max_length": TOKENS, "return_tensors": "np"}
    feeds = {
        f"input_ids{suffix}": getattr(pipeline, f"tokenizer{suffix}")(PROMPTS, **options).input_ids
        for suffix in found
    }
    states = ort.InferenceSession(tmp_path / "model.onnx").run(
        module.outputs, {key: value.astype(np.int32) for key, value in feeds.items()}
    )
    encoded = pipeline.encode_prompt(
        prompt=PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    expected = [value for value in encoded if value is not None]
    assert len(states) == len(expected) == len(found)
    for state, value in zip(states, expected, strict=True):
        assert relative_error(state, value.detach().numpy()) < 1e-5


@pytest.mark.parametrize("name", ["sd"])
def test_the_decoder_s_file_decodes_any_batch_and_size_as_the_model_does(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    model = PipelineModel(resolve_source(str(pipelines(name))))
    example = {"sample": torch.zeros(2, *model.sample_shape)}
    save_onnx(
        Decoder(model.load_decoder()),
        example,
        ["image"],
        {0: "batch", 2: "height", 3: "width"},
        tmp_path / "model.onnx",
    )
    latents = (
        np.random.default_rng(0)
        .standard_normal((3, model.sample_shape[0], 8, 12))
        .astype(np.float32)
    )
    (image,) = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"sample": latents})
    assert relative_error(np.clip(image, -1, 1), model.images(latents)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["twelve skips", "controlled-xl", "controlled-inpaint"])
def test_the_controlnet_s_file_gives_each_of_the_unet_s_inputs_by_its_name(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    if name == "twelve skips":
        folder = text_to_image(tmp_path / "model", **CONTROLLED, layers_per_block=5)
    else:
        folder = pipelines(name)
    model = PipelineModel(resolve_source(str(folder)))
    net = load_control(controlnet(tmp_path / "net", folder), model, CONTROLNET)
    residuals, states = unet_residuals(model.config), model.null_conditions(2)
    assert len(residuals) == (13 if name == "twelve skips" else 5)
    layout = Layout(tmp_path / "package", TritonOptions(), None, model.sample_shape, 2, 2)
    written = write_controlnet(layout, net, residuals, states)
    generator = torch.Generator().manual_seed(0)
    given = {
        "sample": torch.randn(2, *model.sample_shape, generator=generator),
        "timestep": torch.tensor([3.0, 700.0]),
        **states,
    }
    image = torch.rand(2, 3, 16, 16, generator=generator)
    shown = {**given, IMAGE: torch.nn.functional.pixel_unshuffle(image, 2)}
    found = ort.InferenceSession(layout.version_folder("controlnet") / "model.onnx").run(
        written["outputs"], {key: value.numpy() for key, value in shown.items()}
    )
    added = {key: given[key] for key in ADDED_CONDITIONS if key in given}
    with torch.no_grad():
        down, mid = net(
            given["sample"],
            given["timestep"],
            given["encoder_hidden_states"],
            controlnet_cond=image,
            added_cond_kwargs=added,
            return_dict=False,
        )
    expected = {f"down_block_additional_residual_{i}": x for i, x in enumerate(down)}
    expected["mid_block_additional_residual"] = mid
    assert set(written["outputs"]) == expected.keys()
    for key, value in zip(written["outputs"], found, strict=True):
        assert relative_error(value, expected[key].numpy()) < 1e-4, key
