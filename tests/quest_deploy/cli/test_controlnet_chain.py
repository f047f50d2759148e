"""ControlNets through the commands, on a small pipeline in the hub's layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import quest_deploy
from exporters.graph_info import added_inputs, load_graph
from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.workspace import CALIBRATED, GRAPH, TRAJECTORIES, Workspace
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.models.control_images import edges
from quest_deploy.models.image_inputs import made_image
from quest_deploy.models.loading import load_model
from quest_deploy.models.residuals import unet_residuals
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.serving.pipeline import PipelineUNet
from quest_deploy.stages import EXPORT
from quest_deploy.stages.options import ExportOptions
from quest_deploy.stages.run import kept
from scripts.acceptance import random_lora
from tests.helpers import refused
from tests.pipelines import controlled, controlnet, t2i_adapter
from tests.quest_deploy.serving.local import LocalPipeline
from tests.quest_deploy.support import Chain, cli, in_this_process, png_of

BACKEND = "onnxruntime"
SHORT = ["--samples", "2", "--steps", "4", "--buckets", "2"]
EDGES = edges(made_image(3, 16, 16).image)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline and a ControlNet for it."""
    folder = tmp_path_factory.mktemp("controlled")
    pipeline = controlled(folder / "model")
    return pipeline, controlnet(folder / "net", pipeline)


