"""The text encoders of diffusion transformers as engines, in diffusers' pipelines and packages."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import T5EncoderModel

import quest_deploy as qd
from exporters.passes import compress_weights
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.models import pipeline_model
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import TEXT_ENCODERS
from quest_deploy.serving.part_graphs import PartGraphs, model_parts
from quest_deploy.serving.parts import PipelineTextEncoder, engine_parts
from quest_deploy.serving.triton.package import text_model
from tests.helpers import op_counts, refused, relative_error, run
from tests.pipelines import with_bert
from tests.quest_deploy.serving.test_engine_parts import draw, with_parts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from quest_deploy.models.pipeline_model import PipelineModel
    from tests.quest_deploy.conftest import Chain

BACKENDS = ("openvino", "onnxruntime")
PIPELINES: dict[str, tuple[set[str], dict[str, Any]]] = {
    "pixart": (
        {"text_encoder", "vae"},
        {"negative_prompt": "blue", "use_resolution_binning": False},
    ),
    "sana": (
        {"text_encoder"},
        {"negative_prompt": "a dog", "use_resolution_binning": False, "height": 32, "width": 64},
    ),
    "flux": ({"text_encoder", "text_encoder_2", "vae"}, {"height": 32, "width": 48}),
}
"""By a pipeline's name, the parts that engines replace, and what an image is asked for with."""
LENGTHS = {"pixart": 300, "sana": 300, "flux": 512}
"""The tokens that a prompt is padded to, behind Sana's instruction."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(x, marks=pytest.mark.slow if x == "flux" else ()) for x in PIPELINES],
)
def built(
    request: pytest.FixtureRequest,
    pipelines: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Workspace, PipelineModel]:
    """A workspace with the parts' engines of both backends, not to be changed, and its model."""
    root = tmp_path_factory.mktemp("prompts") / request.param
    source = resolve_source(str(pipelines(request.param)))
    Workspace.create(root, source, Scheme.parse("w4a4"))
    exported = qd.export_parts(root)
    assert set(TEXT_ENCODERS).isdisjoint(exported["left_out"])
    for backend in BACKENDS:
        qd.build_parts(root, backend=backend, threads=1)
    workspace = Workspace.open(root)
    return request.param, workspace, load_model(workspace.source)


