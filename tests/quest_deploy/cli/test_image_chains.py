"""Models whose channels in and out differ, through every command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from PIL import Image

from exporters.graph_info import graph_info, load_graph
from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.workspace import CHECKPOINT, Workspace
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.evaluation.sampling import sample_images
from quest_deploy.models.image_inputs import made_image
from quest_deploy.models.loading import load_model
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.serving.pipeline import load_pipeline
from quest_deploy.serving.triton.server import PackageServer, missing_server
from tests.pipelines import PIPELINES
from tests.quest_deploy.serving.local import LocalPipeline
from tests.quest_deploy.support import cli, in_this_process

text_format = pytest.importorskip("google.protobuf.text_format")
model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
pytestmark = pytest.mark.slow
BACKEND = ("--backend", "onnxruntime")
IMAGES = {"inpaint": True, "pix2pix": False}
"""Whether each has masks."""
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("finetune", "--temporal-steps", "1", "--sensitive-steps", "1", "--batch", "2"),
    ("export",),
    ("reference",),
    ("build-engine", *BACKEND, "--threads", "1"),
    ("build-engine", "--backend", "openvino", "--threads", "1"),
    ("verify", *BACKEND),
    ("verify", "--backend", "openvino"),
    ("benchmark", *BACKEND, "--runs", "1", "--warmup", "0", "--batch", "2"),
    ("generate", *BACKEND, "--steps", "2"),
    ("evaluate", *BACKEND, "--images", "2", "--steps", "2"),
    ("sensitivity", "--samples", "1"),
    ("run", *BACKEND),
)


@pytest.fixture(scope="module", params=["inpaint", "pix2pix", "learned-variance"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace that went through every command; not to be changed but by ``generate``."""
    folder = tmp_path_factory.mktemp(request.param)
    workspace, given = folder / request.param, ()
    PIPELINES[request.param](folder / "model")
    if request.param in IMAGES:
        pictures = folder / "pictures"
        pictures.mkdir()
        for i in range(2):
            each = made_image(i, 20, 28)
            each.image.save(pictures / f"{i}.jpg")
            if IMAGES[request.param] and each.mask is not None:
                each.mask.save(pictures / f"{i}-mask.png")
        given = ("--image-folder", pictures)
    few = ("--samples", "1", "--steps", "2", "--buckets", "2")
    with in_this_process():
        for command, *options in (
            ("calibrate", "--model", folder / "model", *few, *given),
            *COMMANDS,
        ):
            ended = cli(command, "-w", workspace, *options)
            assert ended.code == 0, f"{command}: {ended.err}"
    return workspace


def _quantized(workspace: Path) -> QuantizedModel:
    return QuantizedModel.from_checkpoint(load_checkpoint(workspace / CHECKPOINT)).eval()


def test_the_graph_has_one_sample_with_all_channels_and_the_images_are_recorded(
    made: Path,
) -> None:
    model = load_model(Workspace.open(made).source)
    config: Any = getattr(model, "config", {})
    graph = load_graph(made / "unet.onnx")
    assert graph_info(graph).sample_shape[0] == config["in_channels"]
    assert {value.name for value in graph.graph.inputs} <= {
        "sample",
        "timestep",
        "encoder_hidden_states",
    }
    recorded = Workspace.open(made).stages["calibrate"].options
    assert ("image_folder" in recorded) == (made.name in IMAGES)


def test_the_engine_predicts_what_the_fake_quantized_model_predicts(made: Path) -> None:
    model, quantized = load_model(Workspace.open(made).source), _quantized(made)
    settings: dict[str, Any] = {"steps": 2, "guidance": model.guidance}
    labels = np.zeros(1, np.int64)
    with EngineUNet.load(Workspace.open(made), "onnxruntime") as engine:
        found = sample_images(model, engine, labels, **settings)
    expected = sample_images(model, quantized, labels, **settings)
    assert np.abs(found - expected).mean() < 0.01
    assert expected.std() > 0.01


def drawn_by_the_engines_pipeline(workspace: Path, **images: Any) -> np.ndarray:
    """The image, int [H, W, C], by diffusers' pipeline around the engine."""
    pipeline = load_pipeline(workspace, "onnxruntime")
    pipeline.scheduler = load_model(Workspace.open(workspace).source).load_scheduler("ddim")
    generator = torch.Generator().manual_seed(5)
    settings = {"guidance_scale": 4.0, "num_inference_steps": 3, "generator": generator}
    return np.asarray(pipeline("a red cat", **settings, **images).images[0], int)


