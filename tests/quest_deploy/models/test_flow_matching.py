"""Models of flow matching: their schedule in every scheduler that samples them, and its buckets."""

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

from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.calibration.trajectories import record_trajectories
from quest_deploy.evaluation.sampling import float_denoiser, sample_images
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.schedulers import FLOW_SCHEDULERS, OTHER_SIGMAS, SCHEDULERS, set_steps
from quest_deploy.serving.pipeline import stand_in
from quest_deploy.serving.schedule import run_schedule, schedule_from_scheduler
from quest_deploy.stages.workspaces import SchemeChoices
from tests.helpers import refused
from tests.pipelines import pixart_of_flow
from tests.quest_deploy.support import cli

SHIFT = 3.0


@pytest.fixture
def model(pipelines: Callable[[str], Path]) -> PipelineModel:
    return load_model(resolve_source(str(pipelines("sd3"))))


@pytest.fixture
def scheduled(pipelines: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of the small pipeline with another scheduler's configuration."""

    def copied(name: str, **config: Any) -> Path:
        folder = shutil.copytree(pipelines("sd3"), tmp_path / "m", dirs_exist_ok=True)
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({"_class_name": name, **config}))
        index = folder / "model_index.json"
        parts = {**json.loads(index.read_text()), "scheduler": ["diffusers", name]}
        index.write_text(json.dumps(parts))
        return folder

    return copied


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_eulers_steps_are_those_of_the_models_own_scheduler(
    model: PipelineModel, name: str
) -> None:
    ours = model.load_scheduler(name)
    set_steps(ours, 28)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    theirs.set_timesteps(28)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert ours.timesteps[0] == 1000


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_other_schedulers_sample_the_same_flow(model: PipelineModel, name: str) -> None:
    scheduler = model.load_scheduler(name)
    config = scheduler.config
    assert (config.use_flow_sigmas, config.flow_shift) == (True, SHIFT)
    assert config.prediction_type == "flow_prediction"
    set_steps(scheduler, 8)
    # The flow of one data point x: from noise n its velocity is n - x everywhere.
    noise, data = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    sample = noise[None]
    for timestep in scheduler.timesteps:
        sample = scheduler.step((noise - data)[None], timestep, sample).prev_sample
    torch.testing.assert_close(sample[0], data, atol=0.05, rtol=0)


def test_schedulers_that_do_not_know_flow_matching_are_refused(model: PipelineModel) -> None:
    for name in SCHEDULERS.keys() - FLOW_SCHEDULERS.keys():
        with refused(f"--scheduler {name}", *FLOW_SCHEDULERS):
            model.load_scheduler(name)


@pytest.mark.parametrize(
    ("name", "config", "facts"),
    [
        ("DDIMScheduler", {}, "DDIMScheduler FlowMatchEulerDiscreteScheduler"),
        ("DPMSolverMultistepScheduler", {}, "DPMSolverMultistepScheduler use_flow_sigmas"),
        *(("FlowMatchEulerDiscreteScheduler", {key: 1}, f"{key} 1") for key in OTHER_SIGMAS),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 0}, "shift"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": "three"}, "shift"),
    ],
)
def test_a_schedule_that_is_more_than_a_shift_is_refused(
    scheduled: Callable[..., Path], name: str, config: dict[str, Any], facts: str
) -> None:
    with refused(*facts.split()):
        load_model(resolve_source(str(scheduled(name, **config))))


def test_a_shift_is_read_from_either_class(scheduled: Callable[..., Path]) -> None:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.5}
    for name, config in (
        ("FlowMatchEulerDiscreteScheduler", {"shift": 2.5}),
        ("DPMSolverMultistepScheduler", flow),
    ):
        model = load_model(resolve_source(str(scheduled(name, **config))))
        assert model.load_scheduler("euler").config.shift == 2.5
        assert model.load_scheduler("unipc").config.flow_shift == 2.5


def test_a_prediction_type_is_refused(pipelines: Callable[[str], Path]) -> None:
    source = resolve_source(str(pipelines("sd3")), prediction_type="epsilon")
    with refused("--prediction-type"):
        load_model(source)


@pytest.fixture
def flowing_pixart(tmp_path: Path) -> PipelineModel:
    return load_model(resolve_source(str(pixart_of_flow(tmp_path / "pixart", SHIFT))))


def test_a_pixart_is_of_flow_matching_where_its_scheduler_says_so(
    flowing_pixart: PipelineModel, pipelines: Callable[[str], Path]
) -> None:
    plain = load_model(resolve_source(str(pipelines("pixart"))))
    assert (plain.bucket_steps, plain.scheduler_config()["prediction_type"]) == (None, "epsilon")
    assert (flowing_pixart.bucket_steps, flowing_pixart.calibration_scheduler) == (20, "dpm++")
    assert flowing_pixart.load_scheduler("euler").config.shift == SHIFT
    edges = SchemeChoices(buckets=4).edges(flowing_pixart)
    assert edges is not None
    assert edges[-1] > 750  # the shift puts most steps near the noise


