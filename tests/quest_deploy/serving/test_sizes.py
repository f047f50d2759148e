"""Images of any size, and prompts of any number of tokens, through a pipeline whose UNet halves its
latents three times, as Stable Diffusion's does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.workspace import CALIBRATED
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.serving.pipeline import load_pipeline
from tests.helpers import refused
from tests.pipelines import text_to_image
from tests.quest_deploy.serving.test_pipeline import draw, faked, states_of
from tests.quest_deploy.support import cli

pytestmark = pytest.mark.slow
LEVELS = {
    "block_out_channels": (16, 16, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", *("DownBlock2D",) * 3),
    "up_block_types": (*("UpBlock2D",) * 3, "CrossAttnUpBlock2D"),
}
"""Images are multiples of 16 pixels: three halvings of latents of 2 pixels."""
FEW = ("--samples", "2", "--steps", "2", "--buckets", "2")
BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with an engine of each backend; latents of 8x8 were calibrated."""
    folder = tmp_path_factory.mktemp("sizes")
    model, made = text_to_image(folder / "model", **LEVELS), folder / "ws"
    for command in (
        ("calibrate", "--model", model, *FEW),
        ("export",),
        *(("build-engine", "--backend", backend, "--threads", "1") for backend in BACKENDS),
    ):
        ended = cli(*command, "-w", made)
        assert ended.code == 0, ended.err
    return made


@pytest.fixture(scope="module", params=BACKENDS)
def pipeline(request: pytest.FixtureRequest, root: Path) -> Any:
    made = load_pipeline(root, request.param)
    made.set_progress_bar_config(disable=True)
    return made


def assert_the_same(found: Any, expected: Any) -> None:
    """The pictures are ``expected``, but for rounding ties: far nearer than other noise is."""
    assert np.abs(found - expected).mean() < np.abs(found - expected[::-1]).mean() / 4


@pytest.mark.parametrize(
    ("height", "width", "prompts"), [(16, 16, 2), (16, 80, 1), (112, 112, 2)], ids=str
)
def test_images_of_any_multiple_are_what_the_fake_quantized_model_draws(
    root: Path, pipeline: Any, height: int, width: int, prompts: int
) -> None:
    quantized = QuantizedModel.from_checkpoint(load_checkpoint(root / CALIBRATED)).eval()
    given = {
        "prompt": None,
        "prompt_embeds": states_of(pipeline, ["a red cat", "a blue house"][:prompts]),
        "negative_prompt_embeds": states_of(pipeline, [""] * prompts),
        "height": height,
        "width": width,
        "num_images_per_prompt": 2,
    }
    found = draw(pipeline, **given)
    assert found.shape == (2, height, width, 3)
    assert_the_same(found, draw(faked(pipeline, quantized), **given))


def test_sizes_take_turns_on_one_engine(pipeline: Any) -> None:
    first = draw(pipeline, height=32, width=48)
    draw(pipeline, height=64, width=16)
    np.testing.assert_array_equal(draw(pipeline, height=32, width=48), first)


@pytest.mark.parametrize(("height", "width"), [(24, 16), (16, 40)])
def test_a_size_that_the_unet_cannot_halve_is_refused_in_latents_and_in_pixels(
    pipeline: Any, height: int, width: int
) -> None:
    with refused(8, 16, "pixels", [height // 2, width // 2]):
        draw(pipeline, height=height, width=width)


@pytest.mark.parametrize("option", ["--height", "--width"])
def test_generate_refuses_it_by_the_option(root: Path, pipeline: Any, option: str) -> None:
    ended = cli("generate", "-w", root, "--backend", "openvino", "--prompt", "a cat", option, "24")
    ended.assert_refused(f"{option} 24", 16)


def test_an_image_of_another_size_is_drawn_over(root: Path, pipeline: Any) -> None:
    from diffusers import AutoPipelineForImage2Image

    quantized = QuantizedModel.from_checkpoint(load_checkpoint(root / CALIBRATED)).eval()
    image = np.random.default_rng(0).random((1, 32, 64, 3), np.float32)
    given = {"image": image, "strength": 0.7, "num_inference_steps": 4, "num_images_per_prompt": 2}
    drawn = []
    for each in (pipeline, faked(pipeline, quantized)):
        other = AutoPipelineForImage2Image.from_pipe(each)
        other.set_progress_bar_config(disable=True)
        drawn.append(draw(other, **given))
    assert drawn[0].shape == (2, 32, 64, 3)
    assert_the_same(*drawn)
