"""LoRAs folded into checkpoints that are quantized already: against the float model with the same
LoRAs, and through the commands behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import quest_deploy as qd
from exporters.graph_info import load_graph
from exporters.lowering.tensorrt import lower
from quest_deploy.artifacts.checkpoint import ActivationQuantizerData, Checkpoint, load_checkpoint
from quest_deploy.artifacts.scheme import weight_range
from quest_deploy.artifacts.workspace import CALIBRATED, CHECKPOINT, GRAPH, TRAJECTORIES, Workspace
from quest_deploy.backends.refit import changed_weights
from quest_deploy.errors import QuestDeployError
from quest_deploy.models.loading import load_model
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.serving.pipeline import load_pipeline
from quest_deploy.stages import lora as stage
from scripts.acceptance import random_lora
from tests.helpers import Array, assert_holds
from tests.quest_deploy.support import Chain, cli, flip_byte, snapshot

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
QUERY, VALUE, CONV = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_v", "down_blocks.0.resnets.0.conv1"
ENCODER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
SHAPES = {
    f"unet.{QUERY}": (16, 16),
    f"unet.{VALUE}": (16, 16),
    f"unet.{CONV}": (16, 16, 3, 3),
    ENCODER: (16, 16),
}
FEW = ("--samples", "2", "--steps", "2", "--buckets", "2")
BACKENDS = ("onnxruntime", "openvino")


def save_lora(path: Path, layers: tuple[str, ...], seed: int, size: float = 0.15) -> Path:
    """A LoRA of rank 2 for ``layers``, by their names with their part."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        outputs, *inputs = SHAPES[layer]
        tensors[f"{layer}.lora_A.weight"] = size * torch.randn(2, *inputs, generator=generator)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(
            outputs, 2, *[1] * (len(inputs) - 1), generator=generator
        )
    save_file(tensors, path)
    return path


