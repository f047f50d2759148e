"""Text encoders and VAEs as engines in a diffusers pipeline: what diffusers' own compute, and
everything else refused by name.
"""

from __future__ import annotations

import copy
import inspect
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import save_file
from transformers import PreTrainedModel

import quest_deploy as qd
from exporters.editor import array_of
from exporters.graph_info import load_graph
from exporters.part_info import PART_KEY
from exporters.passes import compress_weights
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import MANIFEST, Workspace
from quest_deploy.backends.base import LOWERED, engine_info
from quest_deploy.backends.parts import EnginePart, built_parts
from quest_deploy.backends.tensorrt.base import ENGINE
from quest_deploy.models import pipeline_model
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.serving.parts import PipelineTextEncoder, PipelineVae, engine_parts
from quest_deploy.stages import BUILD_PARTS, EXPORT_PARTS
from tests.helpers import op_counts, refused, relative_error, reseal
from tests.pipelines import with_bert, with_tiny_vae
from tests.quest_deploy.support import Outcome, cli, flip_byte

if TYPE_CHECKING:
    from collections.abc import Callable

    from quest_deploy.stages.stage import Stage
    from tests.quest_deploy.conftest import Chain

BACKENDS = ("openvino", "onnxruntime")
KINDS: dict[str, set[str]] = {
    "sd": {"text_encoder", "vae"},
    "sdxl": {"text_encoder", "text_encoder_2", "vae"},
    "sd3": {"text_encoder", "text_encoder_2", "text_encoder_3", "vae"},
}
EACH = [pytest.param(x, marks=pytest.mark.slow if x == "sd3" else ()) for x in KINDS]
PROMPT = "a photo of a red cat"
Built = tuple[str, Workspace, PipelineModel]


@pytest.fixture(scope="module")
def made(
    pipelines: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Built]:
    """By kind, a workspace with the parts' engines of both backends, not to be changed, and its
    model.
    """
    known: dict[str, Built] = {}

    def make(kind: str) -> Built:
        if kind not in known:
            root = tmp_path_factory.mktemp("parts") / kind
            Workspace.create(root, resolve_source(str(pipelines(kind))), Scheme.parse("w4a4"))
            assert qd.export_parts(root)["left_out"] == {}
            for backend in BACKENDS:
                qd.build_parts(root, backend=backend, threads=1)
            workspace = Workspace.open(root)
            known[kind] = kind, workspace, load_model(workspace.source)
        return known[kind]

    return make


@pytest.fixture(params=EACH)
def built(request: pytest.FixtureRequest, made: Callable[[str], Built]) -> Built:
    """That of each kind."""
    return made(request.param)


def with_engines_of(
    folder: Path, root: Path, *loras: str, backend: str = "onnxruntime"
) -> tuple[PipelineModel, dict[str, Any]]:
    """The model in ``folder``, and the engines of its parts."""
    source = resolve_source(str(folder), loras=loras)
    Workspace.create(root, source, Scheme.parse("w4a4"))
    qd.export_parts(root)
    qd.build_parts(root, backend=backend, threads=1)
    return load_model(source), engine_parts(Workspace.open(root), backend)


@pytest.fixture(params=BACKENDS)
def parts(request: pytest.FixtureRequest, built: Any) -> dict[str, Any]:
    return engine_parts(built[1], request.param)


@pytest.fixture
def sd(made: Callable[[str], Built]) -> Built:
    """That of Stable Diffusion: what is said of it holds of the others."""
    return made("sd")


@pytest.fixture
def copied(sd: Built, tmp_path: Path) -> Workspace:
    """A copy of Stable Diffusion's workspace, to be changed."""
    return _copy(sd, tmp_path)


def _copy(made: Built, folder: Path) -> Workspace:
    return Workspace.open(shutil.copytree(made[1].root, folder / "copy"))


