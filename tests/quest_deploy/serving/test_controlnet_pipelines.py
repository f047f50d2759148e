"""Diffusers' pipelines with ControlNets, around an engine: its stand-in is the float UNet here, so
that the images must be those of diffusers' own pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch

from quest_deploy.models.control_images import edges
from quest_deploy.models.controls import load_control
from quest_deploy.models.image_inputs import made_image
from quest_deploy.models.loading import resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.residuals import CONTROLNET, KINDS, T2I_ADAPTER, unet_residuals
from quest_deploy.serving.pipeline import PipelineUNet
from tests.helpers import refused
from tests.pipelines import controlnet, t2i_adapter

if TYPE_CHECKING:
    from collections.abc import Callable

GIVEN = made_image(3, 16, 16)
EDGES = edges(GIVEN.image)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one": ("controlled", "StableDiffusionControlNetPipeline", {"image": EDGES}),
    "scaled": (
        "controlled",
        "StableDiffusionControlNetPipeline",
        {"image": EDGES, "controlnet_conditioning_scale": 0.5, "control_guidance_end": 0.6},
    ),
    "guessing": (
        "controlled",
        "StableDiffusionControlNetPipeline",
        {"image": EDGES, "guess_mode": True},
    ),
    "two": (
        "controlled",
        "StableDiffusionControlNetPipeline",
        {"image": [EDGES, GIVEN.image], "controlnet_conditioning_scale": [1.0, 0.5]},
    ),
    "xl": ("controlled-xl", "StableDiffusionXLControlNetPipeline", {"image": EDGES}),
    "inpaint": (
        "controlled-inpaint",
        "StableDiffusionControlNetInpaintPipeline",
        {"image": GIVEN.image, "mask_image": GIVEN.mask, "control_image": EDGES},
    ),
}


class FloatEngine:
    """The float UNet in the place of an engine that has a ControlNet's inputs."""

    def __init__(self, model: PipelineModel) -> None:
        self.unet = model.load_unet()
        self.added = dict.fromkeys(
            (name for kind in KINDS for name in unet_residuals(model.config, kind)), 1
        )

    def __call__(self, sample: Any, timestep: Any, **conditions: Any) -> Any:
        return self.unet(sample, timestep, **conditions, return_dict=False)[0]


@pytest.fixture
def nets(pipelines: Callable[[str], Path], tmp_path: Path) -> Callable[[str, int], list[Path]]:
    """So many ControlNets for a pipeline."""
    return lambda name, count: [
        controlnet(tmp_path / f"net-{i}", pipelines(name), seed=i) for i in range(count)
    ]


def draw(pipeline: Any, **options: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red cat",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **options,
    ).images


@pytest.mark.parametrize("case", CASES)
def test_around_an_engine_that_predicts_as_the_unet_it_draws_as_diffusers_own(
    pipelines: Callable[[str], Path], nets: Callable[[str, int], list[Path]], case: str
) -> None:
    name, expected, options = CASES[case]
    model = PipelineModel(resolve_source(str(pipelines(name))))
    loaded = [
        load_control(path, model, CONTROLNET) for path in nets(name, 2 if case == "two" else 1)
    ]
    given: Any = loaded if len(loaded) > 1 else loaded[0]
    engine: Any = FloatEngine(model)
    ours = model.load_pipeline(unet=PipelineUNet(engine, model.config), controlnet=given)
    assert type(ours).__name__ == expected
    kind = getattr(diffusers, expected)
    theirs = (
        kind.from_pretrained(
            model.folder, controlnet=given, safety_checker=None, requires_safety_checker=False
        )
        if name != "controlled-xl"
        else kind.from_pretrained(model.folder, controlnet=given)
    )
    image = draw(ours, **options)
    np.testing.assert_allclose(image, draw(theirs, **options), atol=1e-5)
    without = model.load_pipeline(unet=PipelineUNet(engine, model.config))
    plain = {k: x for k, x in options.items() if case == "inpaint" and k != "control_image"}
    assert np.abs(image - draw(without, **plain)).max() > 1e-3  # it is controlled


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("controlled", "StableDiffusionAdapterPipeline"),
        ("controlled-xl", "StableDiffusionXLAdapterPipeline"),
    ],
)
def test_with_a_t2i_adapter_it_draws_as_diffusers_own(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str, expected: str
) -> None:
    model = PipelineModel(resolve_source(str(pipelines(name))))
    adapter = load_control(t2i_adapter(tmp_path / "net", pipelines(name)), model, T2I_ADAPTER)
    engine: Any = FloatEngine(model)
    ours = model.load_pipeline(unet=PipelineUNet(engine, model.config), adapter=adapter)
    assert type(ours).__name__ == expected
    without = {} if "xl" in name else {"safety_checker": None, "requires_safety_checker": False}
    theirs = getattr(diffusers, expected).from_pretrained(model.folder, adapter=adapter, **without)
    options: dict[str, Any] = {"image": EDGES, "adapter_conditioning_scale": 0.8}
    image = draw(ours, **options)
    np.testing.assert_allclose(image, draw(theirs, **options), atol=1e-5)
    assert np.abs(image - draw(ours, image=EDGES, adapter_conditioning_scale=0.0)).max() > 1e-3