def t5_or_gemma(parts: dict[str, Any]) -> Any:
    """The last of the text encoders' engines, the one that reads a mask."""
    return next(parts[name] for name in reversed(TEXT_ENCODERS) if name in parts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_is_what_the_text_encoders_in_torch_draw(built: Any, backend: str) -> None:
    name, workspace, model = built
    replaced, options = PIPELINES[name]
    parts = engine_parts(workspace, backend)
    assert parts.keys() == replaced
    ours, theirs = (draw(with_parts(model, **x), **options) for x in (parts, {}))
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


@torch.no_grad()
def test_prompts_of_other_lengths_with_and_without_a_mask_are_read_as_in_torch(built: Any) -> None:
    name, workspace, model = built
    engine = t5_or_gemma(engine_parts(workspace, "onnxruntime"))
    encoder = t5_or_gemma(vars(model.load_pipeline()))
    ids = torch.arange(3, 53).reshape(2, 25)
    for mask in (None, (torch.arange(25) < torch.tensor([[4], [25]])).long()):
        expected = encoder(ids, attention_mask=mask).last_hidden_state
        found = engine(ids, attention_mask=mask)
        read = torch.ones_like(ids).bool() if mask is None else mask.bool()
        assert relative_error(found[0][read].numpy(), expected[read].numpy()) < 1e-4
        assert torch.equal(found.last_hidden_state, found[0])
        assert torch.equal(engine(ids, attention_mask=mask, return_dict=False)[0], found[0])
    with refused("input_ids", "text_encoder=", "max_sequence_length"):
        engine(torch.zeros(1, 2 * LENGTHS[name], dtype=torch.int64))


def test_it_has_the_type_that_it_is_moved_to_and_refuses_what_it_does_not_compute(
    built: Any,
) -> None:
    engine = t5_or_gemma(engine_parts(built[1], "onnxruntime")).to(torch.bfloat16)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert engine.dtype == engine(ids)[0].dtype == torch.bfloat16
    assert engine.device == torch.device("cpu")
    for name, value in (("output_hidden_states", True), ("inputs_embeds", torch.zeros(1, 4, 8))):
        with refused(name, "text_encoder="):
            engine(ids, **{name: value})
    with refused("resize_token_embeddings", "text_encoder="):
        engine.resize_token_embeddings(9)


def test_int8_reaches_engines_and_packages_by_one_option(
    built: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, workspace, model = built
    monkeypatch.setattr(compress_weights, "LEAST", 64)  # this model's are small
    copied = shutil.copytree(workspace.root, tmp_path / "copy")
    qd.export_parts(copied, weights="int8")
    qd.build_parts(copied, backend="openvino", threads=1)
    opened, options = Workspace.open(copied), PIPELINES[name][1]
    ours = draw(with_parts(model, **engine_parts(opened, "openvino")), **options)
    theirs = draw(with_parts(model), **options)
    assert 0 < np.abs(ours - theirs).mean() < 0.02

    held = PartGraphs(opened, model)
    _, _, graph = text_model(model, {x: held.load(x) for x in held.encoders})
    assert op_counts(graph)["DequantizeLinear"] > 5
    assert set(held.weights.values()) == {"int8"}
    assert held.weights.keys() == PIPELINES[name][0] - {"vae"}


def test_a_package_takes_the_exported_graphs_and_loads_no_text_encoder(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, workspace, model = built
    monkeypatch.setattr(pipeline_model, "load_part", None)
    held = PartGraphs(workspace, model)
    pipeline, _, graph = text_model(model, {x: held.load(x) for x in held.encoders})
    encoder = model.network.prompt_encoder
    assert encoder is not None
    assert [x.name for x in graph.graph.outputs] == list(encoder(pipeline).outputs)


def test_a_text_encoder_of_another_kind_is_named_and_stays_what_it_is(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    source = resolve_source(str(with_bert(pipelines("pixart"), tmp_path / "model")))
    workspace = Workspace.create(tmp_path / "ws", source, Scheme.parse("w4a4"))
    assert "BertModel" in model_parts(load_model(source))["text_encoder"].problem
    with refused("text_encoder", "BertModel", "load_pipeline"):
        PartGraphs(workspace, load_model(source))
    assert qd.export_parts(workspace.root)["left_out"].keys() == {"text_encoder"}
    qd.build_parts(workspace.root, backend="onnxruntime", threads=1)
    assert engine_parts(Workspace.open(workspace.root), "onnxruntime").keys() == {"vae"}


@torch.no_grad()
def test_weights_in_bfloat16_stay_so_in_memory_and_are_exported_as_float32(
    pipelines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(pipelines("pixart"), tmp_path / "model")
    published = T5EncoderModel.from_pretrained(folder / "text_encoder").to(torch.bfloat16)
    published.save_pretrained(folder / "text_encoder")
    loaded, load = [], pipeline_model.load_part

    def noted(*arguments: Any, **options: Any) -> Any:
        loaded.append(load(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(pipeline_model, "load_part", noted)
    graph = model_parts(load_model(resolve_source(str(folder))))["text_encoder"].graph()
    (held,) = loaded
    assert torch.bfloat16 in {x.dtype for x in held.parameters()}
    assert not any(x.dtype == ir.DataType.BFLOAT16 for x in graph.graph.initializers.values())
    ids = np.arange(3, 303, dtype=np.int32)[None] % 60
    (found,) = run(graph, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    expected = published.float()(torch.from_numpy(ids).long())[0].numpy()
    assert relative_error(found, expected) < 1e-5


@pytest.mark.slow
def test_load_pipeline_reads_prompts_with_the_engine(pixart_chain: Chain, tmp_path: Path) -> None:
    root = shutil.copytree(pixart_chain.root, tmp_path / "ws")
    qd.export_parts(root)
    qd.build_parts(root, backend="onnxruntime", threads=1)
    found, before = (qd.load_pipeline(x, "onnxruntime") for x in (root, pixart_chain.root))
    assert isinstance(found.text_encoder, PipelineTextEncoder)
    assert not isinstance(before.text_encoder, PipelineTextEncoder)
    options = PIPELINES["pixart"][1]
    for pipeline in (found, before):
        pipeline.set_progress_bar_config(disable=True)
    assert np.abs(draw(found, **options) - draw(before, **options)).mean() < 0.01
