"""What a model's scheduler configuration means in each scheduler that it is sampled with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import quest_deploy as qd
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.calibration.trajectories import record_trajectories
from quest_deploy.errors import InputError
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.schedulers import IN_SIGMAS, OF_BETAS, SCHEDULERS, most_steps, set_steps
from quest_deploy.serving.schedule import run_schedule, schedule_from_scheduler
from tests.helpers import refused
from tests.pipelines import BETAS
from tests.quest_deploy.support import cli

CLIPPING = ("ddim", "ddpm", "lcm")
SIGMAS = (
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "CMStochasticIterativeScheduler",
    "ScoreSdeVeScheduler",
    "IPNDMScheduler",
    "CosineDPMSolverMultistepScheduler",
    "UnCLIPScheduler",
    "KarrasVeScheduler",
    "MyOwnScheduler",
)


@pytest.fixture
def model_with(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> Callable[..., Callable[[], PipelineModel]]:
    """A copy of a small pipeline whose scheduler's folder holds another configuration."""

    def made(config: dict[str, Any], name: str = "ldm") -> Callable[[], PipelineModel]:
        folder = tmp_path / name
        shutil.copytree(pipelines(name), folder)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", config.get("_class_name")]
        (folder / "model_index.json").write_text(json.dumps(index))

        def load() -> PipelineModel:
            loaded = load_model(resolve_source(str(folder)))
            assert isinstance(loaded, PipelineModel)
            return loaded

        return load

    return made


def saved(name: str, folder: Path, **options: Any) -> dict[str, Any]:
    """What diffusers writes for a scheduler of the class ``name``."""
    if name == "DPMSolverSDEScheduler":  # needs a package that is not there
        return {"_class_name": name, **BETAS}
    getattr(diffusers, name)(**BETAS, **options).save_pretrained(folder)
    config: dict[str, Any] = json.loads((folder / "scheduler_config.json").read_text())
    return config


@pytest.mark.parametrize("name", sorted(OF_BETAS))
def test_latents_are_clipped_only_where_the_configuration_says_so(
    model_with: Callable[..., Callable[[], PipelineModel]], tmp_path: Path, name: str
) -> None:
    config = saved(name, tmp_path / "saved")
    said = config.get("clip_sample", False)
    model = model_with(config)()
    packaged = json.loads(json.dumps(model.scheduler_config(), allow_nan=False))  # for Triton
    assert diffusers.DDIMScheduler.from_config(packaged).config.clip_sample == said
    for target in CLIPPING:
        scheduler = model.load_scheduler(target)
        assert scheduler.config.clip_sample == said
        own, made = (
            diffusers.DDPMScheduler(**BETAS).alphas_cumprod,
            scheduler.alphas_cumprod,
        )
        torch.testing.assert_close(made, own)