def test_generate_draws_the_given_image_as_the_engines_pipeline_does(
    made: Path, tmp_path: Path
) -> None:
    if made.name not in IMAGES:
        pytest.skip("it takes no image")
    each = made_image(9, 16, 16)
    each.image.save(tmp_path / "image.png")
    options: list[Any] = ["--image", tmp_path / "image.png"]
    given: dict[str, Any] = {"image": each.image}
    if IMAGES[made.name]:
        assert each.mask is not None
        each.mask.save(tmp_path / "mask.png")
        options += ["--mask", tmp_path / "mask.png"]
        given["mask_image"] = each.mask
    else:
        options += ["--image-guidance", "2"]
        given["image_guidance_scale"] = 2.0
    ended = cli(
        *("generate", "-w", made, *BACKEND, "--prompt", "a red cat", "--steps", "3"),
        *("--guidance", "4", "--seed", "5", *options, "--json"),
    )
    assert ended.code == 0, ended.err
    found = np.asarray(Image.open(ended.json["picture"]), int)
    assert np.array_equal(found, drawn_by_the_engines_pipeline(made, **given))


@pytest.mark.skipif(missing_server() is not None, reason=str(missing_server()))
def test_the_probe_finds_a_server_healthy_whose_requests_need_images(
    made: Path, tmp_path: Path
) -> None:
    package = tmp_path / "out"
    ended = cli("package", "--triton", package, "-w", made, "--max-steps", "1", "--json")
    assert ended.code == 0, ended.err
    with PackageServer(package, tmp_path / "server.log") as server:
        probe = [sys.executable, package / "health.py", f"http://{server.http}"]
        ended = subprocess.run(probe, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr


def test_generate_refuses_images_that_the_model_does_not_take(made: Path, tmp_path: Path) -> None:
    made_image(9, 16, 16).image.save(tmp_path / "image.png")
    image, mask = ("--image", tmp_path / "image.png"), ("--mask", tmp_path / "image.png")
    wrong: dict[str, list[tuple[Any, ...]]] = {
        "inpaint": [image, mask, ("--image-guidance", "2")],
        "pix2pix": [(*image, *mask), ("--image-guidance", "0.5")],
        "learned-variance": [image, mask, ("--image-guidance", "2")],
    }
    for options in wrong[made.name]:
        cli("generate", "-w", made, *BACKEND, *options).assert_refused(options[-2])


def test_a_package_draws_what_the_engines_pipeline_draws(made: Path, tmp_path: Path) -> None:
    ended = cli("package", "--triton", tmp_path / "out", "-w", made, "--json")
    assert ended.code == 0, ended.err
    assert ("vae_encoder" in ended.json["models"]) == (made.name in IMAGES)
    for name in ("unet", *ended.json["models"]):
        folder = tmp_path / "out" / "models" / name
        config = text_format.Parse(
            (folder / "config.pbtxt").read_text(), model_config.ModelConfig()
        )
        session = InferenceSession(folder / "1" / "model.onnx")
        for entries, values in (
            (config.input, session.get_inputs()),
            (config.output, session.get_outputs()),
        ):
            found = {entry.name: list(entry.dims) for entry in entries}
            for value in values:
                if (dims := value.shape[1:]) and value.name != "encoder_hidden_states":
                    known = [size if isinstance(size, int) else -1 for size in dims]
                    assert found[value.name] == known
    local = LocalPipeline(tmp_path / "out")
    if made.name not in IMAGES:
        workspace = Workspace.open(made)
        model = load_model(workspace.source)
        with EngineUNet.load(workspace, "onnxruntime") as engine:
            (drawn,) = sample_images(
                model, engine, np.zeros(1, np.int64), scheduler="ddpm", steps=3, seed=5
            )
        found = local.draw(scheduler="ddpm", steps=3, seed=5)
        assert np.abs(found - (drawn.transpose(1, 2, 0) + 1) * 127.5).max() <= 1
        return
    each = made_image(9, 16, 16)
    assert each.mask is not None
    each.image.save(tmp_path / "image.png")
    each.mask.save(tmp_path / "mask.png")
    files = {"init_image": (tmp_path / "image.png").read_bytes()}
    given: dict[str, Any] = {"image": each.image}
    if IMAGES[made.name]:
        files["mask_image"] = (tmp_path / "mask.png").read_bytes()
        given["mask_image"] = each.mask
    expected = drawn_by_the_engines_pipeline(made, **given)
    found = local.draw(prompt="a red cat", steps=3, seed=5, guidance=4.0, **files)
    # The encoder's last bits may change a code.
    assert np.abs(found.astype(int) - expected).mean() < 2
