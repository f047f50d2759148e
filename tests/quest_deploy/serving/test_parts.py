"""A package's models beside the UNet, made from the parts' graphs: they compute what diffusers
computes, and take what the workspace holds.
"""

from __future__ import annotations

import json
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
from quest_deploy.models.loading import resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.serving.part_graphs import PartGraphs, model_parts
from quest_deploy.serving.triton import graphs
from tests.helpers import op_counts, relative_error
from tests.pipelines import TOKENS

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


def test_graphs_that_a_workspace_holds_are_taken_and_others_made(
    pipelines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress_weights, "LEAST", 64)
    source, root = resolve_source(str(pipelines("sd"))), tmp_path / "ws"
    workspace = Workspace.create(root, source, Scheme.parse("w4a4"))
    model = PipelineModel(source)
    assert "DequantizeLinear" not in op_counts(PartGraphs(workspace, model).load("vae_decoder"))
    qd.export_parts(root, weights="int8")
    held = PartGraphs(Workspace.open(root), model).load("vae_decoder")
    assert op_counts(held)["DequantizeLinear"] > 5