def test_a_pixel_model_keeps_diffusers_own_clipping(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "pixels"
    shutil.copytree(pipelines("ldm"), folder)
    shutil.rmtree(folder / "vqvae")
    index = json.loads((folder / "model_index.json").read_text())
    del index["vqvae"]
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    config = saved("EulerDiscreteScheduler", tmp_path / "saved")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    model = load_model(resolve_source(str(folder)))
    assert model.load_scheduler("ddim").config.clip_sample


def test_a_table_for_cpp_holds_the_unclipped_steps_of_another_classs_configuration(
    model_with: Callable[..., Callable[[], PipelineModel]], tmp_path: Path
) -> None:
    model = model_with(saved("DPMSolverMultistepScheduler", tmp_path / "saved"))()

    def make(**overrides: Any) -> Any:
        scheduler = model.load_scheduler("ddim", **overrides)
        scheduler.set_timesteps(5)
        return scheduler

    table, sample = schedule_from_scheduler(make), torch.full((1, 4), 3.0, dtype=torch.float64)
    predictions = list(torch.randn(5, 1, 4, generator=torch.Generator().manual_seed(0)).double())
    found = run_schedule(table, sample, predictions, [torch.zeros_like(sample)] * 5)[-1]
    scheduler = make(clip_sample=False)
    for prediction, timestep in zip(predictions, scheduler.timesteps, strict=True):
        sample = scheduler.step(prediction, timestep, sample).prev_sample
    torch.testing.assert_close(found, sample, rtol=1e-5, atol=1e-5)


def test_what_a_file_leaves_to_its_class_is_that_classs_default(
    model_with: Callable[..., Callable[[], PipelineModel]],
) -> None:
    model = model_with({"_class_name": "LCMScheduler"})()
    for name in SCHEDULERS:
        alphas = model.load_scheduler(name).alphas_cumprod
        torch.testing.assert_close(alphas, diffusers.LCMScheduler().alphas_cumprod)


@pytest.mark.parametrize("name", SIGMAS)
def test_a_schedule_in_sigmas_is_refused_by_its_class(
    model_with: Callable[..., Callable[[], PipelineModel]], name: str
) -> None:
    with refused(name):
        model_with({"_class_name": name, "num_train_timesteps": 1000})()


@pytest.mark.parametrize(("option", "value"), IN_SIGMAS.items())
def test_an_option_that_samples_in_sigmas_is_refused(
    model_with: Callable[..., Callable[[], PipelineModel]], option: str, value: Any
) -> None:
    with refused(option):
        model_with({"_class_name": "EulerDiscreteScheduler", **BETAS, option: value})()


@pytest.mark.parametrize("prediction", ["flow_prediction", "v"])
def test_an_unknown_prediction_type_is_refused(
    model_with: Callable[..., Callable[[], PipelineModel]], prediction: str
) -> None:
    config = {"_class_name": "DDIMScheduler", **BETAS, "prediction_type": prediction}
    with refused("prediction_type"):
        model_with(config)()


def test_zero_snr_reaches_every_scheduler_that_knows_it_and_the_other_is_refused(
    model_with: Callable[..., Callable[[], PipelineModel]],
) -> None:
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    model = model_with({"_class_name": "DDIMScheduler", **BETAS, **zero})()
    for name in SCHEDULERS:
        if name == "pndm":
            with refused("PNDMScheduler", "rescale_betas_zero_snr"):
                model.load_scheduler(name)
        else:
            assert float(model.load_scheduler(name).alphas_cumprod[-1]) < 1e-7


NUMBERS = {
    ("pndm", 3): "4 999",
    ("pndm", 1): "4 999",
    ("lcm", 60): "1 50",
    ("ddim", 2000): "1 999",
    ("ddpm", 1001): "1 999",
    ("euler", 1001): "1 999",
    ("ddim", 1000): "1 999",
    ("dpm++", 1000): "1 998",
}
"""Numbers of steps that the embedded model's schedulers refuse, and those that they take. An offset
of 1 leaves no thousandth step.
"""


@pytest.mark.parametrize(("asked", "numbers"), NUMBERS.items())
def test_a_number_of_steps_that_a_scheduler_refuses_is_answered_with_those_that_it_takes(
    emoji: PipelineModel, asked: tuple[str, int], numbers: str
) -> None:
    name, steps = asked
    with refused(steps, SCHEDULERS[name], *numbers.split()):
        set_steps(emoji.load_scheduler(name), steps)
    for works in map(int, numbers.split()):
        set_steps(emoji.load_scheduler(name), works)


def test_a_scheduler_that_does_not_know_the_prediction_type_is_refused(
    emoji: PipelineModel,
) -> None:
    with refused("PNDMScheduler", "sample"):
        set_steps(emoji.load_scheduler("pndm", prediction_type="sample"), 20)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("beta_schedule", "sigmoid"),
        ("beta_schedule", "unknown"),
        ("trained_betas", [0.5, 0.5]),
        ("trained_betas", ["a", "b"]),
        ("timestep_spacing", "unknown"),
    ],
)
def test_what_the_scheduler_of_calibration_does_not_take_is_refused_by_its_setting(
    model_with: Callable[..., Callable[[], PipelineModel]],
    tmp_path: Path,
    setting: str,
    value: Any,
) -> None:
    model_with({"_class_name": "DDPMScheduler", **BETAS, setting: value})
    outcome = cli("calibrate", "-w", tmp_path / "ws", "--model", tmp_path / "ldm", "--samples", 1)
    outcome.assert_refused("scheduler_config.json", setting)


@pytest.mark.parametrize("zero_snr", [True, False])
def test_zero_snr_is_named_only_where_it_is_to_blame(
    emoji: PipelineModel, *, zero_snr: bool
) -> None:
    changes: dict[str, Any] = (
        {"rescale_betas_zero_snr": True} if zero_snr else {"trained_betas": [2.0] * 1000}
    )
    with pytest.raises(InputError) as caught:
        set_steps(emoji.load_scheduler("ddim", timestep_spacing="trailing", **changes), 4)
    assert ("SNR" in str(caught.value)) == zero_snr


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_ddpm_takes_steps_with_a_variance_that_the_model_predicts(variance_type: str) -> None:
    scheduler = diffusers.DDPMScheduler(variance_type=variance_type, clip_sample=False)
    set_steps(scheduler, 20)
    assert len(scheduler.timesteps) == 20


