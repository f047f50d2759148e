"""What a single file says of what it predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import quest_deploy as qd
from quest_deploy.artifacts.model_source import ModelSource
from quest_deploy.artifacts.schema import parse
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from tests.helpers import refused
from tests.quest_deploy.support import cli

XL = {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(4)}
SD2 = {
    "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(
        4, 1024
    )
}
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
VELOCITY, NOISE = torch.tensor([0.2, -0.2]), torch.tensor([0.05, -0.05])
"""Biases whose deviation ComfyUI reads as one or the other."""
MARKS = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
V_YAML = "model: {params: {parameterization: v, linear_start: 0.00085, linear_end: 1.2e-2}}"
SGM = (
    "model: {params: {denoiser_config: {params: {scaling_config: {target: "
    "sgm.modules.diffusionmodules.denoiser_scaling.%s}, discretization_config: {target: "
    "sgm.modules.diffusionmodules.discretizer.%s}}}}}"
)


BOMB = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
"""A kilobyte that stands for a thousand million values."""


def single_file(
    folder: Path,
    tensors: dict[str, Any],
    metadata: dict[str, str] | None = None,
    step: int | None = None,
    text: str | None = None,
) -> Path:
    """A file of these tensors, in torch's format where it holds the training ``step`` too; ``text``
    is its original configuration.
    """
    tensors = {CONV_IN: torch.zeros(8, 4, 3, 3), **tensors}
    path = folder / "model.safetensors"
    if step is None:
        save_file(tensors, path, metadata=metadata)
    else:
        path = folder / "model.ckpt"
        torch.save({"state_dict": tensors, "global_step": step}, path)
    if text is not None:
        (folder / "model.yaml").write_text(text)
    return path


def loaded(path: Path, prediction_type: str | None = None) -> PipelineModel:
    model = load_model(resolve_source(str(path), prediction_type=prediction_type))
    assert isinstance(model, PipelineModel)
    return model


SAID: dict[str, tuple[dict[str, Any], str, bool]] = {
    "plain xl": ({"tensors": XL}, "epsilon", False),
    "plain sd1": ({"tensors": {}}, "epsilon", False),
    "v_pred and ztsnr": ({"tensors": {**XL, **MARKS}}, "v_prediction", True),
    "v_pred alone": (
        {"tensors": {**XL, "v_pred": torch.tensor([])}},
        "v_prediction",
        False,
    ),
    "ztsnr alone, which ComfyUI does not read": (
        {"tensors": {**XL, "ztsnr": torch.tensor([])}},
        "epsilon",
        False,
    ),
    "v_pred in sd1": ({"tensors": MARKS}, "v_prediction", True),
    "modelspec's v": (
        {"tensors": XL, "metadata": {"modelspec.prediction_type": "v"}},
        "v_prediction",
        False,
    ),
    "modelspec's epsilon": (
        {"tensors": XL, "metadata": {"modelspec.prediction_type": "epsilon"}},
        "epsilon",
        False,
    ),
    "ComfyUI's own metadata": (
        {"tensors": XL, "metadata": {"modelspec.predict_key": "v"}},
        "v_prediction",
        False,
    ),
    "a trainer's metadata, sd1": (
        {"tensors": {}, "metadata": {"ss_v_parameterization": "True"}},
        "v_prediction",
        False,
    ),
    "sd2 768 by its architecture": (
        {"tensors": SD2, "metadata": {"modelspec.architecture": "stable-diffusion-v2-768-v"}},
        "v_prediction",
        False,
    ),
    "sd2 base by its architecture": (
        {"tensors": SD2, "metadata": {"modelspec.architecture": "stable-diffusion-v2-512"}},
        "epsilon",
        False,
    ),
    "sd2 base by its step": ({"tensors": SD2, "step": 875000}, "epsilon", False),
    "sd2 768 by its step": ({"tensors": SD2, "step": 140000}, "v_prediction", False),
    "sd2 768 by its weights": ({"tensors": {**SD2, NORM: VELOCITY}}, "v_prediction", False),
    "sd2 base by its weights": ({"tensors": {**SD2, NORM: NOISE}}, "epsilon", False),
    "sd2.1 base by its weights, whatever its step": (
        {"tensors": {**SD2, NORM: NOISE}, "step": 220000},
        "epsilon",
        False,
    ),
    "sd1 by its yaml": ({"tensors": {}, "text": V_YAML}, "v_prediction", False),
    "sd2 by its yaml": (
        {"tensors": SD2, "text": "model: {params: {timesteps: 1000}}"},
        "epsilon",
        False,
    ),
    "xl by its yaml": (
        {"tensors": XL, "text": SGM % ("VScaling", "LegacyDDPMDiscretization")},
        "v_prediction",
        False,
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_a_single_file_predicts_what_it_says(tmp_path: Path, case: str) -> None:
    file, prediction, zero_snr = SAID[case]
    model = loaded(single_file(tmp_path, **file))
    config = model.scheduler_config()
    assert config["prediction_type"] == prediction
    assert bool(config.get("rescale_betas_zero_snr")) == zero_snr
    ddim = model.load_scheduler("ddim").config
    assert (ddim.prediction_type, ddim.rescale_betas_zero_snr) == (prediction, zero_snr)


def test_sd2_base_has_512_pixels_and_its_successor_768(tmp_path: Path) -> None:
    for bias, side in ((NOISE, 64), (VELOCITY, 96)):
        path = single_file(tmp_path, {**SD2, NORM: bias})
        assert loaded(path).sample_shape == (4, side, side)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "EDM": ({"tensors": {**XL, "edm_vpred.sigma_max": torch.tensor(120.0)}}, "edm_vpred.sigma_max"),
    "Playground": (
        {"tensors": {**XL, "edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}},
        "edm_mean",
    ),
    "image editing": ({"tensors": {**XL, CONV_IN: torch.zeros(8, 8, 3, 3)}}, "8 4"),
    "depth": ({"tensors": {**SD2, CONV_IN: torch.zeros(8, 5, 3, 3), NORM: NOISE}}, "5 4"),
    "sd2 that does not say": ({"tensors": SD2}, "--prediction-type epsilon v_prediction"),
    "sd2 whose step and weights differ": (
        {"tensors": {**SD2, NORM: VELOCITY}, "step": 875000},
        "--prediction-type 875000",
    ),
    "marks and metadata that differ": (
        {"tensors": {**XL, **MARKS}, "metadata": {"modelspec.prediction_type": "epsilon"}},
        "--prediction-type v_pred modelspec.prediction_type",
    ),
    "an unknown word": (
        {"tensors": XL, "metadata": {"modelspec.prediction_type": "flow"}},
        "modelspec.prediction_type flow",
    ),
    "unCLIP": (
        {"tensors": {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(4, 4)}},
        "model.diffusion_model.label_emb.0.0.weight",
    ),
    "EDM by its yaml": (
        {"tensors": XL, "text": SGM % ("EDMScaling", "EDMDiscretization")},
        "EDMScaling",
    ),
    "sigmas by its yaml": (
        {"tensors": XL, "text": SGM % ("VScaling", "EDMDiscretization")},
        "EDMDiscretization",
    ),
    "another yaml": ({"tensors": {}, "text": "a: [1, 2]"}, "model.yaml model.safetensors"),
    "no yaml": ({"tensors": {}, "text": "a: ]"}, "model.yaml"),
    "an unknown parameterization": (
        {"tensors": {}, "text": "model: {params: {parameterization: w}}"},
        "parameterization w",
    ),
    "an unknown schedule": (
        {"tensors": {}, "text": "model: {params: {beta_schedule: sqrt}}"},
        "beta_schedule sqrt",
    ),
    "a list of schedules": (
        {"tensors": {}, "text": "model: {params: {beta_schedule: [linear]}}"},
        "beta_schedule",
    ),
    "endless steps": (
        {"tensors": {}, "text": "model: {params: {timesteps: .inf}}"},
        "model.yaml",
    ),
    "aliases of aliases": (
        {"tensors": {}, "text": f"{BOMB}model: {{params: {{parameterization: *a29}}}}"},
        "model.yaml *a0",
    ),
    "an infinite variance": (
        {"tensors": {}, "text": "model: {params: {linear_end: .inf}}"},
        "beta_end",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_or_sampled_is_refused_by_name(tmp_path: Path, case: str) -> None:
    file, facts = REFUSED[case]
    path = single_file(tmp_path, **file)
    with refused(*facts.split()):
        loaded(path)


def test_an_original_configurations_noise_schedule_is_the_models(tmp_path: Path) -> None:
    text = (
        "model: {params: {linear_start: 1e-3, linear_end: 2e-2, timesteps: 400, "
        "beta_schedule: sqrt_linear}}"
    )
    model = loaded(single_file(tmp_path, {}, text=text))
    betas = torch.linspace(1e-3, 2e-2, 400)
    torch.testing.assert_close(model.load_scheduler("ddim").betas, betas)
    assert model.train_timesteps == 400


def test_a_single_file_whose_original_configuration_was_changed_is_refused(tmp_path: Path) -> None:
    path = single_file(tmp_path, {}, text=V_YAML)
    source = resolve_source(str(path))
    load_model(source)
    (tmp_path / "model.yaml").unlink()
    with refused(path, "-w"):
        load_model(source)


@pytest.mark.parametrize("asked", ["epsilon", "v_prediction", "sample"])
def test_what_the_user_says_goes_before_what_the_file_says(tmp_path: Path, asked: str) -> None:
    for tensors in (SD2, {**SD2, NORM: VELOCITY}, {**XL, **MARKS}):
        source = resolve_source(str(single_file(tmp_path, tensors)), prediction_type=asked)
        again = parse(ModelSource, source.to_json(), "source")
        for model in map(load_model, (source, again)):
            assert model.load_scheduler("ddim").config.prediction_type == asked


def test_what_the_user_says_goes_before_words_that_nobody_knows(tmp_path: Path) -> None:
    metadata = {"modelspec.prediction_type": "flow"}
    path = single_file(tmp_path, {}, metadata, text="model: {params: {parameterization: w}}")
    assert loaded(path, "v_prediction").scheduler_config()["prediction_type"] == "v_prediction"


def test_a_folders_prediction_type_is_the_users_too_and_every_stage_uses_it(
    pipelines: Any, tmp_path: Path
) -> None:
    workspace = qd.calibrate(
        str(pipelines("sd")),
        prediction_type="v_prediction",
        workspace=tmp_path / "ws",
        samples=1,
        steps=2,
        buckets=2,
        method="minmax",
    )
    model = load_model(workspace.source)
    assert isinstance(model, PipelineModel)
    assert model.load_scheduler("euler").config.prediction_type == "v_prediction"
    assert model.load_pipeline().scheduler.config.prediction_type == "v_prediction"
    assert type(model.load_pipeline().scheduler).__name__ == "DDIMScheduler"
    other = ("calibrate", "-w", tmp_path / "ws", "--prediction-type", "epsilon")
    cli(*other).assert_refused("v_prediction", "epsilon", "-w")


def test_an_unknown_prediction_type_is_refused(tmp_path: Path) -> None:
    ended = cli("calibrate", "-w", tmp_path / "ws", "--prediction-type", "v")
    ended.assert_refused("--prediction-type", "v_prediction")
