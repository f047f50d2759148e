"""IP-Adapters through the commands, on small pipelines in the hub's layout."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers import CLIPVisionConfig

import quest_deploy
from exporters.graph_info import added_inputs, load_graph
from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.reference import Key
from quest_deploy.artifacts.workspace import (
    CALIBRATED,
    CHECKPOINT,
    GRAPH,
    REFERENCE,
    TRAJECTORIES,
    Workspace,
)
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.models.image_inputs import made_image
from quest_deploy.models.ip_adapters import IMAGE_PARTS, load_image_parts
from quest_deploy.models.loading import load_model
from quest_deploy.models.residuals import IMAGE_PROMPT, IMAGE_SCALE, IMAGE_TOKENS
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.serving.client import request_image
from quest_deploy.serving.pipeline import PipelineUNet
from quest_deploy.serving.triton.server import PackageServer, missing_server
from tests.helpers import refused
from tests.pipelines import IMAGE_TOKENS as COUNT
from tests.pipelines import IMAGE_WIDTH, PLUS_TOKENS, controlnet, ip_adapter
from tests.quest_deploy.serving.local import LocalPipeline
from tests.quest_deploy.support import cli, in_this_process, png_of

REQUEST = {"prompt": "a red cat", "seed": 0, "steps": 4, "guidance": 5.0}


SHOWN = made_image(4, 20, 24).image
IMAGE = {"ip_adapter_image": png_of(SHOWN)}
CONTROL = {"control_image": png_of(made_image(3, 16, 16).image)}
BACKENDS = ("onnxruntime", "openvino")
SHORT = ["--samples", "2", "--steps", "4", "--buckets", "2"]
TRAIN = ["--temporal-steps", "1", "--sensitive-steps", "1", "--batch", "2"]


def ok(command: str, *options: object, w: Path) -> Any:
    ended = cli(command, "-w", w, *options, "--json")
    assert ended.code == 0, ended.err
    return ended.json


def calibrate(model: Path, adapter: Path, root: Path, *options: object) -> None:
    given = ["--model", model, "--ip-adapter", f"{adapter}:0.8"]
    ok("calibrate", *given, *SHORT, *options, w=root)


@pytest.fixture(scope="module")
def chain(pipelines: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a plain IP-Adapter, its attention quantized, finetuned, and the engines of
    two backends built.
    """
    folder = tmp_path_factory.mktemp("prompted")
    root = folder / "ws"
    adapter = ip_adapter(folder / "models", pipelines("controlled"))
    bits = ["--bits", "w8a8", "--attention-bits", "8", "--softmax-bits", "8"]
    calibrate(pipelines("controlled"), adapter, root, *bits)
    ok("finetune", *TRAIN, w=root)
    for step in ("export", "reference"):
        ok(step, w=root)
    for backend in BACKENDS:
        ok("build-engine", "--backend", backend, "--threads", "1", w=root)
    return root


@pytest.mark.slow
def test_half_of_the_samplings_are_shown_an_image(chain: Path) -> None:
    found = Trajectories.load(chain / TRAJECTORIES)
    assert (found.sample.shape[1], found.controlled, found.parts) == (4, 2, 2)
    assert found.conditions[IMAGE_SCALE].tolist() == pytest.approx([0.8, 0.8, 0.0, 0.0])
    tokens = found.conditions[IMAGE_TOKENS]
    assert tokens.shape == (4, COUNT, 16)
    assert not tokens[2:].any()
    assert not torch.equal(tokens[0], tokens[1])  # those of no image, and the image's
    assert torch.equal(*found.conditions["encoder_hidden_states"].chunk(2))


