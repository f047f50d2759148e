"""Models other than the embedded one at the command line: what is recorded, what may be given
again, what is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.numpy import save_file

from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import IMAGES, MANIFEST, TRAJECTORIES, Workspace
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.models.loading import resolve_source
from quest_deploy.stages.arguments import ExportArguments
from quest_deploy.stages.workspaces import (
    ModelChoices,
    SchemeChoices,
    create_workspace,
    open_workspace,
)
from tests.quest_deploy.support import LDM_CHAIN, TEXT_CHAIN, Chain, cli

FEW = ("--samples", "2", "--steps", "2", "--buckets", "2", "--method", "minmax")


def test_a_text_to_image_pipeline_goes_through_every_command(text_chain: Chain) -> None:
    assert text_chain.outcomes.keys() == TEXT_CHAIN.keys()
    assert text_chain.outcomes["verify onnxruntime"].json["passed"]
    pictures = text_chain.outcomes["generate onnxruntime"].json["pictures"]
    assert [Image.open(path).size for path in pictures] == [(16, 16)] * 2
    results = text_chain.outcomes["evaluate onnxruntime"].json["results"]
    assert list(results) == ["FP32", "PTQ", "QuEST", "onnxruntime"]
    assert results["FP32"]["pixel_mse"] == 0
    assert results["onnxruntime"]["psnr"] == pytest.approx(results["QuEST"]["psnr"], abs=0.5)
    assert len(results["PTQ"]["epsilon_mse"]) == 3


def test_an_unconditional_pipeline_goes_through_every_command(ldm_chain: Chain) -> None:
    assert ldm_chain.outcomes.keys() == LDM_CHAIN.keys()
    assert ldm_chain.outcomes["verify openvino"].json["passed"]
    assert Image.open(ldm_chain.outcomes["generate openvino"].json["picture"]).size[0] > 16


def test_the_manifest_says_where_the_model_comes_from_and_later_commands_need_no_option(
    text_chain: Chain,
) -> None:
    source = json.loads((text_chain.root / MANIFEST).read_text())["source"]
    folder = text_chain.root.parent / "sd-pipeline"
    assert (source["name"], source["location"]) == ("sd-pipeline", str(folder))
    assert source["fingerprint"] == resolve_source(str(folder)).fingerprint
    assert Workspace.open(text_chain.root).source.path == folder


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--model", "emoji"], "emoji"),
        (["--random-weights"], "weights random"),
        (["--revision", "main"], "revision None main"),
        (["--lora", "{lora}:0.5"], "LoRAs"),
    ],
)
def test_a_workspace_of_another_model_is_refused(
    tmp_path: Path, pipelines: Callable[[str], Path], options: list[str], facts: str
) -> None:
    save_file({"weight": np.ones(1)}, tmp_path / "style.safetensors")
    Workspace.create(tmp_path / "ws", resolve_source(str(pipelines("sd"))), Scheme.parse("w4a4"))
    given = [option.format(lora=tmp_path / "style.safetensors") for option in options]
    cli("calibrate", "-w", tmp_path / "ws", *given).assert_refused(tmp_path / "ws", *facts.split())


def test_the_same_model_may_be_named_again_by_any_path_to_it(
    tmp_path: Path, pipelines: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.chdir(pipelines("sd"))
    made = create_workspace(tmp_path / "ws", ModelChoices(model="."), SchemeChoices())
    assert made.model == "sd"
    assert open_workspace(tmp_path / "ws", str(pipelines("sd")), None).source == made.source


def test_a_model_s_layers_of_8_bits_are_none_of_7_bits_unless_they_are_given(
    tmp_path: Path,
) -> None:
    def layers(**choices: Any) -> tuple[str, ...]:
        name = "-".join(map(str, choices.values()))
        made = create_workspace(tmp_path / name, ModelChoices(), SchemeChoices(**choices))
        return made.scheme.eight_bit_layers

    assert layers(bits="w4a8")
    assert layers(bits="w7a8") == ()
    assert layers(bits="w7a8", eight_bit_layers=("conv_in",)) == ("conv_in",)


def test_a_command_without_a_folder_works_on_the_only_workspace_and_asks_where_several_are(
    tmp_path: Path, pipelines: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = pipelines("sd")
    create_workspace(None, ModelChoices(model=str(model)), SchemeChoices(bits="w8a8"))
    assert open_workspace(None, None, None).root == Path("quest-out/sd-w8a8")
    assert ExportArguments().describes_a_new_one is False
    cli("finetune").assert_refused("quest-out/sd-w8a8", "calibrate")
    cli("finetune", "--bits", "w4a4").assert_refused("quest-out/emoji-w4a4")
    cli("finetune", "--model", "emojii").assert_refused("emojii", "sd15")
    create_workspace(None, ModelChoices(model=str(model)), SchemeChoices(bits="w4a4"))
    for command in ("export", "finetune", "report"):
        cli(command).assert_refused("quest-out/sd-w4a4", "quest-out/sd-w8a8", "-w")
    assert open_workspace(None, None, "w4a4").root == Path("quest-out/sd-w4a4")
    create_workspace(None, ModelChoices(), SchemeChoices())
    assert open_workspace(None, None, None).root == Path("quest-out/emoji-w4a8")


def test_the_default_folder_is_called_after_the_models_folder(
    tmp_path: Path, pipelines: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = cli("calibrate", "--model", pipelines("class-labels"), *FEW, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["workspace"] == "quest-out/class-labels-w4a8"


def test_random_weights_are_recorded_and_calibrated_without_text_encoder_or_hub(
    tmp_path: Path, pipelines: Callable[[str], Path]
) -> None:
    ended = cli("calibrate", "-w", tmp_path, "--model", pipelines("sdxl"), "--random-weights", *FEW)
    assert ended.code == 0, ended.err
    source = Workspace.open(tmp_path).source
    assert (source.random_weights, source.seed) == (True, 0)
    drawn = cli("generate", "-w", tmp_path)
    assert drawn.code == 2


def test_the_prompts_of_a_file_are_recorded_and_used(
    tmp_path: Path, pipelines: Callable[[str], Path]
) -> None:

    (tmp_path / "prompts.txt").write_text("a cat\n\n  a red dog \n")
    options = (
        "--model",
        pipelines("sd"),
        *FEW,
        "--prompts",
        tmp_path / "prompts.txt",
        "--guidance",
        "3",
        "--batch",
        "3",
    )
    assert cli("calibrate", "-w", tmp_path / "ws", *options).code == 0
    recorded = Workspace.open(tmp_path / "ws").require("calibrate").options
    assert (recorded["prompts"], recorded["guidance"], recorded["batch"]) == (
        ["a cat", "a red dog"],
        3,
        3,
    )
    states = Trajectories.load(tmp_path / "ws" / TRAJECTORIES).conditions["encoder_hidden_states"]
    assert len(states) == 4  # two samplings, both halves
    assert len(states.flatten(1).unique(dim=0)) == 3


@pytest.mark.parametrize("content", [None, "\n \n"])
def test_a_file_without_prompts_is_refused(
    tmp_path: Path, pipelines: Callable[[str], Path], content: str | None
) -> None:
    if content is not None:
        (tmp_path / "prompts.txt").write_text(content)
    ended = cli(
        "calibrate",
        "-w",
        tmp_path / "ws",
        "--model",
        pipelines("sd"),
        "--prompts",
        tmp_path / "prompts.txt",
    )
    ended.assert_refused(tmp_path / "prompts.txt", "prompt")
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize(
    ("chain", "backend", "options", "facts"),
    [
        ("text_chain", "onnxruntime", ["--labels", "01"], "--labels sd-pipeline text-to-image"),
        ("text_chain", "onnxruntime", ["--height", "15"], "--height 15"),
        ("ldm_chain", "openvino", ["--prompt", "a cat"], "--prompt ldm-pipeline unconditional"),
        ("ldm_chain", "openvino", ["--labels", "0"], "--labels ldm-pipeline"),
        ("ldm_chain", "openvino", ["--guidance", "3"], "guidance 1"),
    ],
)
def test_generate_refuses_what_the_model_cannot_be_asked_for(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    chain: str,
    backend: str,
    options: list[str],
    facts: str,
) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(request.getfixturevalue(chain).root, root)
    before = (root / MANIFEST).read_bytes()
    cli("generate", "-w", root, "--backend", backend, *options).assert_refused(*facts.split())
    assert (root / MANIFEST).read_bytes() == before


def in_older_form(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a pipeline that tells of its steps in diffusers' older form alone."""

    def older(
        self: Any,
        prompt: list[str],
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        generator: Any = None,
        output_type: str = "pil",
        callback: Any = None,
    ) -> Any:
        def on_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            callback(step, timestep, values["latents"])
            return values

        return call(
            self,
            prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type=output_type,
            callback_on_step_end=on_step,
        )

    return older


@pytest.mark.parametrize(
    ("guidance", "older", "facts"),
    [
        ("1e300", False, "step 1 3"),
        ("1e300", True, "step 1 3"),
        ("1e30", False, "decoder's"),
    ],
)
def test_what_is_not_finite_makes_no_picture(
    text_chain: Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    guidance: str,
    older: bool,
    facts: str,
) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(text_chain.root, root)
    shutil.rmtree(root / IMAGES, ignore_errors=True)
    if older:
        call = in_older_form(StableDiffusionPipeline.__call__)
        monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    ended = cli(
        *("generate", "-w", root, "--backend", "onnxruntime"),
        *("--steps", "3", "--guidance", guidance),
    )
    ended.assert_refused(*facts.split(), "--guidance", code=1)
    assert not list(root.rglob("*.png"))