def with_parts(model: PipelineModel, **parts: Any) -> Any:
    kind, name = getattr(diffusers, model.config["_class_name"]), model.network.part
    network = kind.from_pretrained(model.folder, subfolder=name).eval()
    pipeline = model.load_pipeline(**{name: network, **parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, **options: Any) -> np.ndarray:
    arguments = {"num_inference_steps": 2, "output_type": "np", **options}
    if "prompt" in inspect.signature(type(pipeline).__call__).parameters:
        arguments["prompt"] = PROMPT
    images: np.ndarray = pipeline(generator=torch.Generator().manual_seed(0), **arguments).images
    return images


@pytest.mark.parametrize(
    "options", [{}, {"clip_skip": 1, "negative_prompt": "blue"}], ids=["", "skip"]
)
def test_an_image_is_what_the_float_parts_draw(
    built: Any, parts: dict[str, Any], options: dict[str, Any]
) -> None:
    kind, _, model = built
    assert parts.keys() == KINDS[kind]
    ours, theirs = with_parts(model, **parts), with_parts(model)
    if not hasattr(
        theirs.text_encoder, "text_model"
    ):  # as transformers 5 has it, and diffusers not
        norm = theirs.text_encoder.final_layer_norm
        theirs.text_encoder.text_model = SimpleNamespace(final_layer_norm=norm)
    np.testing.assert_allclose(draw(ours, **options), draw(theirs, **options), atol=2e-4)


def test_image_to_image_encodes_with_the_engine(built: Any, parts: dict[str, Any]) -> None:
    from diffusers import AutoPipelineForImage2Image

    _, _, model = built
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    found = []
    for given in (parts, {}):
        other = AutoPipelineForImage2Image.from_pipe(with_parts(model, **given))
        other.set_progress_bar_config(disable=True)
        found.append(draw(other, image=image, strength=0.6, num_inference_steps=5))
    np.testing.assert_allclose(*found, atol=2e-4)


def test_the_vae_takes_any_batch_and_size(built: Any, parts: dict[str, Any]) -> None:
    theirs = built[2].load_decoder()
    latents = torch.randn(3, 4, 6, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.decode(latents).sample
    assert relative_error(parts["vae"].decode(latents).sample.numpy(), expected.numpy()) < 1e-4
    assert parts["vae"].config.scaling_factor == theirs.config.scaling_factor


def test_in_float16_the_pipeline_draws_to_the_end(built: Any, parts: dict[str, Any]) -> None:
    pipeline = with_parts(built[2], **parts).to(torch.float16)
    assert np.isfinite(draw(pipeline)).all()


def test_it_has_the_type_and_place_that_it_is_moved_to(built: Any, parts: dict[str, Any]) -> None:
    pipeline = with_parts(built[2], **parts).to(torch.bfloat16)
    assert pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    assert pipeline.vae.decode(torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)).sample.dtype == (
        torch.bfloat16
    )


IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
OTHERS: dict[str, dict[str, Any]] = {
    "dit": {"class_labels": [1]},
    "ldm": {},
    "inpaint": {"image": IMAGE, "mask_image": torch.ones(1, 1, 16, 16), "strength": 1.0},
    "pixart": {"use_resolution_binning": False},
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in ("dit", "ldm") else pytest.mark.slow) for x in OTHERS]
)
def test_other_pipelines_draw_what_their_float_parts_draw(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    model, parts = with_engines_of(pipelines(name), tmp_path / "ws")
    assert {type(x) for x in parts.values()} >= {PipelineVae}
    ours, theirs = (with_parts(model, **x) for x in (parts, {}))
    np.testing.assert_allclose(draw(ours, **OTHERS[name]), draw(theirs, **OTHERS[name]), atol=2e-4)


@pytest.mark.slow
def test_the_engine_of_a_text_encoder_has_its_loras(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    encoder = load_model(resolve_source(str(pipelines("sd")))).load_pipeline(vae=None).text_encoder
    layer = next(name for name, _ in encoder.named_modules() if name.endswith("q_proj"))
    out, into = encoder.get_submodule(layer).weight.shape
    prefix = "lora_te_" + ("" if layer.startswith("text_model.") else "text_model_")
    names = {f"{prefix}{layer.replace('.', '_')}.lora_{x}.weight" for x in ("down", "up")}
    sizes = {"down": (2, into), "up": (out, 2)}
    tensors = {x: torch.randn(sizes[x.split("lora_")[-1].split(".")[0]]) for x in names}
    save_file(tensors, tmp_path / "style.safetensors")
    given = f"{tmp_path / 'style.safetensors'}:0.8"
    model, parts = with_engines_of(pipelines("sd"), tmp_path / "ws", given)
    with torch.no_grad():
        states = parts["text_encoder"](IDS)[0]
        fused = model.load_pipeline(vae=None).text_encoder(IDS)[0]
        assert relative_error(states.numpy(), fused.numpy()) < 1e-4
        assert relative_error(encoder(IDS)[0].numpy(), fused.numpy()) > 1e-2


def test_a_tiny_vae_decodes_and_refuses_to_encode(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = with_tiny_vae(pipelines("sd"), tmp_path / "model")
    model, parts = with_engines_of(folder, tmp_path / "ws")
    ours, theirs = with_parts(model, **parts), with_parts(model)
    np.testing.assert_allclose(draw(ours), draw(theirs), atol=2e-4)
    with refused("encode", "vae="):
        parts["vae"].encode(IMAGE)


VAE_CALLS: dict[str, Callable[[Any], Any]] = {
    "enable_tiling": lambda vae: vae.enable_tiling(),
    "load_state_dict": lambda vae: vae.load_state_dict({}),
    "save_pretrained": lambda vae: vae.save_pretrained("x"),
    "set_attn_processor": lambda vae: vae.set_attn_processor(None),
    "set_default_attn_processor": lambda vae: vae.set_default_attn_processor(),
    "load_lora_adapter": lambda vae: vae.load_lora_adapter({}),
    "enable_gradient_checkpointing": lambda vae: vae.enable_gradient_checkpointing(),
    "enable_parallelism": lambda vae: vae.enable_parallelism(config=None),
    "forward": lambda vae: vae(torch.zeros(1, 4, 8, 8)),
}
TEXT_CALLS: dict[str, Callable[[Any], Any]] = {
    "attention_mask": lambda text: text(IDS, attention_mask=torch.tensor([[1] * 7 + [0]])),
    "position_ids": lambda text: text(IDS, position_ids=torch.ones(1, 8)),
    "resize_token_embeddings": lambda text: text.resize_token_embeddings(9),
    "get_input_embeddings": lambda text: text.get_input_embeddings(),
    "load_adapter": lambda text: text.load_adapter("x"),
    "save_pretrained": lambda text: text.save_pretrained("x"),
}
IDS = torch.zeros(1, 8, dtype=torch.int64)


@pytest.mark.parametrize("name", VAE_CALLS)
def test_what_the_vae_s_engines_do_not_do_is_refused_by_name(sd: Built, name: str) -> None:
    with refused(name, "vae="):
        VAE_CALLS[name](engine_parts(sd[1], "onnxruntime")["vae"])


@pytest.mark.parametrize("name", TEXT_CALLS)
def test_what_a_text_encoder_s_engine_does_not_do_is_refused_by_name(sd: Built, name: str) -> None:
    with refused(name, "text_encoder="):
        TEXT_CALLS[name](engine_parts(sd[1], "onnxruntime")["text_encoder"])


def test_slicing_changes_nothing(sd: Built) -> None:
    vae, latents = engine_parts(sd[1], "onnxruntime")["vae"], torch.randn(2, 4, 8, 8)
    before = vae.decode(latents).sample
    vae.enable_slicing()
    assert torch.equal(vae.decode(latents).sample, before)


def test_modules_of_the_vae_are_not_there(sd: Built) -> None:
    vae = engine_parts(sd[1], "onnxruntime")["vae"]
    assert not any(hasattr(vae, name) for name in ("encoder", "decoder", "quant_conv"))
    assert (vae.attn_processors, vae.use_tiling) == ({}, False)


def test_arguments_that_ask_for_nothing_are_taken(parts: dict[str, Any]) -> None:
    text = parts["text_encoder"]
    mask = {"attention_mask": torch.ones(1, 8), "use_cache": False, "output_attentions": False}
    assert torch.equal(text(IDS, **mask)[0], text(IDS)[0])


def test_a_prompt_of_another_length_is_refused_with_both_lengths(parts: dict[str, Any]) -> None:
    with refused("input_ids", 8, 9):
        parts["text_encoder"](torch.zeros(1, 9, dtype=torch.int64))


def test_a_copy_of_an_open_engine_is_refused(parts: dict[str, Any]) -> None:
    for part in parts.values():
        with refused("load_pipeline"):
            copy.deepcopy(part)


def test_a_workspace_without_parts_has_none(
    tmp_path: Path, pipelines: Callable[[str], Path]
) -> None:
    source = resolve_source(str(pipelines("sd")))
    workspace = Workspace.create(tmp_path / "ws", source, Scheme.parse("w4a4"))
    assert engine_parts(workspace, "openvino") == {}


def test_what_is_given_is_not_opened(copied: Workspace) -> None:
    flip_byte(built_parts(copied, "onnxruntime")["vae_decoder"] / LOWERED)
    with refused("quest-deploy build-parts"):
        engine_parts(copied, "onnxruntime")
    assert "vae" not in engine_parts(copied, "onnxruntime", without={"vae"})


def test_engines_of_parts_that_were_exported_anew_name_the_command(copied: Workspace) -> None:
    qd.export_parts(copied, weights="int8")
    with refused("quest-deploy build-parts --backend openvino"):
        engine_parts(Workspace.open(copied.root), "openvino")
    given = {"text_encoder", "text_encoder_2", "text_encoder_3", "vae"}
    assert engine_parts(Workspace.open(copied.root), "openvino", without=given) == {}


@pytest.mark.parametrize("stage", ["export-parts", "build-parts/openvino"])
def test_a_part_that_a_changed_manifest_names_elsewhere_is_refused(
    copied: Workspace, tmp_path: Path, stage: str
) -> None:
    place = str(tmp_path / "elsewhere")
    parts = {"parts": {place: 1}}
    reseal(copied.path(MANIFEST), lambda x: x["stages"][stage]["details"].update(parts))
    with refused(MANIFEST, "text_encoder", repr(place), "quest-deploy export-parts"):
        if stage == "export-parts":
            qd.build_parts(copied.root, backend="openvino")
        else:
            engine_parts(Workspace.open(copied.root), "openvino")
    assert not Path(place).exists()


@pytest.mark.parametrize(
    ("told", "facts"),
    [
        ("{", "quest.part JSON"),
        ('{"kind": "PreTrainedModel", "config": {}}', "T5EncoderModel PreTrainedModel"),
    ],
)
def test_a_part_of_a_class_that_no_engine_stands_in_for_is_refused(
    copied: Workspace, monkeypatch: pytest.MonkeyPatch, told: str, facts: str
) -> None:
    folder = built_parts(copied, "onnxruntime")["text_encoder"]
    graph = load_graph(folder / LOWERED)
    graph.metadata_props[PART_KEY] = told
    monkeypatch.setattr("exporters.graph_info.load_graph", lambda path: graph)
    with refused(*facts.split(), "quest-deploy export-parts"):
        PipelineTextEncoder(EnginePart("onnxruntime", folder))


def initializer_bytes(graph: ir.Model) -> int:
    return sum(array_of(value).nbytes for value in graph.graph.initializers.values())


def test_weights_of_8_bits_take_a_quarter_and_change_the_image_little(
    sd: Built, copied: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress_weights, "LEAST", 64)  # this model's are small
    before = initializer_bytes(load_graph(copied.path("parts", "vae_decoder", LOWERED)))
    qd.export_parts(copied, weights="int8")
    qd.build_parts(copied, backend="openvino", threads=1)
    graph = load_graph(copied.path("parts", "vae_decoder", LOWERED))
    codes = [x for x in graph.graph.initializers.values() if x.dtype == ir.DataType.INT8]
    assert any(len(x.shape or ()) == 4 for x in codes)
    opened = Workspace.open(copied.root)
    assert initializer_bytes(graph) < 0.4 * before
    ours = draw(with_parts(sd[2], **engine_parts(opened, "openvino")))
    theirs = draw(with_parts(sd[2]))
    assert 0 < np.abs(ours - theirs).mean() < 0.02


def test_the_precision_is_recorded_and_bf16_is_openvino_s_alone(copied: Workspace) -> None:
    outcome = cli("build-parts", "-w", copied.root, "--backend", "onnxruntime", "--dtype", "bf16")
    outcome.assert_refused("--dtype", "onnxruntime")
    qd.build_parts(copied, backend="openvino", dtype="bf16", threads=1)
    folder = built_parts(Workspace.open(copied.root), "openvino")["vae_decoder"]
    assert engine_info(folder).options.dtype == "bf16"


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("sd", "int8"), *(pytest.param(x, "fp32", marks=pytest.mark.slow) for x in ("sdxl", "sd3"))],
)
def test_tensorrt_rtx_builds_plans_of_all_parts_without_a_gpu(
    made: Callable[[str], Built],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    weights: str,
) -> None:
    workspace = _copy(made(kind), tmp_path)
    if weights != "fp32":
        monkeypatch.setattr(compress_weights, "LEAST", 64)
        qd.export_parts(workspace, weights=weights)
    built = qd.build_parts(
        workspace, backend="tensorrt-rtx", compute_capability=("89",), max_batch=8
    )
    folders = built_parts(Workspace.open(workspace.root), "tensorrt-rtx")
    assert folders.keys() == built["parts"].keys() >= {"text_encoder", "vae_decoder"}
    for name, folder in folders.items():
        assert (folder / ENGINE).stat().st_size > 0
        most = engine_info(folder).options.max_batch
        assert most == (8 if name.startswith("text") else 4)


def test_a_part_of_another_kind_is_left_out_by_name(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(pipelines("sd"), tmp_path / "model")
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace("{", '{"use_attention_mask": true,', 1))
    root = tmp_path / "ws"
    Workspace.create(root, resolve_source(str(folder)), Scheme.parse("w4a4"))
    outcome = cli("export-parts", "-w", root)
    assert outcome.code == 0
    assert "text_encoder is left out" in outcome.out
    assert "text_encoder" not in Workspace.open(root).stages["export-parts"].details["parts"]


def test_a_model_on_pixels_has_none_to_export(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    root = tmp_path / "ws"
    source = resolve_source(str(pipelines("class-pixels")))
    Workspace.create(root, source, Scheme.parse("w4a4"))
    cli("export-parts", "-w", root).assert_refused("class-pixels")


def test_encoders_that_cannot_be_exported_are_left_out_by_name_and_not_loaded(
    pipelines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = set(), pipeline_model.load_part

    def noted(folder: Path, *arguments: Any, **options: Any) -> Any:
        loaded.add(folder.name)
        return load(folder, *arguments, **options)

    monkeypatch.setattr(pipeline_model, "load_part", noted)
    source = resolve_source(str(with_bert(pipelines("sdxl"), tmp_path / "model")))
    Workspace.create(tmp_path / "ws", source, Scheme.parse("w4a4"))
    assert qd.export_parts(tmp_path / "ws")["left_out"].keys() == {"text_encoder"}
    assert loaded == {"text_encoder_2", "vae"}


def test_a_model_none_of_whose_parts_can_be_exported_loads_none(
    pipelines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_model, "load_part", None)
    source = resolve_source(str(with_bert(pipelines("sana"), tmp_path / "model")))
    Workspace.create(tmp_path / "ws", source, Scheme.parse("w4a4"))
    with refused("text_encoder", "BertModel", "vae_decoder", "AutoencoderDC"):
        qd.export_parts(tmp_path / "ws")


def test_diffusers_and_transformers_take_stand_ins_for_models(sd: Built) -> None:
    parts = engine_parts(sd[1], "onnxruntime")
    assert isinstance(parts["vae"], ModelMixin)
    assert isinstance(parts["text_encoder"], PreTrainedModel)


@pytest.mark.parametrize("stage", [EXPORT_PARTS, BUILD_PARTS], ids=lambda stage: stage.name)
def test_its_stage_records_the_inputs_and_the_files_that_it_declares(
    built: Any, stage: Stage[Any, Any]
) -> None:
    workspace = built[1]
    record = workspace.stages[stage.recorded_name("openvino")]
    assert set(record.inputs) == set(stage.inputs(workspace, "openvino"))
    files = [x for x in record.files if any(fnmatchcase(x, pattern) for pattern in stage.writes)]
    assert files == list(record.files) != []


@pytest.mark.slow
def test_a_package_has_the_exported_graphs_and_says_how_their_weights_are_stored(
    text_chain: Chain, tmp_path: Path
) -> None:
    root, folder = shutil.copytree(text_chain.root, tmp_path / "ws"), tmp_path / "triton"
    qd.export_parts(root, weights="int8")
    ended = cli("package", "--triton", folder, "-w", root, "--json")
    assert ended.json["part_weights"] == {"text_encoder": "int8", "vae_decoder": "int8"}
    assert "INT8" in (folder / "README.md").read_text()
    graph = load_graph(folder / "models" / "text_encoder" / "1" / "model.onnx")
    assert op_counts(graph)["DequantizeLinear"] > 0


@pytest.fixture(scope="module")
def with_engines(text_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the engines of its UNet and of its parts; not to be changed."""
    root = shutil.copytree(text_chain.root, tmp_path_factory.mktemp("whole") / "workspace")
    qd.export_parts(root)
    qd.build_parts(root, backend="onnxruntime", threads=1)
    return root


def test_load_pipeline_takes_the_engines_and_what_is_given_before_them(
    text_chain: Chain, with_engines: Path
) -> None:
    found = qd.load_pipeline(with_engines, "onnxruntime")
    assert isinstance(found.vae, PipelineVae)
    assert isinstance(found.text_encoder, PipelineTextEncoder)
    before = qd.load_pipeline(text_chain.root, "onnxruntime")
    for pipeline in (found, before):
        pipeline.set_progress_bar_config(disable=True)
    assert np.abs(draw(found) - draw(before)).mean() < 0.01
    assert qd.load_pipeline(with_engines, "onnxruntime", vae=before.vae).vae is before.vae


def benchmark(root: Path) -> Outcome:
    few = ("--steps", "1", "--draws", "1", "--runs", "1", "--warmup", "0", "--batch", "1")
    of = ("--backend", "onnxruntime", "--pipeline")
    return cli("benchmark", "-w", root, *of, *few, "--json")


def test_the_pipeline_s_benchmark_times_the_parts_engines_and_is_outdated_by_others(
    with_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(with_engines, tmp_path / "copy")
    outcome = benchmark(root)
    assert outcome.json["pipeline"]["parts"] == ["text_encoder", "vae_decoder", "vae_encoder"]
    timed = outcome.json["pipeline"]["engines"][0]["parts"]
    assert timed.keys() >= {"text encoder", "decoder"}
    assert Workspace.open(root).states()["benchmark/onnxruntime"] is None
    qd.export_parts(root, weights="int8")
    monkeypatch.setattr("quest_deploy.evaluation.benchmark.benchmark_engine", None)
    benchmark(root).assert_refused("quest-deploy build-parts --backend onnxruntime")
    qd.build_parts(root, backend="onnxruntime", threads=1)
    assert "benchmark" in str(Workspace.open(root).states()["benchmark/onnxruntime"])
