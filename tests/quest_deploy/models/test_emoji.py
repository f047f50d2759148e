from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from quest_deploy.artifacts.model_source import ModelSource
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.calibration.trajectories import record_trajectories
from quest_deploy.finetuning.layer_sets import LAYER_SETS
from quest_deploy.models.conditions import BLOCK
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.registry import (
    EMBEDDED_FOLDER,
    KNOWN_MODELS,
    MODEL_NAMES,
    check_model_name,
)
from quest_deploy.models.schedulers import SCHEDULERS
from tests.helpers import refused
from tests.quest_deploy.support import cli


def test_the_registry_knows_the_embedded_model_and_refuses_others() -> None:
    assert "emoji" in MODEL_NAMES
    assert load_model(resolve_source("emoji")).name == "emoji"
    for look_up in (check_model_name, resolve_source):
        with refused("'sd99'", "emoji", "sd14", "diffusers"):
            look_up("sd99")


def test_the_model_of_former_versions_is_refused_with_what_does_its_work(tmp_path: Path) -> None:
    ended = cli("calibrate", "-w", tmp_path / "ws", "--model", "tiny")
    ended.assert_refused("tiny", "--model emoji")
    assert not (tmp_path / "ws").exists()
    Workspace.create(tmp_path / "old", "tiny", Scheme.parse("w4a4"))
    cli("calibrate", "-w", tmp_path / "old").assert_refused("tiny", "--model emoji")


def test_a_folder_called_like_the_model_of_former_versions_is_given_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model_index.json").write_text("{}")
    assert resolve_source("./tiny").path == tmp_path / "tiny"
    with refused("tiny", "--model emoji", "./tiny"):
        resolve_source("tiny")
    with refused("tiny", "--model emoji"):
        load_model(ModelSource("tiny"))


def test_its_files_are_a_pipeline_s_of_at_most_16_mb_without_pickles() -> None:
    files = [path for path in EMBEDDED_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}


def test_the_unet_predicts_float32_in_the_samples_shape(emoji: PipelineModel) -> None:
    unet = emoji.load_unet()
    assert not unet.training
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    sample = torch.randn(2, *emoji.sample_shape)
    conditions = emoji.conditions(np.asarray([3, 4]))
    output = unet(sample, torch.tensor([1.0, 900.0]), **conditions, return_dict=False)[0]
    assert output.shape == sample.shape
    assert emoji.images(output.detach().numpy()).shape == (2, 3, 64, 64)


def test_each_prompt_has_conditions_of_its_own_and_none_too(emoji: PipelineModel) -> None:
    prompts = emoji.prompts
    assert len(set(prompts)) == len(prompts) == emoji.labels > 1600
    states = emoji.conditions(np.arange(40))["encoder_hidden_states"]
    null = emoji.null_conditions(1)["encoder_hidden_states"]
    assert states.shape == (40, 24, 128)
    assert len(torch.cat([states, null]).flatten(1).unique(dim=0)) == 41


def test_a_prompts_states_are_those_of_the_pipeline_whatever_is_asked_for_with_it(
    emoji: PipelineModel,
) -> None:
    labels = np.asarray([BLOCK + 1, 2, emoji.labels - 1, 2])
    found = load_model(emoji.source).conditions(labels)["encoder_hidden_states"]
    for row, label in enumerate(labels):
        alone = load_model(emoji.source).conditions(labels[row : row + 1])
        assert torch.equal(found[row], alone["encoder_hidden_states"][0])
        pipeline = emoji.load_pipeline(vae=None)
        expected, _ = pipeline.encode_prompt(emoji.prompts[label], "cpu", 1, False)
        torch.testing.assert_close(found[row], expected[0].detach())


def test_as_few_prompts_are_encoded_as_are_asked_for_and_none_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, encoded = load_model(resolve_source("emoji")), []
    encode = type(model)._encode
    monkeypatch.setattr(
        type(model), "_encode", lambda self, given: encoded.extend(given) or encode(self, given)
    )
    for _ in range(2):
        model.conditions(np.asarray([BLOCK, 0, 1]))
        model.null_conditions(3)
    assert encoded == model.prompts[: 2 * BLOCK]