@pytest.fixture(scope="module")
def calibrated(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace that was calibrated with and without the ControlNet, and its engine verified."""
    root = tmp_path_factory.mktemp("workspace") / "ws"
    pipeline, net = folders
    ok("calibrate", "--model", pipeline, "--bits", "w8a8", "--controlnet", f"{net}:0.8", w=root)
    for step in ("export", "reference", "build-engine", "verify"):
        ok(step, w=root)
    return root


def ok(command: str, *options: object, w: Path) -> Any:
    backend = ["--backend", BACKEND] if command in ("build-engine", "verify", "benchmark") else []
    short = SHORT if command == "calibrate" else ["--threads", "1"] if "build" in command else []
    ended = cli(command, "-w", w, *backend, *short, *options, "--json")
    assert ended.code == 0, ended.err
    return ended.json


def exported(root: Path) -> list[bytes]:
    """The graph and its weights."""
    return [(root / name).read_bytes() for name in (GRAPH, f"{GRAPH}.data")]


def draw(pipeline: Any, **options: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    steps = {"num_inference_steps": 4, "generator": generator, "output_type": "np"}
    return pipeline("a red cat", image=EDGES, **steps, **options).images


def plain_picture(found: Trajectories, model: Any) -> Any:
    """What the first sampling without a ControlNet ends in, uint8 [H, W, 3]."""
    scheduler = model.load_scheduler("ddim")
    scheduler.set_timesteps(len(found.timestep))
    first = found.controlled
    empty, asked = (found.output[-1, first + i] for i in (0, 1))
    guided = empty + model.guidance * (asked - empty)
    last = scheduler.step(guided, int(found.timestep[-1]), found.sample[-1, first]).prev_sample
    image = model.images(last[None].numpy())[0]
    return (127.5 * (image + 1)).round().astype(np.uint8).transpose(1, 2, 0)


@pytest.mark.slow
def test_half_of_the_samplings_are_recorded_with_it(
    calibrated: Path, folders: tuple[Path, Path]
) -> None:
    found = Trajectories.load(calibrated / TRAJECTORIES)
    assert (found.sample.shape[1], found.controlled, found.parts) == (4, 2, 2)
    model = load_model(Workspace.open(calibrated).source)
    assert found.residuals.keys() == unet_residuals(model.config).keys()
    net = diffusers.ControlNetModel.from_pretrained(folders[1])
    inputs = found.inputs(torch.tensor([1, 1]), torch.tensor([0, 1]))
    residuals = {name: inputs[name] for name in unet_residuals(model.config)}
    # It was shown the edges of what the plain sampling drew, under the same conditions.
    drawn = edges(Image.fromarray(plain_picture(found, model)))
    image = torch.from_numpy(np.asarray(drawn, np.float32).transpose(2, 0, 1) / 255)
    assert image.any()
    with torch.no_grad():
        down, mid = net(
            inputs["sample"],
            inputs["timestep"],
            inputs["encoder_hidden_states"],
            controlnet_cond=image.expand(2, -1, -1, -1),
            conditioning_scale=0.8,
            return_dict=False,
        )
    for value, expected in zip(residuals.values(), (*down, mid), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    states = found.conditions["encoder_hidden_states"]
    assert torch.equal(states[:2], states[2:])


@pytest.mark.slow
def test_the_engine_draws_what_the_float_pipeline_draws_and_what_the_fake_quantized_model_does(
    calibrated: Path, folders: tuple[Path, Path]
) -> None:
    pipeline, net = folders
    ours = quest_deploy.load_pipeline(calibrated, BACKEND, controlnet=net)
    assert type(ours) is diffusers.StableDiffusionControlNetPipeline
    theirs = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        pipeline, controlnet=ours.controlnet, safety_checker=None, requires_safety_checker=False
    )
    image, expected = draw(ours), draw(theirs)
    uncontrolled = draw(theirs, controlnet_conditioning_scale=0.0)
    assert np.abs(image - expected).mean() < 0.02
    assert np.abs(image - expected).mean() < 0.4 * np.abs(uncontrolled - expected).mean()

    model = load_model(Workspace.open(calibrated).source)
    fake: Any = QuantizedModel.from_checkpoint(load_checkpoint(calibrated / CALIBRATED)).eval()
    fake.added = dict.fromkeys(unet_residuals(model.config), 1)
    faked = model.load_pipeline(unet=PipelineUNet(fake, model.config), controlnet=ours.controlnet)
    assert np.abs(image - draw(faked)).mean() < 0.01


@pytest.mark.slow
def test_two_at_once_and_scales_reach_the_engine(
    calibrated: Path, folders: tuple[Path, Path]
) -> None:
    _, net = folders
    pipeline = quest_deploy.load_pipeline(calibrated, BACKEND, controlnet=[net, net])
    pipeline.set_progress_bar_config(disable=True)

    def drawn(*scales: float) -> Any:
        return pipeline(
            "a red cat",
            image=[EDGES, EDGES],
            controlnet_conditioning_scale=list(scales),
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images

    whole = drawn(1.0, 0.0)
    np.testing.assert_allclose(drawn(0.25, 0.75), whole, atol=0.05)
    assert np.abs(drawn(0.0, 0.0) - whole).max() > 0.05


@pytest.mark.slow
def test_the_other_commands_run_on_it_without_a_controlnet(calibrated: Path) -> None:
    with in_this_process():
        ok("benchmark", "--runs", "1", "--warmup", "0", "--batch", "1", w=calibrated)
    pipeline = quest_deploy.load_pipeline(calibrated, BACKEND, controlnet=None)
    assert type(pipeline) is diffusers.StableDiffusionPipeline
    pipeline.set_progress_bar_config(disable=True)
    assert np.isfinite(pipeline("a cat", num_inference_steps=2, output_type="np").images).all()
    shown = cli("inspect", calibrated / GRAPH)
    assert "mid_block_additional_residual" in shown.out


@pytest.mark.slow
def test_a_workspace_without_one_gets_the_inputs_by_export_alone_and_loses_them_again(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    root = tmp_path / "ws"
    ok("calibrate", "--model", folders[0], "--bits", "w4a8", w=root)
    ok("export", w=root)
    assert added_inputs(load_graph(root / GRAPH)) == ()
    plain = exported(root)
    ok("reference", w=root)
    ok("export", "--controlnet-inputs", w=root)
    assert len(added_inputs(load_graph(root / GRAPH))) == 5
    ok("build-engine", w=root)
    stale = cli("verify", "-w", root, "--backend", BACKEND)
    stale.assert_refused("mid_block_additional_residual", "reference")
    ok("reference", w=root)  # as exported
    assert ok("verify", w=root)["passed"]
    with refused("shapes"):
        wrong = controlnet(tmp_path / "net", folders[0], layers_per_block=2)
        quest_deploy.load_pipeline(root, BACKEND, controlnet=wrong)
    ok("export", "--no-controlnet-inputs", w=root)
    assert exported(root) == plain
    ok("build-engine", w=root)
    with refused("--controlnet-inputs"):
        quest_deploy.load_pipeline(root, BACKEND, controlnet=folders[1])


@pytest.mark.slow
def test_lora_keeps_what_was_recorded_and_how_it_was_exported(
    calibrated: Path, tmp_path: Path
) -> None:
    base, folded = tmp_path / "base", tmp_path / "folded"
    shutil.copytree(calibrated, base)
    ok("export", "--no-controlnet-inputs", w=base)
    random_lora.main(base, tmp_path / "style.safetensors")
    ok("lora", "--lora", tmp_path / "style.safetensors", "--output", folded, w=base)
    first, second = (Trajectories.load(x / TRAJECTORIES).residuals for x in (base, folded))
    assert first.keys() == second.keys()
    assert len(first) == 5
    assert kept(EXPORT, Workspace.open(folded), {}) == ExportOptions(controlnet_inputs=False)


@pytest.mark.slow
def test_a_t2i_adapter_goes_the_same_way(folders: tuple[Path, Path], tmp_path: Path) -> None:
    root, net = tmp_path / "ws", t2i_adapter(tmp_path / "adapter", folders[0])
    ok("calibrate", "--model", folders[0], "--bits", "w8a8", "--t2i-adapter", net, w=root)
    residuals = Trajectories.load(root / TRAJECTORIES).residuals
    assert len(residuals) == 3
    assert not residuals.pop("down_intrablock_additional_residual_2").any()  # the middle block's
    assert all(x.any() for x in residuals.values())
    for step in ("export", "reference", "build-engine"):
        ok(step, w=root)
    assert ok("verify", w=root)["passed"]
    ours = quest_deploy.load_pipeline(root, BACKEND, adapter=net)
    theirs = diffusers.StableDiffusionAdapterPipeline.from_pretrained(
        folders[0], adapter=ours.adapter, safety_checker=None, requires_safety_checker=False
    )
    assert np.abs(draw(ours) - draw(theirs)).mean() < 0.02
    with refused("--controlnet-inputs"):
        quest_deploy.load_pipeline(root, BACKEND, controlnet=folders[1])
    ended = cli("package", "-w", root, "--triton", tmp_path / "package")
    ended.assert_refused("--no-t2i-adapter-inputs")


def test_controlnets_that_cannot_be_are_refused_before_anything_is_sampled(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    pipeline, net = folders
    (tmp_path / "images").mkdir()
    made_image(0, 16, 16).image.save(tmp_path / "images" / "a.png")
    images = ["--control-images", tmp_path / "images"]
    cases: list[tuple[list[object], list[object]]] = [
        ([f"--controlnet={net}:nan"], ["--controlnet", "nan"]),
        ([f"--controlnet={net}:0"], ["--controlnet"]),
        (["--controlnet", tmp_path], ["--controlnet", "config.json"]),
        (["--controlnet", pipeline / "unet"], ["ControlNetModel", "UNet2DConditionModel"]),
        (images, ["--control-images", "--controlnet"]),
        ([f"--controlnet={net}", "--control-images", pipeline], ["--control-images", pipeline]),
        ([f"--controlnet={net}"] * 3 + images * 2, ["--control-images", "3"]),
    ]
    for options, facts in cases:
        ended = cli("calibrate", "-w", tmp_path / "ws", "--model", pipeline, *SHORT, *options)
        ended.assert_refused(*facts)
        assert not (tmp_path / "ws" / TRAJECTORIES).exists()


def test_a_model_without_text_takes_no_controlnet(
    folders: tuple[Path, Path], pipelines: Any, tmp_path: Path
) -> None:
    ended = cli(
        "calibrate", "-w", tmp_path / "ws", "--model", pipelines("ldm"), "--controlnet", folders[1]
    )
    ended.assert_refused(folders[1], "UNet2DModel")
    ended = cli(
        "export", "-w", tmp_path / "ws2", "--model", pipelines("ldm"), "--controlnet-inputs"
    )
    ended.assert_refused("UNet2DModel")


def test_a_controlnet_that_adds_nothing_is_refused(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    net = diffusers.ControlNetModel.from_pretrained(folders[1])
    with torch.no_grad():
        for convolution in (net.controlnet_mid_block, *net.controlnet_down_blocks):
            convolution.weight.zero_()
            convolution.bias.zero_()
    net.save_pretrained(tmp_path / "net")
    place = ["-w", tmp_path / "ws", "--model", folders[0]]
    both = ["--controlnet", folders[1], "--controlnet", tmp_path / "net"]
    ended = cli("calibrate", *place, *SHORT, *both)
    ended.assert_refused("--controlnet", tmp_path / "net", "zero")
    assert not (tmp_path / "ws").exists()


def test_split_shortcuts_refuse_the_inputs_alone_before_anything_is_sampled(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    place = ["-w", tmp_path / "ws", "--model", folders[0], "--split-shortcuts"]
    ended = cli("export", *place, "--controlnet-inputs")
    ended.assert_refused("--controlnet-inputs", "--whole-shortcuts")
    assert not (tmp_path / "ws" / TRAJECTORIES).exists()


@pytest.mark.slow
@pytest.mark.parametrize("recorded", ["--controlnet", "--t2i-adapter", None])
def test_split_shortcuts_export_and_verify_with_what_is_added(
    folders: tuple[Path, Path], tmp_path: Path, recorded: str | None
) -> None:
    root, net = tmp_path / "ws", folders[1]
    if recorded != "--controlnet":
        net = t2i_adapter(tmp_path / "adapter", folders[0])
    given = [recorded, net] if recorded else []
    ok("calibrate", "--model", folders[0], "--bits", "w8a8", "--split-shortcuts", *given, w=root)
    ok("export", *([] if recorded else ["--t2i-adapter-inputs"]), w=root)
    assert added_inputs(load_graph(root / GRAPH))
    ok("reference", w=root)
    ok("build-engine", w=root)
    assert ok("verify", w=root)["passed"]


@pytest.fixture(scope="module")
def package(calibrated: Path, folders: tuple[Path, Path]) -> Path:
    """The workspace's package with the ControlNet."""
    folder = calibrated.parent / "triton"
    made = ok("package", "--triton", folder, "--controlnet", folders[1], w=calibrated)
    assert made["models"] == ["controlnet", "text_encoder", "unet", "vae_decoder"]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_a_packages_image_is_the_one_of_diffusers_pipeline(
    calibrated: Path,
    folders: tuple[Path, Path],
    package: Path,
    size: tuple[int, int],
    guidance: float,
) -> None:
    local = LocalPipeline(package)
    pipeline = quest_deploy.load_pipeline(calibrated, BACKEND, controlnet=folders[1])
    pipeline.set_progress_bar_config(disable=True)
    height, width = size
    given = {"prompt": "a red cat", "seed": 5, "steps": 3, "height": height, "width": width}
    control = {"control_image": png_of(EDGES), "control_scale": 0.5}
    found = local.draw(**given, guidance=guidance, **control)
    expected = pipeline(
        "a red cat",
        image=EDGES,
        controlnet_conditioning_scale=0.5,
        height=height,
        width=width,
        guidance_scale=guidance,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert np.abs(found.astype(int) - np.asarray(expected, int)).max() <= 1
    without = local.draw(**given, guidance=guidance)
    assert np.abs(found.astype(int) - without.astype(int)).max() > 1
    nothing = local.draw(**given, guidance=guidance, **{**control, "control_scale": 0.0})
    np.testing.assert_array_equal(nothing, without)


@pytest.mark.slow
def test_control_images_beyond_the_limits_are_refused(package: Path) -> None:
    local = LocalPipeline(package)
    refusal = local.generation.InvalidRequestError
    cases: list[tuple[dict[str, Any], str]] = [
        ({"control_image": b"no image"}, "control_image"),
        ({"control_image": bytes(local.generation.MAX_IMAGE_BYTES + 1)}, "control_image"),
        ({"control_scale": 1.0}, "control_image"),
        ({"control_image": png_of(EDGES), "control_scale": -0.1}, "control_scale"),
        ({"control_image": png_of(EDGES), "control_scale": 11.0}, "control_scale"),
        ({"control_image": png_of(EDGES), "control_scale": float("nan")}, "control_scale"),
    ]
    for given, fact in cases:
        with pytest.raises(refusal, match=fact):
            local.draw(prompt="a cat", steps=1, **given)


@pytest.mark.slow
def test_a_package_takes_a_controlnet_exactly_where_the_graph_does(
    calibrated: Path, folders: tuple[Path, Path], text_chain: Chain
) -> None:
    folder = calibrated.parent / "other"
    ended = cli("package", "-w", calibrated, "--triton", folder)
    ended.assert_refused("--controlnet", "--no-controlnet-inputs")
    given = ["--controlnet", folders[1]]
    ended = cli("package", "-w", text_chain.root, "--triton", folder, *given)
    ended.assert_refused("--controlnet-inputs")
    wrong = controlnet(calibrated.parent / "wrong", folders[0], layers_per_block=2)
    ended = cli("package", "-w", calibrated, "--triton", folder, "--controlnet", wrong)
    ended.assert_refused("shapes")
    assert not folder.exists()
