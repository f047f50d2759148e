"""A package's models beside the UNet, made from the parts' graphs: they compute what diffusers
computes, and take what the workspace holds.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
import pytest
import torch

import quest_deploy as qd
from exporters.graph_info import save_graph
from exporters.part_info import PART_KEY
from exporters.passes import compress_weights
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.models import pipeline_model
from quest_deploy.models.controls import load_control
from quest_deploy.models.loading import resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.residuals import CONTROLNET, unet_residuals
from quest_deploy.models.unets import ADDED_CONDITIONS
from quest_deploy.serving.part_graphs import PartGraphs, model_parts
from quest_deploy.serving.triton import graphs
from quest_deploy.serving.triton.layout import Layout
from quest_deploy.serving.triton.models import IMAGE, write_controlnet
from quest_deploy.serving.triton.options import TritonOptions
from tests.helpers import op_counts, refused, relative_error
from tests.pipelines import (
    CONTROLLED,
    TOKENS,
    controlnet,
    text_to_image,
    with_bert,
    with_tiny_vae,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir

PROMPTS = ["a red cat", "a photo of a blue house"]


def session(graph: ir.Model, folder: Path) -> ort.InferenceSession:
    save_graph(graph, folder / "model.onnx")
    return ort.InferenceSession(folder / "model.onnx")


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_text_encoder_s_file_gives_diffusers_conditions(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    model = PipelineModel(resolve_source(str(pipelines(name))))
    pipeline, parts = model.load_pipeline(vae=None), model_parts(model)
    found = [suffix for suffix in ("", "_2") if f"text_encoder{suffix}" in parts]
    graph = graphs.text_encoder([parts[f"text_encoder{suffix}"].graph() for suffix in found])
    assert [x.name for x in graph.graph.outputs] == ["encoder_hidden_states", "text_embeds"][
        : len(found)
    ]
    options = {"padding": "max_length", "max_length": TOKENS, "return_tensors": "np"}
    feeds = {
        f"input_ids{suffix}": getattr(pipeline, f"tokenizer{suffix}")(PROMPTS, **options).input_ids
        for suffix in found
    }
    states = session(graph, tmp_path).run(
        None, {key: value.astype(np.int32) for key, value in feeds.items()}
    )
    encoded = pipeline.encode_prompt(
        prompt=PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    expected = [value for value in encoded if value is not None]
    assert len(states) == len(expected) == len(found)
    for state, value in zip(states, expected, strict=True):
        assert relative_error(state, value.detach().numpy()) < 1e-5


def test_the_decoder_s_file_decodes_any_batch_and_size_as_the_model_does(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    model = PipelineModel(resolve_source(str(pipelines("sd"))))
    opened = session(graphs.decoder(model_parts(model)["vae_decoder"].graph()), tmp_path)
    latents = (
        np.random.default_rng(0)
        .standard_normal((3, model.sample_shape[0], 8, 12))
        .astype(np.float32)
    )
    (image,) = opened.run(None, {"sample": latents})
    assert relative_error(np.clip(image, -1, 1), model.images(latents)) < 1e-5


def test_a_decoder_with_a_mean_and_a_deviation_undoes_them(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    model = PipelineModel(resolve_source(str(pipelines("sd"))))
    decoder, part = model.load_decoder(), model_parts(model)["vae_decoder"].graph()
    own = {"latents_mean": [0.5, -1, 2, 0], "latents_std": [1, 2, 0.5, 3]}
    about = json.loads(part.metadata_props[PART_KEY])
    about["config"].update(own)
    part.metadata_props[PART_KEY] = json.dumps(about)
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    (image,) = session(graphs.decoder(part), tmp_path).run(None, {"sample": latents})
    mean, deviation = (np.asarray(x, np.float32).reshape(1, 4, 1, 1) for x in own.values())
    plain = torch.from_numpy(latents * deviation / decoder.config.scaling_factor + mean)
    with torch.no_grad():
        expected = decoder.decode(plain).sample.numpy()
    assert relative_error(image, expected) < 1e-5


def test_the_encoder_s_file_gives_the_scaled_distribution(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    model = PipelineModel(resolve_source(str(pipelines("sd"))))
    opened = session(graphs.encoder(model_parts(model)["vae_encoder"].graph(), 0.25), tmp_path)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 24)).astype(np.float32)
    mean, deviation = opened.run(["mean", "deviation"], {"sample": images})
    with torch.no_grad():
        expected = model.load_decoder().encode(torch.from_numpy(images)).latent_dist
    assert relative_error(mean, 0.25 * expected.mean.numpy()) < 1e-5
    assert relative_error(deviation, 0.25 * expected.std.numpy()) < 1e-5


def new_workspace(root: Path, folder: Path) -> tuple[Workspace, PipelineModel]:
    source = resolve_source(str(folder))
    return Workspace.create(root, source, Scheme.parse("w4a4")), PipelineModel(source)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_tiny_decoder_is_packaged(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = with_tiny_vae(pipelines(name), tmp_path / "model")
    workspace, model = new_workspace(tmp_path / "ws", folder)
    graph = graphs.decoder(PartGraphs(workspace, model).load("vae_decoder"))
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    (image,) = session(graph, tmp_path).run(None, {"sample": latents})
    assert relative_error(np.clip(image, -1, 1), model.images(latents)) < 1e-5


def test_a_sole_text_encoder_of_another_kind_is_packaged(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = with_bert(pipelines("sd"), tmp_path / "model")
    workspace, model = new_workspace(tmp_path / "ws", folder)
    graph = graphs.text_encoder([PartGraphs(workspace, model).load("text_encoder")])
    pipeline = model.load_pipeline(vae=None)
    options = {"padding": "max_length", "max_length": TOKENS, "return_tensors": "np"}
    ids = pipeline.tokenizer(PROMPTS, **options).input_ids.astype(np.int32)
    (states,) = session(graph, tmp_path).run(["encoder_hidden_states"], {"input_ids": ids})
    expected, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    assert relative_error(states, expected.detach().numpy()) < 1e-5


def test_what_a_package_cannot_hold_is_refused_before_it_is_loaded(
    pipelines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_model, "load_part", None)
    other = with_bert(pipelines("sdxl"), tmp_path / "bert")
    with refused("text_encoder", "BertModel", "load_pipeline"):
        PartGraphs(*new_workspace(tmp_path / "ws", other))
    tiny = with_tiny_vae(pipelines("inpaint"), tmp_path / "tiny")
    with refused("vae_encoder", "AutoencoderTiny", "load_pipeline"):
        PartGraphs(*new_workspace(tmp_path / "ws2", tiny))


def test_one_of_two_text_encoders_is_not_given_a_mask_and_is_packaged(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(pipelines("sdxl"), tmp_path / "model")
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_attention_mask": True}))
    workspace, model = new_workspace(tmp_path / "ws", folder)
    assert PartGraphs(workspace, model).encoders == ["text_encoder", "text_encoder_2"]
    assert not any(part.problem for part in model_parts(model).values())


def test_graphs_that_a_workspace_holds_are_taken_and_others_made(
    pipelines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress_weights, "LEAST", 64)
    root = tmp_path / "ws"
    workspace, model = new_workspace(root, pipelines("sd"))
    made = PartGraphs(workspace, model)
    assert "DequantizeLinear" not in op_counts(made.load("vae_decoder"))
    assert made.weights == {"vae_decoder": "fp32"}
    qd.export_parts(root, weights="int8")
    held = PartGraphs(Workspace.open(root), model)
    assert op_counts(held.load("vae_decoder"))["DequantizeLinear"] > 5
    assert held.weights == {"vae_decoder": "int8"}


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