def test_the_states_of_no_prompt_are_the_first_blocks_whatever_is_asked_for_first(
    emoji: PipelineModel,
) -> None:
    first, other = (load_model(emoji.source) for _ in range(2))
    expected = first.null_conditions(1)["encoder_hidden_states"]
    encode = type(other)._encode
    calls: list[list[str]] = []

    def marked(
        given: list[str],
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        calls.append(given)
        states, null = encode(other, given)
        # As a block of another size may have other last bits.
        return states, {name: value + (len(calls) - 1) for name, value in null.items()}

    other._encode = marked  # type: ignore[method-assign]
    for label in (3 * BLOCK, BLOCK):
        other.conditions(np.asarray([label]))
        assert torch.equal(other.null_conditions(1)["encoder_hidden_states"], expected)
    assert calls[0][:BLOCK] == other.prompts[:BLOCK]
    assert len(calls) == 2


def test_the_text_encoder_is_loaded_once_for_all_that_is_asked_for_at_once(
    emoji: PipelineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loaded = load_model(emoji.source), []
    load = type(model).load_pipeline
    monkeypatch.setattr(
        type(model), "load_pipeline", lambda self, **parts: loaded.append(1) or load(self, **parts)
    )
    model.conditions(np.arange(5 * BLOCK, 8 * BLOCK))
    model.null_conditions(2)
    assert len(loaded) == 1


@pytest.mark.parametrize("label", [-1, 99_999])
def test_a_label_that_is_no_prompt_is_refused(emoji: PipelineModel, label: int) -> None:
    with refused(0, emoji.labels - 1, label):
        emoji.conditions(np.asarray([3, label]))


def test_random_conditions_depend_on_the_generator_alone_and_repeat_none(
    emoji: PipelineModel,
) -> None:
    drawn, again = (
        emoji.draw_conditions(9, torch.Generator().manual_seed(0))["encoder_hidden_states"]
        for _ in range(2)
    )
    assert torch.equal(drawn, again)
    assert len(drawn.flatten(1).unique(dim=0)) == 9


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_has_the_models_own_noise_schedule(emoji: PipelineModel, name: str) -> None:
    config = emoji.load_scheduler(name).config
    assert (config.num_train_timesteps, config.beta_start, config.beta_end) == (1000, 8.5e-4, 0.012)
    assert (config.beta_schedule, config.prediction_type) == ("scaled_linear", "epsilon")


@pytest.mark.parametrize("buckets", [1, 3, 20, 21, 300, 999, 1000])
def test_trajectories_visit_every_bucket_of_any_number_from_1_to_the_training_steps(
    emoji: PipelineModel, buckets: int
) -> None:
    scheme = Scheme.parse("w4a4", buckets=buckets)

    def unet(
        sample: torch.Tensor, timestep: torch.Tensor, **conditions: object
    ) -> tuple[torch.Tensor]:
        return (torch.zeros_like(sample),)

    recorded = record_trajectories(emoji, unet, steps=20, samples=1, seed=0, scheme=scheme)  # type: ignore[arg-type]
    timesteps = recorded.timestep.tolist()
    assert {scheme.bucket_of(t) for t in timesteps} == set(range(buckets))
    assert timesteps == sorted(timesteps, reverse=True)
    assert all(0 <= t < 1000 for t in timesteps)


def test_it_has_defaults_and_a_judge_of_its_own_and_a_folder_of_its_name_has_neither(
    emoji: PipelineModel, tmp_path: Path
) -> None:
    copy = load_model(resolve_source(str(shutil.copytree(EMBEDDED_FOLDER, tmp_path / "emoji"))))
    defaults = KNOWN_MODELS["emoji"].defaults
    assert copy.name == emoji.name
    assert emoji.family == copy.family
    assert emoji.family in LAYER_SETS
    assert {name: getattr(emoji, name) for name in defaults} == defaults
    assert [name for name in defaults if getattr(copy, name) == defaults[name]] == []
    assert emoji.judge_folder == EMBEDDED_FOLDER / "judge"
    assert copy.judge_folder is None
    assert len(emoji.prompts) > 1600 > len(copy.prompts)


def test_random_weights_and_other_prompts_have_no_judge(emoji: PipelineModel) -> None:
    random = load_model(resolve_source("emoji", random_weights=True))
    assert random.judge_folder is None
    with refused("emoji", "random"):
        random.images(np.zeros((1, *random.sample_shape), np.float32))
    weights, trained = (x.load_unet().conv_in.weight for x in (random, emoji))
    assert not torch.equal(weights, trained)
    asked = load_model(emoji.source, ["a cat", "a dog"])
    assert (asked.judge_folder, asked.labels) == (None, 2)


def test_it_takes_loras_and_a_prediction_type_as_any_folder_does(
    emoji: PipelineModel, tmp_path: Path
) -> None:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = emoji.config["block_out_channels"][-1]
    down, up = torch.randn(2, width), torch.randn(width, 2)
    lora = tmp_path / "lora.safetensors"
    save_file({f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}, lora)
    model = load_model(
        resolve_source("emoji", loras=[f"{lora}:0.5"], prediction_type="v_prediction")
    )
    plain, fused = (x.load_unet().get_submodule(layer).weight for x in (emoji, model))
    torch.testing.assert_close(fused, plain + 0.5 * up @ down)
    assert model.load_scheduler("ddim").config.prediction_type == "v_prediction"


@pytest.mark.slow
def test_nothing_is_said_of_packages_that_it_does_not_need(tmp_path: Path) -> None:
    few = ("--samples", "1", "--steps", "2", "--buckets", "2", "--method", "minmax")
    line = [sys.executable, "-m", "quest_deploy", "calibrate", "-w", tmp_path / "ws", *few]
    ended = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "torchvision" not in ended.stderr