def test_trying_the_steps_draws_nothing_from_the_callers_generator(emoji: PipelineModel) -> None:
    state = torch.get_rng_state()
    set_steps(emoji.load_scheduler("ddpm"), 5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "command", ["schedule", "generate --backend onnxruntime", "evaluate --backend onnxruntime"]
)
def test_every_command_that_takes_steps_refuses_them_at_once(workspace: Path, command: str) -> None:
    name, *options = command.split()
    outcome = cli(name, "-w", workspace, *options, "--scheduler", "pndm", "--steps", "2")
    outcome.assert_refused("PNDMScheduler", 4)


def test_calibrate_refuses_more_steps_than_the_model_was_trained_with(tmp_path: Path) -> None:
    outcome = cli("calibrate", "-w", tmp_path / "new", "--steps", "1001", "--samples", "1")
    outcome.assert_refused(1001, 1000)


@pytest.mark.parametrize("trained", [8, 50, 400, 4000])
def test_buckets_divide_the_models_own_training_steps(
    model_with: Callable[..., Callable[[], PipelineModel]], tmp_path: Path, trained: int
) -> None:
    config = {"_class_name": "DDPMScheduler", **BETAS, "num_train_timesteps": trained}
    model_with(config)
    workspace = qd.calibrate(
        str(tmp_path / "ldm"), workspace=tmp_path / "ws", samples=1, method="minmax"
    )
    scheme = workspace.scheme
    assert scheme.train_timesteps == trained
    assert scheme.buckets == min(20, trained)
    from quest_deploy.calibration.trajectories import Trajectories

    recorded = Trajectories.load(workspace.path("trajectories.safetensors")).timestep.tolist()
    assert {scheme.bucket_of(t) for t in recorded} == set(range(scheme.buckets))
    assert len(recorded) == scheme.buckets
    assert max(recorded) < trained


def test_by_default_as_many_steps_are_taken_as_an_offset_leaves(
    emoji: PipelineModel,
    model_with: Callable[..., Callable[[], PipelineModel]],
    tmp_path: Path,
) -> None:
    few = {**BETAS, "num_train_timesteps": 8, "steps_offset": 1}
    model = model_with({"_class_name": "DDIMScheduler", **few})()
    assert most_steps(model.load_scheduler("ddim"), 20) == 7
    assert most_steps(emoji.load_scheduler("ddim"), 20) == 20
    made = qd.calibrate(
        str(tmp_path / "ldm"), workspace=tmp_path / "ws", samples=1, method="minmax"
    )
    assert made.scheme.buckets == 8


def test_a_workspace_of_other_training_steps_is_refused(
    model_with: Callable[..., Callable[[], PipelineModel]], tmp_path: Path
) -> None:
    model = model_with({"_class_name": "DDPMScheduler", **BETAS, "num_train_timesteps": 50})()
    made = Workspace.create(tmp_path / "old", model.source, Scheme.parse("w4a4"))
    with refused(50, 1000, "-w"):
        qd.calibrate(workspace=made, samples=1)


@pytest.mark.parametrize("size", [[0.5, -1.0, 0.25], None])
def test_a_decoders_own_mean_and_deviation_are_applied(
    pipelines: Callable[[str], Path], tmp_path: Path, size: list[float] | None
) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(pipelines("sd"), folder)
    path = folder / "vae" / "config.json"
    mean, deviation = ([0.5, -1.0, 0.25, 2.0], [2.0, 0.5, 1.0, 3.0]) if size else (None, None)
    changes = {"latents_mean": mean, "latents_std": deviation, "scaling_factor": 0.5}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    model = load_model(resolve_source(str(folder)))
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    expected = latents / np.float32(0.5)
    if mean is not None and deviation is not None:
        expected = expected * np.reshape(deviation, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))
    decoder = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    with torch.no_grad():
        images = decoder.decode(torch.from_numpy(expected.astype(np.float32))).sample
    np.testing.assert_allclose(model.images(latents), images.clamp(-1, 1).numpy(), atol=1e-5)


def test_calibration_samples_as_diffusers_would_without_clipping(
    model_with: Callable[..., Callable[[], PipelineModel]], tmp_path: Path
) -> None:
    model = model_with(saved("UniPCMultistepScheduler", tmp_path / "saved"))()
    unet = model.load_unet()
    recorded = record_trajectories(model, unet, steps=10, samples=2, seed=0)
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    last = len(recorded.timestep) - 1
    following = scheduler.step(
        recorded.output[0], scheduler.timesteps[0], recorded.sample[0]
    ).prev_sample
    torch.testing.assert_close(recorded.sample[1], following)
    assert float(recorded.sample[last].abs().max()) > 1