@pytest.mark.slow
def test_its_layers_and_products_are_quantized_and_their_scales_learned(chain: Path) -> None:
    before, after = (load_checkpoint(chain / x) for x in (CALIBRATED, CHECKPOINT))
    layers = [name for name in after.layers if ".ip_adapter.to_" in name]
    assert len(layers) == 2 * sum(".attn2.to_q" in name for name in after.layers) > 0
    (quantizer,) = {after.quantizer_of(name).name for name in layers}  # they read one tensor
    assert after.quantizers[quantizer].layers == tuple(layers)
    assert any(name.endswith(".ip_adapter.scores") for name in after.matmuls)
    assert after.architecture.ip_adapter
    scale = (x.quantizers[quantizer].scale for x in (before, after))
    assert not np.array_equal(*scale)
    for name in layers:
        codes = (x.layers[name].weight_codes for x in (before, after))
        assert np.array_equal(*codes)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_its_engine_computes_the_fake_quantized_model_and_without_an_image_the_same_as_at_scale_0(
    chain: Path, backend: str
) -> None:
    assert ok("verify", "--backend", backend, w=chain)["passed"]
    assert added_inputs(load_graph(chain / GRAPH)) == IMAGE_PROMPT
    recorded = Trajectories.load(chain / TRAJECTORIES)
    inputs = recorded.inputs(torch.tensor([0, 2]), torch.tensor([1, 1]))
    model = QuantizedModel.from_checkpoint(load_checkpoint(chain / CHECKPOINT)).eval()
    with torch.no_grad(), EngineUNet.load(Workspace.open(chain), backend) as engine:
        found, expected = engine(**inputs), model(**inputs)
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
        plain = {name: x for name, x in inputs.items() if name not in IMAGE_PROMPT}
        off = {**inputs, IMAGE_SCALE: torch.zeros(2)}
        without = engine(**plain)
        assert torch.equal(engine(**off), without)
        assert (found - without).abs().max() > 0.05
        assert torch.equal(model(**plain), model(**off))


@pytest.mark.slow
def test_records_hold_an_images_tokens(chain: Path) -> None:
    records = sorted((chain / REFERENCE).glob("buckets-*.safetensors"))
    assert records
    for path in records:
        tensors = load_file(path)
        assert tensors[Key.input(IMAGE_SCALE)][0] == pytest.approx(0.8)
        assert tensors[Key.input(IMAGE_TOKENS)][0].any()


@pytest.mark.slow
def test_the_other_commands_run_on_it(chain: Path) -> None:
    timed = ["--runs", "1", "--warmup", "0", "--batch", "1", "--backend", BACKENDS[0]]
    with in_this_process():
        ok("benchmark", *timed, w=chain)
    measured = ok("sensitivity", "--samples", "1", w=chain)["layers"]
    errors = [x["mse"] for x in measured if ".ip_adapter.to_" in x["layer"]]
    assert errors
    assert all(error > 0 for error in errors)
    assert IMAGE_TOKENS in cli("inspect", chain / GRAPH).out
    assert "ip-adapter.safetensors" in cli("inspect", chain).out
    given = [f"--ip-adapter={chain.parent / 'models' / 'ip-adapter.safetensors'}:0.5"]
    refused = cli("calibrate", "-w", chain, *SHORT, *given)
    refused.assert_refused("ip-adapter.safetensors:0.5", "ip-adapter.safetensors:0.8", "-w")


@pytest.mark.slow
def test_generate_draws_without_the_image_encoder(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unused(model: object) -> Any:
        raise AssertionError

    monkeypatch.setattr("quest_deploy.serving.pipeline.load_image_parts", unused)
    ok("generate", "--backend", BACKENDS[0], "--steps", "2", w=chain)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mse", "qdiff"])
def test_a_plus_adapter_goes_through_stable_diffusion_xl(
    pipelines: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    adapter = ip_adapter(tmp_path / "models", pipelines("controlled-xl"), plus=True)
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 30), "red").save(folder / "a.png")
    shown = ["--ip-adapter-images", folder, "--method", method]
    qdiff = ["--rounding-steps", "2", "--scale-steps", "1", "--reconstruction-samples", "4"]
    root = tmp_path / "ws"
    calibrate(pipelines("controlled-xl"), adapter, root, *shown, *(qdiff * (method == "qdiff")))
    assert Trajectories.load(root / TRAJECTORIES).conditions[IMAGE_TOKENS].shape[1] == PLUS_TOKENS
    if method == "mse":
        ok("finetune", *TRAIN, "--gradient-checkpointing", w=root)
    for step in ("export", "reference"):
        ok(step, w=root)
    ok("build-engine", "--backend", "onnxruntime", "--threads", "1", w=root)
    assert ok("verify", "--backend", "onnxruntime", w=root)["passed"]
    if method == "mse":
        ok("package", "--triton", tmp_path / "triton", w=root)
        found = LocalPipeline(tmp_path / "triton").draw(**REQUEST, ip_adapter_image=png_of(SHOWN))
        pipeline = quest_deploy.load_pipeline(root, "onnxruntime")
        assert_same_image(found, draw(pipeline, guidance_scale=5.0, output_type="pil")[0])