@torch.no_grad()
@pytest.mark.parametrize("of_pixart", [False, True])
def test_our_loop_draws_what_diffusers_pipeline_draws(
    request: pytest.FixtureRequest, *, of_pixart: bool
) -> None:
    model = request.getfixturevalue("flowing_pixart" if of_pixart else "model")
    network = model.load_unet()
    engine: Any = float_denoiser(network)
    pipeline = model.load_pipeline(transformer=stand_in(engine, model.config))
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        [model.prompts[0], model.prompts[2]],
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **({"use_resolution_binning": False} if of_pixart else {}),
    ).images
    own = model.calibration_scheduler
    ours = sample_images(
        model, engine, np.asarray([0, 2]), scheduler=own, steps=3, guidance=4.0, seed=0
    )
    np.testing.assert_allclose(ours, 2 * drawn.transpose(0, 3, 1, 2) - 1, atol=2e-4)


def test_buckets_hold_equally_many_of_the_models_own_steps(
    model: PipelineModel, pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    assert (model.bucket_steps, model.calibration_steps) == (28, 28)
    given = ("--model", pipelines("sd3"), "--samples", "1", "--method", "minmax")
    ended = cli("calibrate", "-w", tmp_path / "ws", *given, "--buckets", "7")
    assert ended.code == 0, ended.err
    scheme = Workspace.open(tmp_path / "ws").scheme
    scheduler = model.load_scheduler("ddim")
    set_steps(scheduler, 28)
    held = [scheme.bucket_of(t) for t in scheduler.timesteps.tolist()]
    assert [held.count(bucket) for bucket in range(7)] == [4] * 7
    widths = np.diff([0, *scheme.bucket_edges, 1000])
    assert widths[-1] < 1000 / 7 < widths[0]  # the shift puts most steps near the noise


@pytest.mark.parametrize(("name", "steps", "held"), [("sd3", 28, {1, 2}), ("sana", 20, {1})])
def test_by_default_the_steps_of_the_models_own_scheduler_are_spread_over_all_buckets_and_recorded(
    pipelines: Callable[[str], Path], name: str, steps: int, held: set[int]
) -> None:
    model = load_model(resolve_source(str(pipelines(name))))
    edges = SchemeChoices().edges(model)
    assert edges is not None
    scheme = Scheme.parse("w4a4", edges=edges)
    own = getattr(diffusers, model.index["scheduler"][1])
    scheduler = own.from_pretrained(model.folder / "scheduler")
    scheduler.set_timesteps(steps)
    buckets = [scheme.bucket_of(t) for t in scheduler.timesteps.tolist()]
    assert {buckets.count(bucket) for bucket in range(20)} == held
    options = {"steps": 2, "samples": 1, "seed": 0, "guidance": 1.0}
    recorded = record_trajectories(model, model.load_unet(), scheme=scheme, **options)
    assert torch.equal(recorded.timestep, scheduler.timesteps.float())


def test_calibration_follows_the_flow(model: PipelineModel) -> None:
    network = model.load_unet()
    recorded = record_trajectories(model, network, steps=4, samples=1, seed=0, guidance=1.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(4)
    assert torch.equal(recorded.timestep, scheduler.timesteps)
    sigmas = scheduler.sigmas
    for i in range(3):
        expected = recorded.sample[i] + (sigmas[i + 1] - sigmas[i]) * recorded.output[i]
        torch.testing.assert_close(recorded.sample[i + 1], expected)


def test_more_buckets_than_the_models_own_steps_are_those_of_more_steps(
    model: PipelineModel,
) -> None:
    edges = SchemeChoices(buckets=40).edges(model)
    scheme = Scheme.parse("w4a4", buckets=40, edges=edges)
    scheduler = model.load_scheduler("ddim")
    set_steps(scheduler, 40)
    assert sorted(scheme.bucket_of(t) for t in scheduler.timesteps.tolist()) == list(range(40))


def test_calibration_takes_as_many_steps_as_visit_every_bucket_and_no_more(
    model: PipelineModel,
) -> None:
    network, edges = model.load_unet(), SchemeChoices(buckets=20).edges(model)
    scheme = Scheme.parse("w4a4", buckets=20, edges=edges)
    recorded = record_trajectories(
        model, network, steps=10, samples=1, seed=0, guidance=1.0, scheme=scheme
    )
    assert len(recorded.timestep) == 28
    held = {scheme.bucket_of(t) for t in recorded.timestep.tolist()}
    assert held == set(range(20))


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_a_table_for_cpp_holds_the_flow(model: PipelineModel, name: str) -> None:
    def make() -> Any:
        scheduler = model.load_scheduler(name)
        set_steps(scheduler, 5)
        return scheduler

    schedule, scheduler = schedule_from_scheduler(make), make()
    assert schedule.init_noise_sigma == 1
    generator = torch.Generator().manual_seed(0)
    sample, *predictions = torch.randn(6, 1, 3, generator=generator).unbind()
    found = run_schedule(schedule, sample, predictions, [torch.zeros_like(sample)] * 5)
    for prediction, timestep, following in zip(
        predictions, scheduler.timesteps, found[1:], strict=True
    ):
        sample = scheduler.step(prediction, timestep, sample).prev_sample
        torch.testing.assert_close(following.float(), sample, atol=1e-5, rtol=1e-5)
