"""Diffusion transformers at the command line, from calibration to a report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from PIL import Image

from exporters.graph_info import graph_info, input_sizes, load_graph
from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import (
    CALIBRATED,
    CHECKPOINT,
    ENGINES,
    GRAPH,
    MANIFEST,
    TRAJECTORIES,
    Workspace,
)
from quest_deploy.backends.base import LOWERED
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.finetuning.train import FinetuneOptions, finetune
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.serving.pipeline import load_pipeline, stand_in
from tests.helpers import refused
from tests.pipelines import controlnet
from tests.quest_deploy.support import (
    FLUX_CHAIN,
    PIXART_CHAIN,
    SD3_CHAIN,
    Chain,
    cli,
    in_this_process,
)

FP16 = ("--compute-capability", "89", "--dtype", "fp16")
FEW = ("--samples", "1", "--steps", "2", "--method", "minmax")


def run_all(root: Path, *commands: tuple[str | Path, ...]) -> None:
    """Run commands on one workspace, each to a good end."""
    for command, *options in commands:
        ended = cli(command, "-w", root, *options)
        assert ended.code == 0, f"{command}: {ended.err}"


def to_verify(backend: str) -> list[tuple[str, ...]]:
    """What is between calibration and the images of a verified engine."""
    of_backend = ("--backend", backend)
    return [("export",), ("reference",), ("build-engine", *of_backend), ("verify", *of_backend)]


def trained_floats(root: Path) -> set[str]:
    """The float parameters that finetuning changed."""
    before, after = (load_checkpoint(root / name).floats for name in (CALIBRATED, CHECKPOINT))
    return {name for name, value in before.items() if not np.array_equal(value, after[name])}


def fake_quantized(root: Path) -> Any:
    return QuantizedModel.from_checkpoint(load_checkpoint(root / CHECKPOINT)).eval()


def test_a_transformer_goes_through_every_command(pixart_chain: Chain) -> None:
    outcomes = pixart_chain.outcomes
    assert outcomes.keys() == PIXART_CHAIN.keys()
    for backend in ("onnxruntime", "openvino"):
        assert outcomes[f"verify {backend}"].json["passed"]
    pictures = outcomes["generate onnxruntime"].json["pictures"]
    assert [Image.open(path).size for path in pictures] == [(16, 16)] * 2
    results = outcomes["evaluate onnxruntime"].json["results"]
    assert list(results) == ["FP32", "PTQ", "QuEST", "onnxruntime"]
    assert results["FP32"]["pixel_mse"] == 0
    assert results["onnxruntime"]["psnr"] == pytest.approx(results["QuEST"]["psnr"], abs=0.5)
    whole = outcomes["benchmark onnxruntime"].json["pipeline"]
    assert whole["network"] == "transformer"
    assert all(engine["parts"]["unet"] > 0 for engine in whole["engines"])


def test_verification_of_a_transformer_covers_every_layer_product_and_segment(
    pixart_chain: Chain,
) -> None:
    report = json.loads((pixart_chain.root / "reports" / "verify-onnxruntime.json").read_text())
    info = graph_info(load_graph(pixart_chain.root / GRAPH))
    verified = {layer["layer"] for layer in report["layers"]}
    assert verified == {*info.layers, *info.matmuls}
    assert len(info.layers) == 10
    assert report["segments"]


@torch.no_grad()
def test_the_engine_predicts_as_the_fake_quantized_model_at_other_sizes_and_tokens(
    pixart_chain: Chain,
) -> None:
    pipeline = load_pipeline(pixart_chain.root, "onnxruntime")
    quantized = fake_quantized(pixart_chain.root)
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(3, 4, 6, 12, generator=generator)
    timestep = torch.tensor([990.0, 500.0, 1.0])  # each in a bucket of its own
    states = torch.randn(3, 40, 16, generator=generator)
    mask = (torch.arange(40) < torch.tensor([[3], [40], [11]])).float()
    expected = quantized(
        sample, timestep, encoder_hidden_states=states, encoder_attention_mask=mask
    )
    found = pipeline.transformer(
        sample,
        timestep=timestep,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_adaptive_norm_and_its_tables_are_trained_in_float(pixart_chain: Chain) -> None:
    assert trained_floats(pixart_chain.root) == {
        "adaln_single.linear.weight",
        "adaln_single.linear.bias",
        "scale_shift_table",
        "transformer_blocks.0.scale_shift_table",
    }


def test_the_temporal_stage_trains_the_norms_alone_and_given_layers_replace_them(
    pixart_chain: Chain,
) -> None:
    opened = Workspace.open(pixart_chain.root)
    model = load_model(opened.source)
    calibrated = load_checkpoint(pixart_chain.root / CALIBRATED)
    trajectories = Trajectories.load(pixart_chain.root / TRAJECTORIES)

    def trained(**options: Any) -> tuple[set[str], set[str]]:
        settings = FinetuneOptions(
            "pixart", stages=("temporal",), temporal_steps=1, batch=2, **options
        )
        made = finetune(model.load_unet, calibrated, trajectories, settings)
        floats = {k for k, v in calibrated.floats.items() if not np.array_equal(v, made.floats[k])}
        scales = {
            k
            for k, v in calibrated.quantizers.items()
            if not np.array_equal(v.scale, made.quantizers[k].scale)
        }
        return floats, scales

    floats, scales = trained()
    assert len(floats) == 4
    assert not scales
    floats, scales = trained(temporal_layers=("*.ff.net.2",))
    assert not floats
    assert scales == {"transformer_blocks.0.ff.net.2"}


def test_the_scheme_records_what_stays_in_float(pixart_chain: Chain) -> None:
    scheme = json.loads((pixart_chain.root / MANIFEST).read_text())["scheme"]
    assert scheme["float_layers"] == [
        "pos_embed.*",
        "adaln_single.*",
        "caption_projection.*",
        "proj_out",
    ]
    assert Scheme.from_json(scheme).float_layers == tuple(scheme["float_layers"])
    inspected = cli("inspect", pixart_chain.root / CHECKPOINT)
    assert "caption_projection.*" in inspected.out
    assert "first and last layer" not in inspected.out  # which are among them


@pytest.mark.slow
def test_every_layer_of_a_transformer_can_be_quantized_and_verified(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    root = tmp_path / "ws"
    everything = ("--buckets", "2", "--float-layers", "none")
    drawn = ("--labels", "3,5", "--steps", "2", "--rows", "1")
    run_all(
        root,
        ("calibrate", "--model", pipelines("dit"), *FEW, *everything),
        *to_verify("onnxruntime"),
        ("generate", "--backend", "onnxruntime", *drawn),
        ("build-engine", "--backend", "tensorrt-rtx", *FP16),
    )
    layers = load_checkpoint(root / CALIBRATED).layers
    assert {"pos_embed.proj", "proj_out_2"} <= layers.keys()
    assert (layers["pos_embed.proj"].weight_bits, layers["proj_out_2"].weight_bits) == (8, 8)


@pytest.mark.slow
def test_an_alpha_goes_through_to_a_verified_engine(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    branches = ("--low-rank", "2", "--low-rank-layers", "*.ff.net.2")
    run_all(
        tmp_path / "ws",
        ("calibrate", "--model", pipelines("pixart-alpha"), *FEW, *branches, "--buckets", "2"),
        *to_verify("openvino"),
        ("generate", "--backend", "openvino", "--prompt", "a cat", "--steps", "2"),
        ("build-engine", "--backend", "tensorrt-rtx", *FP16),
    )
    assert load_checkpoint(tmp_path / "ws" / CALIBRATED).branches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps"), [("sd3_chain", SD3_CHAIN), ("flux_chain", FLUX_CHAIN)], ids=["sd3", "flux"]
)
def test_a_transformer_of_joint_attention_goes_through_every_command(
    request: pytest.FixtureRequest, name: str, steps: dict[str, list[str]]
) -> None:
    outcomes = request.getfixturevalue(name).outcomes
    assert outcomes.keys() == steps.keys()
    for backend in ("onnxruntime", "openvino"):
        assert outcomes[f"verify {backend}"].json["passed"]
    (picture,) = outcomes["generate openvino"].json["pictures"]
    assert Image.open(picture).size == (24, 16)
    results = outcomes["evaluate onnxruntime"].json["results"]
    assert results["onnxruntime"]["psnr"] == pytest.approx(results["QuEST"]["psnr"], abs=0.5)
    table = json.loads(Path(outcomes["schedule"].json["schedule"]).read_text())
    assert table["steps"][0]["timestep"] == 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3_chain", "flux_chain"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_verification_of_joint_attention_covers_every_layer_product_and_segment(
    request: pytest.FixtureRequest, name: str, backend: str
) -> None:
    chain: Chain = request.getfixturevalue(name)
    report = json.loads((chain.root / "reports" / f"verify-{backend}.json").read_text())
    info = graph_info(load_graph(chain.root / GRAPH))
    assert {layer["layer"] for layer in report["layers"]} == {*info.layers, *info.matmuls}
    assert {x["bucket"] for x in report["buckets"]} == set(range(4))
    assert report["segments"]


def test_the_graph_of_stable_diffusion_3_has_the_products_of_both_attentions(
    sd3_chain: Chain,
) -> None:
    info = graph_info(load_graph(sd3_chain.root / GRAPH))
    assert {"attn.scores", "attn.mix", "attn2.scores", "attn2.mix"} <= {
        name.removeprefix("transformer_blocks.0.") for name in info.matmuls
    }


def test_finetuning_trains_the_norms_of_stable_diffusion_3_in_float(sd3_chain: Chain) -> None:
    changed = trained_floats(sd3_chain.root)
    norms = {"norm1.linear", "norm1_context.linear", "norm_out.linear"}
    assert changed
    assert all(any(norm in name for norm in norms) for name in changed)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@torch.no_grad()
def test_the_engine_of_stable_diffusion_3_predicts_as_the_fake_quantized_model_at_other_sizes(
    sd3_chain: Chain, backend: str
) -> None:
    pipeline = load_pipeline(sd3_chain.root, backend)
    assert type(pipeline) is StableDiffusion3Pipeline
    quantized = fake_quantized(sd3_chain.root)
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(3, 4, 6, 12, generator=generator)
    given = {
        "encoder_hidden_states": torch.randn(3, 11, 32, generator=generator),
        "pooled_projections": torch.randn(3, 24, generator=generator),
    }
    timestep = torch.tensor([1000.0, 812.5, 20.0])
    found = pipeline.transformer(hidden_states=sample, timestep=timestep, **given).sample
    torch.testing.assert_close(found, quantized(sample, timestep, **given), rtol=1e-3, atol=1e-4)


def test_the_schedule_of_flux_is_shifted_and_its_graph_takes_guidance(flux_chain: Chain) -> None:
    table = json.loads(Path(flux_chain.outcomes["schedule"].json["schedule"]).read_text())
    assert [round(step["timestep"]) for step in table["steps"]] == [1000, 826, 613, 345]
    sizes = input_sizes(load_graph(flux_chain.root / GRAPH))
    assert (sizes["sample"], sizes["guidance"]) == ((None, 4, None, None), (None,))


def test_the_graph_of_flux_has_the_layers_and_products_of_both_kinds_of_block(
    flux_chain: Chain,
) -> None:
    info = graph_info(load_graph(flux_chain.root / GRAPH))
    assert set(info.matmuls) == {
        f"{blocks}.0.attn.{product}"
        for blocks in ("transformer_blocks", "single_transformer_blocks")
        for product in ("scores", "mix")
    }
    assert {"single_transformer_blocks.0.proj_out", "single_transformer_blocks.0.proj_mlp"} < set(
        info.layers
    )


def test_finetuning_trains_the_norms_of_flux_in_float(flux_chain: Chain) -> None:
    changed = trained_floats(flux_chain.root)
    norms = {"norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"}
    assert {norm for norm in norms if any(norm in name for name in changed)} == norms
    assert all(any(norm in name for norm in norms) for name in changed)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@torch.no_grad()
def test_the_pipeline_of_flux_draws_what_it_draws_around_the_fake_quantized_model(
    flux_chain: Chain, backend: str
) -> None:
    pipeline = load_pipeline(flux_chain.root, backend)
    assert type(pipeline) is FluxPipeline
    quantized = fake_quantized(flux_chain.root)
    model = load_model(Workspace.open(flux_chain.root).source)
    around = model.load_pipeline(transformer=stand_in(quantized, model.config))
    given: dict[str, Any] = {
        "num_inference_steps": 3,
        "guidance_scale": 6.0,
        "output_type": "latent",
    }
    latents = []
    for each in (pipeline, around):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(2)
        sizes = {"height": 12, "width": 32, "max_sequence_length": 40}
        latents.append(each("a red cat", generator=generator, **sizes, **given).images)
    assert latents[0].shape == (1, 24, 16)
    torch.testing.assert_close(latents[0], latents[1], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_few_step_flux_without_guidance_goes_through_with_a_bucket_for_each_step(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    root = tmp_path / "ws"
    drawn = ("--prompt", "a cat")
    run_all(
        root,
        ("calibrate", "--model", pipelines("flux-schnell"), "--samples", "1", "--bits", "w8a8"),
        *to_verify("openvino"),
        ("generate", "--backend", "openvino", *drawn),
        ("evaluate", "--backend", "openvino", "--images", "2"),
        ("build-engine", "--backend", "tensorrt-rtx", *FP16),
    )
    assert cli("schedule", "-w", root, "--json").json["steps"] == 4
    evaluated = Workspace.open(root).stages["evaluate/openvino"].details["sampling"]
    assert evaluated["steps"] == 4
    scheme = Workspace.open(root).scheme
    assert [scheme.bucket_of(t) for t in (250, 500, 750, 1000)] == [0, 1, 2, 3]
    assert scheme.buckets == 4
    for options in (("--guidance", "4"), ("--negative-prompt", "a dog")):
        refusal = cli("generate", "-w", root, "--backend", "openvino", *drawn, *options)
        refusal.assert_refused(options[0])


@pytest.mark.slow
def test_every_layer_of_flux_can_be_quantized(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    root = tmp_path / "ws"
    everything = ("--buckets", "2", "--float-layers", "none")
    branches = ("--low-rank", "2", "--low-rank-layers", "*.proj_mlp")
    run_all(
        root,
        ("calibrate", "--model", pipelines("flux"), *FEW, *everything, *branches),
        *to_verify("onnxruntime"),
        ("build-engine", "--backend", "tensorrt-rtx", *FP16),
    )
    layers = load_checkpoint(root / CALIBRATED).layers
    guided = "time_text_embed.guidance_embedder.linear_1"
    assert {"x_embedder", "context_embedder", "proj_out", guided} <= layers.keys()
    assert (layers["x_embedder"].weight_bits, layers["proj_out"].weight_bits) == (8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart_chain", "sd3_chain", "flux_chain"])
def test_inspect_shows_what_a_transformer_and_its_engines_take(
    request: pytest.FixtureRequest, name: str
) -> None:
    chain: Chain = request.getfixturevalue(name)
    network = load_model(Workspace.open(chain.root).source).network
    lowered = (chain.root / ENGINES / x / LOWERED for x in ("openvino", "tensorrt-rtx"))
    for path in (chain.root / GRAPH, *lowered):
        shown = cli("inspect", path)
        assert shown.code == 0, shown.err
        wanted = {"encoder_hidden_states", "encoder_attention_mask", "pooled_projections"}
        wanted |= {"guidance"}
        assert all(x in shown.out for x in wanted & set(network.conditions))
    shown = cli("inspect", chain.root)
    assert shown.code == 0, shown.err
    report = (chain.root / "reports" / "report.html").read_text()
    assert "transformer_blocks.0.ff.net.2" in report


def test_run_goes_on_where_the_commands_left_a_transformer(
    sd3_chain: Chain, tmp_path: Path
) -> None:
    root = shutil.copytree(sd3_chain.root, tmp_path / "ws")
    (root / "engines" / "openvino" / "engine.json").unlink()
    with in_this_process():
        ended = cli("run", "-w", root, "--backend", "openvino", "--json")
    assert ended.code == 0, ended.err
    stages = Workspace.open(root).stages
    assert {"verify/openvino", "benchmark/openvino", "generate/openvino"} <= stages.keys()
    for name in (CALIBRATED, CHECKPOINT):
        assert (root / name).read_bytes() == (sd3_chain.root / name).read_bytes()


@pytest.mark.slow
def test_sana_goes_through_to_images_of_verified_engines(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    root = tmp_path / "ws"
    operands = ("--attention-bits", "8", "--softmax-bits", "8", "--buckets", "3", "--bits", "w4a8")
    steps = ("--temporal-steps", "1", "--sensitive-steps", "1", "--batch", "2")
    drawn = ("--prompt", "a cat", "--steps", "2", "--height", "32", "--width", "64")
    run_all(
        root,
        ("calibrate", "--model", pipelines("sana"), "--samples", "1", "--steps", "3", *operands),
        ("finetune", *steps),
        ("export",),
        ("reference",),
        *(
            (command, "--backend", backend)
            for backend in ("onnxruntime", "openvino")
            for command in ("build-engine", "verify")
        ),
        ("build-engine", "--backend", "tensorrt-rtx", *FP16),
        ("generate", "--backend", "onnxruntime", *drawn),
        ("generate", "--backend", "openvino", *drawn),
        ("evaluate", "--backend", "onnxruntime", "--images", "2", "--steps", "2"),
        ("schedule", "--scheduler", "dpm++", "--steps", "4"),
        ("report",),
    )
    layers = {"attn1.to_q", "attn2.to_k", "ff.conv_inverted", "ff.conv_point"}
    checkpoint = load_checkpoint(root / CHECKPOINT)
    names = {name.removeprefix("transformer_blocks.0.") for name in checkpoint.layers}
    assert layers <= names
    assert "ff.conv_depth" not in names
    for backend in ("onnxruntime", "openvino"):
        report = json.loads((root / "reports" / f"verify-{backend}.json").read_text())
        assert {x["layer"].removeprefix("transformer_blocks.0.") for x in report["layers"]} > layers
        assert report["segments"]
    quantized = fake_quantized(root)
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(3, 4, 5, 12, generator=generator)
    given = {
        "encoder_hidden_states": torch.randn(3, 40, 16, generator=generator),
        "encoder_attention_mask": (torch.arange(40) < torch.tensor([[3], [40], [11]])).float(),
    }
    timestep = torch.tensor([999.0, 812.5, 20.0])
    found = load_pipeline(root, "onnxruntime").transformer(sample, timestep=timestep, **given)
    with torch.no_grad():
        expected = quantized(sample, timestep, **given)
    # A value beside a tie may take the other code, which a few outputs see.
    assert (found.sample - expected).abs().quantile(0.95) < 1e-4
    torch.testing.assert_close(found.sample, expected, rtol=0, atol=1e-2)


@pytest.mark.slow
def test_every_layer_of_sana_can_be_quantized_its_depthwise_convolutions_too(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    root = tmp_path / "ws"
    everything = ("--buckets", "2", "--float-layers", "none", "--bits", "w8a8")
    run_all(
        root,
        ("calibrate", "--model", pipelines("sana"), *FEW, *everything),
        *to_verify("onnxruntime"),
    )
    depthwise = load_checkpoint(root / CALIBRATED).layers["transformer_blocks.0.ff.conv_depth"]
    assert depthwise.conv is not None
    assert depthwise.conv.groups > 1


def test_controlnets_and_adapters_of_a_transformer_are_refused(
    pixart_chain: Chain, pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    net = controlnet(tmp_path / "net", pipelines("controlled"))
    given = ("--model", pipelines("sd3"))
    for option in ("--controlnet", "--t2i-adapter"):
        ended = cli("calibrate", "-w", tmp_path / "ws", *given, option, net)
        ended.assert_refused("SD3Transformer2DModel")
        ended = cli("export", "-w", tmp_path / "other", *given, f"{option}-inputs")
        ended.assert_refused("SD3Transformer2DModel")
        assert not (tmp_path / "other" / TRAJECTORIES).exists()
    for part in ("controlnet", "adapter"):
        with refused("PixArtTransformer2DModel"):
            load_pipeline(pixart_chain.root, "onnxruntime", **{part: net})
    copied = shutil.copytree(pixart_chain.root, tmp_path / "copy")
    ended = cli("export", "-w", copied, "--controlnet-inputs")
    ended.assert_refused("controlnet", "FlatPixArt")


def test_loras_of_a_transformer_are_refused_before_anything_is_written(
    pixart_chain: Chain, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(1)}, tmp_path / "style.safetensors")
    lora = ("--lora", tmp_path / "style.safetensors", "-o", tmp_path / "other")
    cli("lora", "-w", pixart_chain.root, *lora).assert_refused("--lora", "transformer")
    assert not (tmp_path / "other").exists()


def test_q_diffusions_reconstruction_is_refused(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    given = ("--model", pipelines("pixart"), "--method", "qdiff", "--samples", "1")
    cli("calibrate", "-w", tmp_path / "ws", *given).assert_refused("--method qdiff", "transformer")


@pytest.mark.parametrize(
    ("options", "edges"),
    [
        (["--bucket-edges", "100.5,700"], [100.5, 700.0]),
        (["--bucket-edges", "lcm:4"], 3),
        (["--bucket-edges", "euler:8", "--buckets", "4"], 3),
    ],
)
def test_bucket_edges_are_given_by_hand_or_by_a_schedule(
    pipelines: Callable[[str], Path], tmp_path: Path, options: list[str], edges: list[float] | int
) -> None:
    root = tmp_path / "ws"
    given = ("--model", pipelines("sd"), *options)
    ended = cli("calibrate", "-w", root, *given, *FEW)
    assert ended.code == 0, ended.err
    scheme = Workspace.open(root).scheme
    if isinstance(edges, list):
        assert list(scheme.bucket_edges) == edges
    else:
        name, steps = options[1].split(":")
        scheduler = load_model(resolve_source(str(pipelines("sd")))).load_scheduler(name)
        scheduler.set_timesteps(int(steps))
        held = [scheme.bucket_of(t) for t in scheduler.timesteps.tolist()]
        share = int(steps) // (edges + 1)
        assert sorted(held) == [b for b in range(edges + 1) for _ in range(share)]
    for repeated in (options, options[:2]):
        again = cli("calibrate", "-w", root, *repeated, *FEW)
        assert again.code == 0, again.err
    for other in ("5", "lcm:2"):
        ended = cli("calibrate", "-w", root, "--bucket-edges", other, *FEW)
        ended.assert_refused("bucket edges", root)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--bucket-edges", "700,100"], "bucket edges"),
        (["--bucket-edges", "0,100"], "bucket edges"),
        (["--bucket-edges", "5,1000"], "bucket edges"),
        (["--bucket-edges", "1e300"], "bucket edges"),
        (["--bucket-edges", "nan"], "finite"),
        (["--bucket-edges", "early"], "--bucket-edges early"),
        (["--bucket-edges", "nosuch:4"], "nosuch"),
        (["--bucket-edges", "lcm:0"], "0 steps"),
        (["--bucket-edges", "lcm:4", "--buckets", "9"], "9"),
        (["--bucket-edges", "100,700", "--buckets", "2"], "--bucket-edges --buckets"),
    ],
)
def test_bucket_edges_that_are_none_are_refused(
    pipelines: Callable[[str], Path], tmp_path: Path, options: list[str], facts: str
) -> None:
    ended = cli("calibrate", "-w", tmp_path / "ws", "--model", pipelines("sd"), *options)
    ended.assert_refused(*facts.split())
    assert not (tmp_path / "ws").exists()


def test_layers_that_are_to_stay_in_float_but_are_none_are_refused(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    given = ("--model", pipelines("sd"), "--float-layers", "no.such.*", *FEW)
    cli("calibrate", "-w", tmp_path / "ws", *given).assert_refused("no.such.*")


def test_a_unets_layers_can_stay_in_float_too(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    root = tmp_path / "ws"
    given = ("--model", pipelines("sd"), "--float-layers", "*.ff.net.2,conv_in", "--buckets", "2")
    assert cli("calibrate", "-w", root, *given, *FEW).code == 0
    made = load_checkpoint(root / CALIBRATED)
    assert not {name for name in made.layers if name.endswith("ff.net.2") or name == "conv_in"}
    assert "conv_in.weight" in made.floats
    assert made.layers["conv_out"].weight_bits == 8
    with refused("float_layers"):
        Scheme.from_json({**made.scheme.to_json(), "float_layers": "conv_in"})
    shutil.rmtree(root)
