"""Diffusers' pipelines with ControlNets, around an engine: its stand-in is the float UNet here, so
that the images must be those of diffusers' own pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from quest_deploy.artifacts.image_folder import ImageFolder
from quest_deploy.artifacts.scaled_folder import ScaledFolder
from quest_deploy.models.control_images import edges
from quest_deploy.models.controls import Controls, check_fits, load_control
from quest_deploy.models.image_inputs import made_image
from quest_deploy.models.loading import resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.residuals import CONTROLNET, KINDS, T2I_ADAPTER, unet_residuals
from quest_deploy.serving.pipeline import PipelineUNet
from quest_deploy.serving.pipeline import _controls as given_controls
from tests.helpers import refused
from tests.pipelines import controlnet, t2i_adapter
from tests.quest_deploy.serving.float_engine import FloatEngine, draw

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


@pytest.fixture
def nets(pipelines: Callable[[str], Path], tmp_path: Path) -> Callable[[str, int], list[Path]]:
    """So many ControlNets for a pipeline."""
    return lambda name, count: [
        controlnet(tmp_path / f"net-{i}", pipelines(name), seed=i) for i in range(count)
    ]


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
    engine: Any = FloatEngine(model, *KINDS)
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
    engine: Any = FloatEngine(model, *KINDS)
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


@pytest.mark.parametrize(
    ("kind", "drawn"),
    [
        (T2I_ADAPTER, "StableDiffusionInpaintPipeline"),
        (CONTROLNET, "StableDiffusionPAGPipeline"),
        (CONTROLNET, "StableDiffusionInstructPix2PixPipeline"),
    ],
)
def test_what_diffusers_has_no_pipeline_for_is_refused_when_it_is_loaded(
    pipelines: Callable[[str], Path], tmp_path: Path, kind: str, drawn: str
) -> None:
    folder = pipelines("controlled")
    model = PipelineModel(resolve_source(str(folder)))
    made = {CONTROLNET: controlnet, T2I_ADAPTER: t2i_adapter}[kind](tmp_path / "net", folder)
    load_control(made, model, kind)
    model.index["_class_name"] = drawn
    with refused(made, drawn, "StableDiffusionPipeline"):
        load_control(made, model, kind)


def test_a_controlnet_whose_residuals_have_no_height_and_width_is_refused(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    model = PipelineModel(resolve_source(str(pipelines("controlled"))))
    net = controlnet(tmp_path / "net", pipelines("controlled"), global_pool_conditions=True)
    with refused(net, "global_pool_conditions"):
        load_control(net, model, CONTROLNET)


def test_a_t2i_adapter_in_half_precision_fits_as_another_does(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    model = PipelineModel(resolve_source(str(pipelines("controlled"))))
    adapter = load_control(t2i_adapter(tmp_path / "net", model.folder), model, T2I_ADAPTER)
    check_fits(adapter.half(), model, T2I_ADAPTER, "adapter")


def controls_of(model: PipelineModel, folders: dict[str, list[str]], images: Any = ()) -> Controls:
    given = {k: [ScaledFolder.of(x, k) for x in each] for k, each in folders.items()}
    return Controls(given, images, model, 3)


@torch.no_grad()
def test_what_several_add_is_summed_each_shown_its_own_images_in_turn(
    pipelines: Callable[[str], Path], nets: Callable[[str, int], list[Path]], tmp_path: Path
) -> None:
    model = PipelineModel(resolve_source(str(pipelines("controlled"))))
    first, second = nets("controlled", 2)
    images = []
    for i, colors in enumerate((["red", "lime"], ["blue"])):
        (folder := tmp_path / f"images-{i}").mkdir()
        for color in colors:
            Image.new("RGB", (32, 32), color).save(folder / f"{color}.png")
        images.append(ImageFolder.of(folder))
    controls = controls_of(model, {CONTROLNET: [f"{first}:0.5", str(second)]}, images)
    shown = controls.images(np.zeros((3, 4, 8, 8), np.float32))
    colors = [[tuple(x[:, 5, 5].tolist()) for x in each] for each in shown.values()]
    lime, red, blue = (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
    assert colors == [[lime, red, lime], [blue] * 3]
    sample, timestep = torch.randn(3, 4, 8, 8), torch.tensor(500)
    conditions = model.null_conditions(3)
    found = controls(sample, timestep, **conditions, **shown)
    expected: list[Any] = []
    for path, scale, image in zip((first, second), (0.5, 1.0), shown.values(), strict=True):
        down, mid = load_control(path, model, CONTROLNET)(
            sample,
            timestep,
            conditions["encoder_hidden_states"],
            controlnet_cond=image,
            conditioning_scale=scale,
            return_dict=False,
        )
        expected = [a + b for a, b in zip(expected or [0.0] * 5, [*down, mid], strict=True)]
    names = list(unet_residuals(model.config))
    assert found.keys() == set(names)
    for name, other in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], other)


def test_only_the_images_that_are_shown_are_read(
    pipelines: Callable[[str], Path], nets: Callable[[str, int], list[Path]], tmp_path: Path
) -> None:
    model = PipelineModel(resolve_source(str(pipelines("controlled"))))
    (folder := tmp_path / "images").mkdir()
    for name in "abcd":
        EDGES.save(folder / f"{name}.png")
    (folder / "d.png").write_bytes(b"no image")
    nets_of_it = {CONTROLNET: [str(nets("controlled", 1)[0])]}
    controls_of(model, nets_of_it, [ImageFolder.of(folder)])
    (folder / "a.png").unlink()
    with refused("d.png"):
        controls_of(model, nets_of_it, [ImageFolder.of(folder)])


@torch.no_grad()
def test_a_t2i_adapter_of_one_channel_is_shown_shades(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    model = PipelineModel(resolve_source(str(pipelines("controlled"))))
    path = t2i_adapter(tmp_path / "net", model.folder, in_channels=1)
    controls = controls_of(model, {T2I_ADAPTER: [f"{path}:0.5"]})
    image = torch.rand(2, 3, 16, 16)
    found = controls(torch.zeros(2, 4, 8, 8), torch.tensor(0), control_image_0=image)
    features = load_control(path, model, T2I_ADAPTER)(image.mean(1, keepdim=True))
    for value, feature in zip(found.values(), features, strict=False):
        torch.testing.assert_close(value, 0.5 * feature)
    assert len(found) == 1 + len(features)
    assert not [*found.values()][-1].any()


def test_a_controlnet_that_was_changed_names_its_option(
    pipelines: Callable[[str], Path], nets: Callable[[str, int], list[Path]]
) -> None:
    model = PipelineModel(resolve_source(str(pipelines("controlled"))))
    (path,) = nets("controlled", 1)
    given = ScaledFolder.of(str(path), "--controlnet")
    path.rename(path.with_name("moved"))
    with refused(path, "quest-deploy calibrate --controlnet"):
        Controls({CONTROLNET: [given]}, (), model, 1)


def test_none_is_no_controlnet(pipelines: Callable[[str], Path]) -> None:
    model = PipelineModel(resolve_source(str(pipelines("controlled"))))
    found = model.load_pipeline(controlnet=None, adapter=None)
    assert type(found) is diffusers.StableDiffusionPipeline


@pytest.mark.parametrize("name", ["lllyasviel/sd-controlnet-canny", "net.safetensors"])
def test_what_is_no_folder_of_a_controlnet_is_refused_by_its_name(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    (tmp_path / "net.safetensors").touch()
    model = PipelineModel(resolve_source(str(pipelines("controlled"))))
    with refused(name, "ControlNetModel", "config.json"):
        load_control(tmp_path / name, model, CONTROLNET)


def test_an_empty_list_of_controlnets_is_refused(pipelines: Callable[[str], Path]) -> None:
    model = PipelineModel(resolve_source(str(pipelines("controlled"))))
    with refused("controlnet"):
        given_controls([], model, "controlnet")


def test_an_engine_without_the_inputs_refuses_what_a_controlnet_adds(
    pipelines: Callable[[str], Path], nets: Callable[[str, int], list[Path]]
) -> None:
    model = PipelineModel(resolve_source(str(pipelines("controlled"))))
    engine: Any = FloatEngine(model)
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
    levels = np.zeros((32, 32, 3), np.uint8)
    levels[8:24, 10:20] = 255
    found = np.asarray(edges(Image.fromarray(levels)))[:, :, 0] > 0
    assert found[:6].sum() == found[:, :8].sum() == 0
    assert (found[12:20].sum(1) == 2).all()  # one pixel at each side of the box
    assert not np.asarray(edges(Image.new("RGB", (16, 16), (90, 10, 200)))).any()