def test_a_t2i_adapter_for_another_unet_is_refused(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    model = PipelineModel(resolve_source(str(pipelines("controlled"))))
    folder = t2i_adapter(tmp_path / "net", pipelines("controlled-xl"))
    with refused(folder, "shapes"):
        load_control(folder, model, T2I_ADAPTER)
    with refused("ControlNetModel", "T2IAdapter"):
        load_control(folder, model, CONTROLNET)


def test_an_engine_without_the_inputs_refuses_what_a_controlnet_adds(
    pipelines: Callable[[str], Path], nets: Callable[[str, int], list[Path]]
) -> None:
    model = PipelineModel(resolve_source(str(pipelines("controlled"))))
    engine: Any = FloatEngine(model)
    engine.added = {}
    (path,) = nets("controlled", 1)
    unet = PipelineUNet(engine, model.config)
    pipeline = model.load_pipeline(unet=unet, controlnet=load_control(path, model, CONTROLNET))
    with refused("down_block_additional_residuals", "--controlnet-inputs"):
        draw(pipeline, image=EDGES)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"block_out_channels": (16, 24)}, ["shapes"]),
        ({"layers_per_block": 2}, ["shapes"]),
        ({"conditioning_embedding_out_channels": (8, 8, 16)}, ["pixels"]),
        ({"in_channels": 9}, ["in_channels"]),
        ({"cross_attention_dim": 8}, ["cross_attention_dim"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_controlnet_for_another_unet_is_refused_by_what_differs(
    pipelines: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any], facts: list[str]
) -> None:
    folder = controlnet(tmp_path / "net", pipelines("controlled"), **changes)
    model = PipelineModel(resolve_source(str(pipelines("controlled"))))
    with refused(folder, *facts):
        load_control(folder, model, CONTROLNET)


def test_the_controlnet_of_another_family_is_refused(
    pipelines: Callable[[str], Path], nets: Callable[[str, int], list[Path]]
) -> None:
    model = PipelineModel(resolve_source(str(pipelines("controlled-xl"))))
    (path,) = nets("controlled", 1)
    with refused(path, "addition_embed_type", "shapes"):
        load_control(path, model, CONTROLNET)
    with refused("ControlNetModel", "UNet2DConditionModel"):
        load_control(model.folder / "unet", model, CONTROLNET)


def test_edges_are_thin_and_where_the_shades_change() -> None:
    from PIL import Image

    levels = np.zeros((32, 32, 3), np.uint8)
    levels[8:24, 10:20] = 255
    found = np.asarray(edges(Image.fromarray(levels)))[:, :, 0] > 0
    assert found[:6].sum() == found[:, :8].sum() == 0
    assert (found[12:20].sum(1) == 2).all()  # one pixel at each side of the box
    assert not np.asarray(edges(Image.new("RGB", (16, 16), (90, 10, 200)))).any()