@dataclass(frozen=True)
class Made:
    """Two LoRAs, and workspaces of the same model: calibrated, calibrated with the first LoRA, and
    the first with that folded in.
    """

    style: Path
    other: Path
    base: Path
    scratch: Path
    folded: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, pipelines: Callable[[str], Path]) -> Made:
    folder = tmp_path_factory.mktemp("lora")
    style = save_lora(folder / "style.safetensors", tuple(SHAPES), 1)
    other = save_lora(folder / "other.safetensors", (f"unet.{QUERY}",), 2)
    base, scratch = folder / "base", folder / "scratch"
    for root, given in ((base, []), (scratch, ["--lora", f"{style}:0.8"])):
        ended = cli("calibrate", "--model", pipelines("sd"), "-w", root, *FEW, *given)
        assert ended.code == 0, ended.err
    ended = cli("lora", "-w", base, "--lora", f"{style}:0.8", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["changed_layers"] == 3
    return Made(style, other, base, scratch, Path(ended.json["workspace"]))


def checkpoint_of(root: Path) -> Checkpoint:
    return load_checkpoint(root / CALIBRATED)


def smoothing(checkpoint: Checkpoint, name: str) -> Array:
    quantizer, rank = checkpoint.quantizer_of(name), checkpoint.layers[name].weight_codes.ndim
    assert isinstance(quantizer, ActivationQuantizerData)
    return quantizer.channel.reshape(1, -1, *[1] * (rank - 2))


def float_weight(root: Path, name: str) -> Array:
    unet = load_model(Workspace.open(root).source).load_unet()
    return np.asarray(unet.get_submodule(name).get_parameter("weight").detach().numpy())


def codes(root: Path) -> dict[str, Array]:
    return {name: layer.weight_codes for name, layer in checkpoint_of(root).layers.items()}


def same_codes(first: Path, second: Path) -> float:
    """The share of equal weight codes in the layers that the LoRAs change."""
    found, expected = codes(first), codes(second)
    return float(np.mean([np.mean(found[x] == expected[x]) for x in (QUERY, VALUE, CONV)]))


def test_activation_scales_and_the_layers_that_a_lora_does_not_name_stay_bit_for_bit(
    made: Made,
) -> None:
    base, folded = checkpoint_of(made.base), checkpoint_of(made.folded)
    assert (made.base / TRAJECTORIES).read_bytes() == (made.folded / TRAJECTORIES).read_bytes()
    assert (base.scheme, base.architecture, base.matmuls) == (
        *(folded.scheme, folded.architecture, folded.matmuls),
    )
    for name, quantizer in base.quantizers.items():
        for table in ("scale", "low", "high", "channel"):
            expected, found = getattr(quantizer, table), getattr(folded.quantizers[name], table)
            np.testing.assert_array_equal(found, expected)
    for key, value in base.floats.items():
        np.testing.assert_array_equal(folded.floats[key], value)
    others = {
        name
        for name, layer in base.layers.items()
        if (layer.weight_codes != folded.layers[name].weight_codes).any()
        or (layer.weight_scale != folded.layers[name].weight_scale).any()
    }
    assert others == {QUERY, VALUE, CONV}


@pytest.mark.parametrize("name", [QUERY, VALUE, CONV])
def test_folded_weights_are_those_of_a_calibration_with_the_lora_within_rounding(
    made: Made, name: str
) -> None:
    expected = float_weight(made.scratch, name)
    errors = {}
    for root in (made.folded, made.scratch, made.base):
        checkpoint = checkpoint_of(root)
        layer, channel = checkpoint.layers[name], smoothing(checkpoint, name)
        errors[root] = float(np.abs(layer.dequantized_weight / channel - expected).mean())
        if root == made.base:
            continue
        step = layer.weight_scale.reshape(-1, *[1] * (expected.ndim - 1))
        low, high = weight_range(layer.weight_bits)
        within = np.clip(expected * channel, low * step, high * step)
        assert (np.abs(layer.dequantized_weight - within) <= 0.501 * step).all()
    assert errors[made.folded] < 1.3 * errors[made.scratch] < 0.5 * errors[made.base]


def test_inspect_and_the_manifest_tell_of_the_loras_and_where_the_checkpoint_comes_from(
    made: Made,
) -> None:
    shown = cli("inspect", made.folded)
    assert_holds(shown.out, f"{made.style} at 0.8", "lora", "up to date")
    assert_holds(cli("inspect", made.folded / CALIBRATED).out, f"{made.style} at 0.8")
    assert cli("inspect", made.scratch, "--json").json["loras"][0]["weight"] == 0.8
    opened = Workspace.open(made.folded)
    assert opened.source == Workspace.open(made.scratch).source
    record = opened.require("lora")
    assert record.options["base"] == str(made.base)
    assert record.options["loras"][0]["path"] == str(made.style)
    assert opened.root == made.base.with_name("base-style-0.8")


def test_the_same_command_again_gives_the_same_bits_and_leaves_the_base(made: Made) -> None:
    before, expected = snapshot(made.base), (made.folded / CALIBRATED).read_bytes()
    again = qd.lora(made.base, lora=[f"{made.style}:0.8"], output=made.folded)
    assert (again.root, (made.folded / CALIBRATED).read_bytes()) == (made.folded, expected)
    assert snapshot(made.base) == before


def test_a_second_lora_adds_to_the_first_and_another_weight_takes_its_place(
    made: Made, tmp_path: Path
) -> None:
    both, at_once = tmp_path / "both", tmp_path / "at-once"
    assert cli("lora", "-w", made.folded, "--lora", f"{made.other}:2", "-o", both).code == 0
    given = ("--lora", f"{made.style}:0.8", "--lora", f"{made.other}:2")
    assert cli("lora", "-w", made.base, *given, "-o", at_once).code == 0
    assert Workspace.open(both).source == Workspace.open(at_once).source
    assert same_codes(both, at_once) > 0.99 > same_codes(both, made.folded)

    lighter, directly, without = (tmp_path / name for name in ("lighter", "directly", "without"))
    for root, base, weight in (
        (lighter, made.folded, 0.3),
        (directly, made.base, 0.3),
        (without, made.folded, 0),
    ):
        assert cli("lora", "-w", base, "--lora", f"{made.style}:{weight}", "-o", root).code == 0
    assert Workspace.open(lighter).source == Workspace.open(directly).source
    assert same_codes(lighter, directly) > 0.99 > same_codes(lighter, made.folded)
    assert Workspace.open(without).source == Workspace.open(made.base).source
    assert same_codes(without, made.base) > 0.99


def test_a_lora_for_the_text_encoder_alone_changes_no_layer_and_reaches_the_prompts(
    made: Made, tmp_path: Path
) -> None:
    text, root = save_lora(tmp_path / "text.safetensors", (ENCODER,), 3), tmp_path / "text"
    ended = cli("lora", "-w", made.base, "--lora", text, "-o", root, "--json")
    assert (ended.code, ended.json["changed_layers"]) == (0, 0)
    for name, expected in codes(made.base).items():
        np.testing.assert_array_equal(codes(root)[name], expected)
    states = [
        load_model(Workspace.open(x).source).conditions(np.array([0]))["encoder_hidden_states"]
        for x in (made.base, root)
    ]
    assert (states[0] - states[1]).abs().max() > 1e-3


def test_the_lora_that_the_acceptance_of_the_gpu_half_makes_fits_and_changes_all_attention(
    made: Made, tmp_path: Path
) -> None:
    random_lora.main(made.base, tmp_path / "random.safetensors")
    attention = [n for n, x in codes(made.base).items() if ".attn" in n and x.ndim == 2]
    given = ("--lora", tmp_path / "random.safetensors", "-o", tmp_path / "w")
    ended = cli("lora", "-w", made.base, *given, "--json")
    assert (ended.code, ended.json["changed_layers"]) == (0, len(attention))
    assert attention


@pytest.mark.slow
def test_the_graph_of_what_was_folded_differs_in_the_weights_of_its_layers_alone(
    made: Made, tmp_path: Path
) -> None:
    graphs = []
    for root in (made.base, made.folded):
        copied = tmp_path / root.name
        shutil.copytree(root, copied)
        assert cli("export", "-w", copied).code == 0
        graphs.append(lower(load_graph(copied / GRAPH), dtype="fp16"))
    changed = changed_weights(*graphs)
    assert {name.rpartition(".weight")[0] for name in changed} == {QUERY, VALUE, CONV}
    assert len(changed) == 2 * 3  # codes and scales


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "a file that is missing": ("missing.safetensors:1", {}, "missing.safetensors"),
    "a weight that is no number": ("style.safetensors:much", {}, "PATH:WEIGHT"),
    "a layer that the model lacks": (
        "bad.safetensors:1",
        {"unet.up_blocks.7.to_q": ((2, 16), (16, 2))},
        "bad.safetensors up_blocks.7",
    ),
    "another width": (
        "bad.safetensors:1",
        {f"unet.{QUERY}": ((2, 12), (16, 2))},
        f"bad.safetensors {QUERY}",
    ),
    "another width of a text encoder": (
        "bad.safetensors:1",
        {ENCODER: ((2, 12), (16, 2))},
        "bad.safetensors q_proj",
    ),
    "a text encoder that the model lacks": (
        "bad.safetensors:1",
        {ENCODER.replace("text_encoder", "text_encoder_2"): ((2, 16), (16, 2))},
        "bad.safetensors text_encoder_2",
    ),
    "one that is not in": ("other.safetensors:0", {}, "other.safetensors:0 none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_loras_are_refused_before_anything_is_written(
    made: Made, tmp_path: Path, name: str
) -> None:
    given, layers, facts = BAD[name]
    for path in (made.style, made.other):
        shutil.copy(path, tmp_path)
    factors = {
        f"{layer}.lora_{role}.weight": torch.ones(shape)
        for layer, shapes in layers.items()
        for role, shape in zip("AB", shapes, strict=True)
    }
    save_file(factors, tmp_path / "bad.safetensors")
    before = snapshot(made.base)
    ended = cli("lora", "-w", made.base, "--lora", tmp_path / given, "-o", tmp_path / "new")
    ended.assert_refused(*facts.split())
    assert not (tmp_path / "new").exists()
    assert snapshot(made.base) == before


def test_folders_that_hold_something_else_and_loras_that_are_in_already_are_refused(
    made: Made, tmp_path: Path
) -> None:
    given = ("lora", "-w", made.base, "--lora", f"{made.style}:0.8")
    (tmp_path / "notes.txt").touch()
    cli(*given, "-o", tmp_path).assert_refused(tmp_path, "--output")
    for held in (made.base, made.scratch):
        before = snapshot(held)
        cli(*given, "-o", held).assert_refused(held, "--output")
        assert snapshot(held) == before
    other = cli("lora", "-w", made.base, "--lora", f"{made.style}:0.5", "-o", made.folded)
    other.assert_refused(made.folded, f"{made.style}:0.8", "--output")
    again = cli("lora", "-w", made.folded, "--lora", f"{made.style}:0.8", "-o", tmp_path / "new")
    again.assert_refused(made.folded, f"{made.style}:0.8")
    assert not (tmp_path / "new").exists()


def test_a_workspace_that_is_not_calibrated_names_the_command(tmp_path: Path, made: Made) -> None:
    source, scheme = Workspace.open(made.base).source, Workspace.open(made.base).scheme
    Workspace.create(tmp_path / "w", source, scheme)
    ended = cli("lora", "-w", tmp_path / "w", "--lora", made.style, "-o", tmp_path / "new")
    ended.assert_refused("quest-deploy calibrate", tmp_path / "w")


@pytest.mark.parametrize(
    "command",
    [
        ["calibrate"],
        ["finetune"],
        ["sensitivity"],
        ["run", "--seed", 1],
        ["run", "--method", "l2.4"],
    ],
    ids=str,
)
def test_what_is_calibrated_elsewhere_is_neither_calibrated_nor_finetuned(
    made: Made, command: list[str]
) -> None:
    before = snapshot(made.folded)
    cli(*command, "-w", made.folded).assert_refused(made.folded, made.base, "--lora")
    assert snapshot(made.folded) == before


def test_a_damaged_checkpoint_names_the_command_that_folds_again(
    made: Made, tmp_path: Path
) -> None:
    root = tmp_path / "w"
    shutil.copytree(made.folded, root)
    flip_byte(root / CALIBRATED)
    command = f"quest-deploy lora -w {made.base} --lora {made.style}:0.8 --output {root}"
    cli("export", "-w", root).assert_refused(root / CALIBRATED, command)
    assert cli(*command.split()[1:]).code == 0
    assert (root / CALIBRATED).read_bytes() == (made.folded / CALIBRATED).read_bytes()


def test_a_failure_while_it_is_written_leaves_no_workspace(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise QuestDeployError("no")

    monkeypatch.setattr(stage, "save_checkpoint", fail)
    ended = cli("lora", "-w", made.base, "--lora", made.style, "-o", tmp_path / "new")
    assert ended.code == 1
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def finetuned(
    made: Made, text_chain: Chain, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What each command said, of a LoRA in a finetuned checkpoint."""
    root = tmp_path_factory.mktemp("finetuned") / "w"
    given = ("--lora", f"{made.style}:0.8", "-o", root)
    said: dict[str, Any] = {"lora": cli("lora", "-w", text_chain.root, *given, "--json")}
    for command in ("export", "reference"):
        said[command] = cli(command, "-w", root, "--json")
    for backend in BACKENDS:
        here = ("-w", root, "--backend", backend)
        said[f"build-engine {backend}"] = cli("build-engine", *here, "--threads", "1", "--json")
        said[f"verify {backend}"] = cli("verify", *here, "--json")
    small = ("--images", "2", "--steps", "2")
    said["evaluate"] = cli("evaluate", "-w", root, "--backend", "onnxruntime", *small, "--json")
    said["generate"] = cli("generate", "-w", root, "--steps", "2", "--prompt", "a cat", "--json")
    said["report"] = cli("report", "-w", root, "--json")
    said["package"] = cli("package", "-w", root, "--triton", root.with_name("triton"), "--json")
    for name, ended in said.items():
        assert ended.code == 0, (name, ended.err)
    return {name: ended.json for name, ended in said.items()}


@pytest.mark.slow
def test_a_finetuned_checkpoint_goes_on_through_every_command(
    finetuned: dict[str, Any], made: Made
) -> None:
    root = Path(finetuned["lora"]["workspace"])
    assert all(finetuned[f"verify {backend}"]["passed"] for backend in BACKENDS)
    assert list(finetuned["evaluate"]["results"]) == ["FP32", "QuEST", "onnxruntime"]
    assert finetuned["export"]["method"] == "quest"
    page = Path(finetuned["report"]["page"]).read_text()
    assert_holds(page, "Finetuned with QuEST", str(made.style))
    commands = [x for found in finetuned["report"]["missing"].values() for x in found]
    assert not [x for x in commands if "calibrate" in x or "finetune" in x or "lora" in x]
    assert all(reason is None for reason in Workspace.open(root).states().values())


@pytest.mark.slow
def test_its_untouched_layers_are_the_finetuned_ones(
    finetuned: dict[str, Any], text_chain: Chain
) -> None:
    tuned = load_checkpoint(text_chain.root / CHECKPOINT)
    folded = checkpoint_of(Path(finetuned["lora"]["workspace"]))
    assert folded.provenance["method"] == "quest"
    for name, layer in tuned.layers.items():
        same = (layer.weight_codes == folded.layers[name].weight_codes).all()
        assert same == (name not in (QUERY, VALUE, CONV)), name
    for name, quantizer in tuned.quantizers.items():
        np.testing.assert_array_equal(quantizer.scale, folded.quantizers[name].scale)


@pytest.mark.slow
def test_its_pipeline_draws_with_the_lora_in_the_engine_and_in_the_text_encoder(
    finetuned: dict[str, Any], text_chain: Chain
) -> None:
    root = Path(finetuned["lora"]["workspace"])
    pipe, before = (load_pipeline(x, "onnxruntime") for x in (root, text_chain.root))
    layer = ENCODER.removeprefix("text_encoder.text_model.")
    fused, plain = (x.text_encoder.get_submodule(layer).weight for x in (pipe, before))
    assert (fused - plain).abs().max() > 1e-2
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 8, 16, generator=generator)
    fake = QuantizedModel.from_checkpoint(checkpoint_of(root)).eval()
    with torch.no_grad():
        expected = fake(sample, torch.tensor(500.0), encoder_hidden_states=states)
    found, old = (x.unet(sample, 500.0, states).sample for x in (pipe, before))
    assert (found - expected).square().mean() < 1e-3 * expected.square().mean()
    assert (found - old).square().mean() > 1e-2 * old.square().mean()


@pytest.mark.slow
def test_run_goes_on_from_the_folded_checkpoint(finetuned: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "w"
    shutil.copytree(finetuned["lora"]["workspace"], root)
    shutil.rmtree(root / "reports")
    ended = cli("run", "-w", root, "--backend", "onnxruntime")
    assert ended.code == 0, ended.err
    assert "calibrate" not in Workspace.open(root).stages
    assert_holds(ended.err, "export: up to date", "verify/onnxruntime: done")