@pytest.fixture(scope="module")
def both(
    pipelines: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A workspace that was calibrated with a ControlNet and an IP-Adapter, the ControlNet, and the
    package of both.
    """
    folder, model = tmp_path_factory.mktemp("both"), pipelines("controlled")
    root, package, net = folder / "ws", folder / "triton", controlnet(folder / "net", model)
    calibrate(model, ip_adapter(folder / "models", model), root, "--controlnet", net)
    for step in ("export", "reference"):
        ok(step, w=root)
    ok("build-engine", "--backend", BACKENDS[0], "--threads", "1", w=root)
    ok("package", "--triton", package, "--controlnet", net, w=root)
    return root, net, package


@pytest.mark.slow
def test_a_controlnet_and_an_ip_adapter_go_together_from_calibration_to_a_package(
    both: tuple[Path, Path, Path],
) -> None:
    root, net, package = both
    recorded = Trajectories.load(root / TRAJECTORIES)
    assert recorded.residuals
    assert recorded.conditions[IMAGE_SCALE].tolist() == pytest.approx([0.8, 0.8, 0.0, 0.0])
    assert set(added_inputs(load_graph(root / GRAPH))) == {*recorded.residuals, *IMAGE_PROMPT}
    assert ok("verify", "--backend", BACKENDS[0], w=root)["passed"]
    local = LocalPipeline(package)
    found = local.draw(**REQUEST, **IMAGE, **CONTROL)
    pipeline = quest_deploy.load_pipeline(root, BACKENDS[0], controlnet=net)
    given = {"image": made_image(3, 16, 16).image, "guidance_scale": 5.0, "output_type": "pil"}
    assert_same_image(found, draw(pipeline, **given)[0])
    for less in (IMAGE, CONTROL):
        assert np.abs(found.astype(int) - local.draw(**REQUEST, **less).astype(int)).max() > 1


@pytest.mark.slow
def test_engines_of_the_parts_draw_with_both_what_the_float_parts_draw(
    both: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    root, net, _ = both
    with_parts = shutil.copytree(root, tmp_path / "ws")
    ok("export-parts", w=with_parts)
    ok("build-parts", "--backend", BACKENDS[0], w=with_parts)
    given = {"image": made_image(3, 16, 16).image, "guidance_scale": 5.0}
    ours, theirs = (
        quest_deploy.load_pipeline(x, BACKENDS[0], controlnet=net) for x in (with_parts, root)
    )
    assert type(ours.vae) is not type(theirs.vae)
    assert np.abs(draw(ours, **given) - draw(theirs, **given)).mean() < 0.01


@pytest.mark.slow
@pytest.mark.skipif(missing_server() is not None, reason=str(missing_server()))
def test_a_server_draws_with_both_what_its_models_draw_here_and_refuses_what_is_no_image(
    both: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, _, package = both
    local = LocalPipeline(package)
    with PackageServer(package, tmp_path / "server.log") as server:
        for given in ({}, IMAGE, CONTROL, {**IMAGE, **CONTROL, "control_scale": 0.5}):
            served = Image.open(io.BytesIO(request_image(server.grpc, {**REQUEST, **given}).png))
            assert_same_image(np.asarray(served), local.draw(**REQUEST, **given))
        for name in ("control_image", "ip_adapter_image"):
            with refused(name):
                request_image(server.grpc, {**REQUEST, name: b"no image"})


@pytest.mark.slow
def test_a_lora_is_folded_in_beside_it(chain: Path, tmp_path: Path) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    factors = {"lora_A": torch.full((2, 16), 0.2), "lora_B": torch.full((16, 2), 0.2)}
    style = tmp_path / "style.safetensors"
    save_file({f"{layer}.{name}.weight": x for name, x in factors.items()}, style)
    made = ok("lora", "--lora", f"{style}:0.8", "--output", tmp_path / "ws", w=chain)
    assert made["changed_layers"] == 1
    root = Path(made["workspace"])
    before, after = load_checkpoint(chain / CHECKPOINT), load_checkpoint(root / CALIBRATED)
    changed = [
        name
        for name, x in before.layers.items()
        if not np.array_equal(x.weight_codes, after.layers[name].weight_codes)
    ]
    assert [f"unet.{name}" for name in changed] == [layer]
    for step in ("export", "reference"):
        ok(step, w=root)
    assert added_inputs(load_graph(root / GRAPH)) == IMAGE_PROMPT
    ok("build-engine", "--backend", BACKENDS[0], "--threads", "1", w=root)
    assert ok("verify", "--backend", BACKENDS[0], w=root)["passed"]


@pytest.mark.slow
def test_tensorrt_for_rtx_builds_it(chain: Path) -> None:
    target = ["--backend", "tensorrt-rtx", "--compute-capability", "89", "--max-batch", "2"]
    assert ok("build-engine", *target, w=chain)


def test_what_cannot_be_is_refused_before_a_workspace_is_made(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    model, root = pipelines("controlled"), tmp_path / "ws"
    adapter = ip_adapter(tmp_path / "models", pipelines("controlled-xl"))
    plus = ip_adapter(tmp_path / "plus", model, plus=True)
    narrow = tmp_path / "narrow"
    CLIPVisionConfig(hidden_size=24).save_pretrained(narrow)
    images, empty = tmp_path / "images", tmp_path / "empty"
    images.mkdir()
    empty.mkdir()
    Image.new("RGB", (8, 8)).save(images / "a.png")
    cases: list[tuple[list[object], list[object]]] = [
        (["--ip-adapter", f"{adapter}:0"], ["--ip-adapter", "0"]),
        (["--ip-adapter", adapter], [adapter, "channels"]),
        (["--ip-adapter", tmp_path / "a.bin"], ["--ip-adapter", "a.bin"]),
        (["--image-encoder", tmp_path], ["--image-encoder", "--ip-adapter"]),
        (["--ip-adapter", plus, "--image-encoder", empty], [empty, "--image-encoder"]),
        (
            ["--ip-adapter", plus, "--image-encoder", narrow],
            [narrow, "hidden_size", IMAGE_WIDTH, 24, "--image-encoder"],
        ),
        (["--ip-adapter-images", images], ["--ip-adapter-images", "--ip-adapter"]),
    ]
    for options, facts in cases:
        cli("calibrate", "-w", root, "--model", model, *SHORT, *options).assert_refused(*facts)
        assert not root.exists()


@pytest.mark.slow
def test_its_pipeline_draws_what_the_float_one_draws_and_what_the_fake_quantized_model_does(
    chain: Path,
) -> None:
    ours = quest_deploy.load_pipeline(chain, BACKENDS[0])
    assert type(ours) is diffusers.StableDiffusionPipeline
    model = load_model(Workspace.open(chain).source)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        model.folder, safety_checker=None, requires_safety_checker=False
    )
    theirs.load_ip_adapter(
        str(chain.parent), subfolder="models", weight_name="ip-adapter.safetensors"
    )
    theirs.set_ip_adapter_scale(0.8)
    image, expected = draw(ours), draw(theirs)
    theirs.set_ip_adapter_scale(0.0)
    assert np.abs(image - expected).mean() < 0.4 * np.abs(draw(theirs) - expected).mean()

    fake: Any = QuantizedModel.from_checkpoint(load_checkpoint(chain / CHECKPOINT)).eval()
    fake.added = {}
    unet = PipelineUNet(fake, model.config, model.source.ip_adapter)
    parts = {name: getattr(ours, name) for name in IMAGE_PARTS}
    assert np.abs(image - draw(model.load_pipeline(unet=unet, **parts))).mean() < 0.01
    encoderless = quest_deploy.load_pipeline(chain, BACKENDS[0], **dict.fromkeys(IMAGE_PARTS))
    embeds = ours.prepare_ip_adapter_image_embeds(SHOWN, None, torch.device("cpu"), 1, True)
    found = draw(encoderless, ip_adapter_image=None, ip_adapter_image_embeds=embeds)
    np.testing.assert_array_equal(found, image)


def assert_same_image(found: Any, expected: Any) -> None:
    assert np.abs(found.astype(int) - np.asarray(expected, int)).max() <= 1


def draw(pipeline: Any, **options: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    given = {"num_inference_steps": 4, "generator": generator, "output_type": "np"}
    return pipeline("a red cat", **{"ip_adapter_image": SHOWN, **given, **options}).images


@pytest.fixture(scope="module")
def package(chain: Path) -> Path:
    """The workspace's package."""
    folder = chain.parent / "triton"
    made = ok("package", "--triton", folder, w=chain)
    assert made["models"] == ["image_encoder", "text_encoder", "unet", "vae_decoder"]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_packages_image_is_the_one_of_diffusers_pipeline(
    chain: Path, package: Path, guidance: float
) -> None:
    local = LocalPipeline(package)
    pipeline = quest_deploy.load_pipeline(chain, BACKENDS[0])
    given = {**REQUEST, "guidance": guidance}
    for scale in ({}, {"ip_adapter_scale": 0.3}):
        found = local.draw(**given, **IMAGE, **scale)
        pipeline.set_ip_adapter_scale(scale.get("ip_adapter_scale", 0.8))
        expected = draw(pipeline, guidance_scale=guidance, output_type="pil")[0]
        assert_same_image(found, expected)
    without = local.draw(**given)
    assert np.abs(found.astype(int) - without.astype(int)).max() > 1
    nothing = local.draw(**given, **IMAGE, ip_adapter_scale=0.0)
    np.testing.assert_array_equal(nothing, without)


@pytest.mark.slow
def test_a_package_reads_images_of_any_shape_as_clip_does(chain: Path, package: Path) -> None:
    local = LocalPipeline(package)
    extractor = load_image_parts(load_model(Workspace.open(chain).source))["feature_extractor"]
    settings = local.generator.settings["image_prompt"]
    for size in ((40, 23), (17, 90), (16, 16), (3, 5)):
        image = made_image(1, *size).image
        found = local.generation.clip_pixels(image, settings)
        expected = extractor(image, return_tensors="pt").pixel_values
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_image_prompts_beyond_the_limits_are_refused(package: Path) -> None:
    local = LocalPipeline(package)
    image = png_of(SHOWN)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"ip_adapter_image": b"no image"}, "ip_adapter_image"),
        ({"ip_adapter_image": bytes(local.generation.MAX_IMAGE_BYTES + 1)}, "ip_adapter_image"),
        ({"ip_adapter_image": png_of(Image.new("RGB", (70000, 1)))}, "ip_adapter_image"),
        ({"ip_adapter_image": png_of(Image.new("RGB", (1, 70000)))}, "ip_adapter_image"),
        ({"ip_adapter_image": image, "ip_adapter_scale": -0.1}, "ip_adapter_scale"),
        ({"ip_adapter_image": image, "ip_adapter_scale": 11.0}, "ip_adapter_scale"),
        ({"ip_adapter_image": image, "ip_adapter_scale": float("nan")}, "ip_adapter_scale"),
        ({"ip_adapter_scale": 0.5}, "ip_adapter_image"),
        ({"control_image": image}, "control_image"),
    ]
    for given, fact in cases:
        with pytest.raises(local.generation.InvalidRequestError, match=fact):
            local.draw(prompt="a cat", steps=1, **given)
