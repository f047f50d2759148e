"""Schedulers as tables: which they are, what they say, and what is refused.
tests/trt_plugins/test_cpp_runtime.py runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from quest_deploy.files import read_json
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.schedulers import SCHEDULERS, make_scheduler
from quest_deploy.serving.schedule import MAX_HISTORY, run_schedule, schedule_from_scheduler
from tests.helpers import assert_holds, refused
from tests.quest_deploy.support import Chain, cli

CONFIG = {"beta_schedule": "scaled_linear", "clip_sample": False, "skip_prk_steps": True}


def made(kind: str, steps: int = 6, **options: Any) -> Callable[[], Any]:
    """Makes a scheduler of diffusers."""

    def make() -> Any:
        scheduler = getattr(diffusers, kind)(**options)
        scheduler.set_timesteps(steps)
        return scheduler

    return make


def test_eulers_table_is_eulers_method() -> None:
    make = made("EulerDiscreteScheduler")
    schedule, sigmas = schedule_from_scheduler(make), make().sigmas.double()
    assert schedule.init_noise_sigma == pytest.approx(float(make().init_noise_sigma))
    for i, step in enumerate(schedule.steps):
        assert step.timestep == float(make().timesteps[i])
        assert step.input_scale == pytest.approx(float((sigmas[i] ** 2 + 1) ** -0.5), rel=1e-6)
        assert step.sample_scales == pytest.approx((1.0,))
        assert step.prediction_scales == pytest.approx(
            (float(sigmas[i + 1] - sigmas[i]),), rel=1e-5
        )
        assert step.noise_scale == 0


def test_ddims_table_is_its_published_step() -> None:
    make = made("DDIMScheduler", clip_sample=False)
    scheduler = make()
    alphas = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps] + [
        float(scheduler.final_alpha_cumprod)
    ]
    for step, now, then in zip(
        schedule_from_scheduler(make).steps, alphas, alphas[1:], strict=False
    ):
        scale = (then / now) ** 0.5
        assert step.sample_scales == pytest.approx((scale,), rel=1e-5)
        assert step.prediction_scales == pytest.approx(
            ((1 - then) ** 0.5 - scale * (1 - now) ** 0.5,), rel=1e-4, abs=1e-6
        )


def test_multistep_schedulers_read_earlier_predictions_and_ancestral_ones_add_noise() -> None:
    lengths = {
        kind: max(len(step.prediction_scales) for step in schedule_from_scheduler(made(kind)).steps)
        for kind in (
            "EulerDiscreteScheduler",
            "DPMSolverMultistepScheduler",
            "UniPCMultistepScheduler",
            "LMSDiscreteScheduler",
        )
    }
    assert lengths["EulerDiscreteScheduler"] == 1
    assert all(
        1 < length <= MAX_HISTORY
        for kind, length in lengths.items()
        if kind != "EulerDiscreteScheduler"
    )
    ancestral = schedule_from_scheduler(made("EulerAncestralDiscreteScheduler")).steps
    assert all(step.noise_scale > 0 for step in ancestral[:-1])
    assert ancestral[-1].noise_scale == 0


@pytest.mark.parametrize(
    "kind",
    [
        *SCHEDULERS.values(),
        "HeunDiscreteScheduler",
        "DEISMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_table_gives_the_schedulers_samples_whatever_the_model_predicts(
    kind: str, prediction: str
) -> None:
    known = getattr(diffusers, kind)().config
    make = made(
        kind,
        **{
            name: value
            for name, value in {**CONFIG, "prediction_type": prediction}.items()
            if name in known
        },
    )
    schedule = schedule_from_scheduler(make)
    scheduler, generator = make(), torch.Generator().manual_seed(7)
    samples = [torch.randn(3, 5, generator=generator, dtype=torch.float64)]
    predictions, noise = [], []
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(samples[-1], timestep)
        predictions.append(torch.randn(3, 5, generator=generator, dtype=torch.float64))
        before = torch.Generator()
        before.set_state(generator.get_state())
        extra = {"generator": generator} if any(step.noise_scale for step in schedule.steps) else {}
        samples.append(scheduler.step(predictions[-1], timestep, samples[-1], **extra).prev_sample)
        noise.append(torch.randn(3, 5, generator=before, dtype=torch.float64))
    found = run_schedule(schedule, samples[0], predictions, noise)
    for ours, theirs in zip(found, samples, strict=True):
        assert float((ours - theirs).abs().max()) <= 2e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("algorithm", ["sde-dpmsolver++", "sde-dpmsolver"])
def test_a_table_has_the_noise_of_a_scheduler_that_draws_it_in_a_dtype_of_its_own(
    algorithm: str,
) -> None:
    make = made(
        "DPMSolverMultistepScheduler",
        algorithm_type=algorithm,
        final_sigmas_type="sigma_min",
        beta_schedule="scaled_linear",
    )
    schedule, scheduler = schedule_from_scheduler(make), make()
    assert any(step.noise_scale for step in schedule.steps)
    generator = torch.Generator().manual_seed(7)
    samples = [torch.randn(3, 5, generator=generator)]
    predictions, noise = (
        [torch.randn(3, 5, generator=generator) for _ in scheduler.timesteps] for _ in range(2)
    )
    for timestep, prediction, fresh in zip(scheduler.timesteps, predictions, noise, strict=True):
        following = scheduler.step(prediction, timestep, samples[-1], variance_noise=fresh)
        samples.append(following.prev_sample)
    for ours, theirs in zip(
        run_schedule(schedule, samples[0], predictions, noise), samples, strict=True
    ):
        assert float((ours - theirs).abs().max()) <= 2e-5 * float(theirs.abs().max())


@pytest.mark.parametrize(
    ("make", "facts"),
    [
        (made("DDIMScheduler", clip_sample=True), "DDIMScheduler clip_sample"),
        (
            made("DDPMScheduler", clip_sample=False, thresholding=True),
            "DDPMScheduler thresholding",
        ),
    ],
)
def test_what_no_table_holds_is_refused(make: Callable[[], Any], facts: str) -> None:
    with refused(*facts.split()):
        schedule_from_scheduler(make)


@pytest.mark.parametrize("name", ["dpm++", "euler", "unipc"])
def test_options_that_a_scheduler_does_not_know_refuse_no_table(name: str) -> None:
    config = dict(diffusers.DDPMScheduler(clip_sample=True).config)

    def make() -> Any:
        scheduler = make_scheduler(name, config)
        scheduler.set_timesteps(4)
        return scheduler

    assert make().config["clip_sample"]
    assert len(schedule_from_scheduler(make).steps) == 4


def test_a_scheduler_that_is_not_linear_is_found_out() -> None:
    class Squared(diffusers.EulerDiscreteScheduler):
        def step(self, model_output: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            return super().step(model_output * model_output, *arguments, **options)

    def make() -> Any:
        scheduler = Squared()
        scheduler.set_timesteps(4)
        return scheduler

    with refused("Squared"):
        schedule_from_scheduler(make)


def test_the_command_writes_the_models_table_into_the_workspace_or_where_it_is_told(
    mini_chain: Chain, emoji: PipelineModel, tmp_path: Path
) -> None:
    report = mini_chain.outcomes["schedule"].json
    assert (report["scheduler"], report["steps"], report["noise"]) == (
        "UniPCMultistepScheduler",
        6,
        False,
    )
    assert report["schedule"] == str(mini_chain.root / "schedules" / "unipc-6.json")
    content = read_json(mini_chain.root / "schedules" / "unipc-6.json")
    model = emoji.load_scheduler("unipc")
    model.set_timesteps(6)
    assert [step["timestep"] for step in content["steps"]] == model.timesteps.tolist()
    ended = cli(
        *("schedule", "-w", mini_chain.root, "--scheduler", "lcm", "--steps", "4"),
        *("-o", tmp_path / "new" / "lcm.json"),
    )
    assert ended.code == 0
    assert_holds(ended.out, 4, "LCMScheduler", "noise")
    assert len(read_json(tmp_path / "new" / "lcm.json")["steps"]) == 4


@pytest.mark.parametrize(
    ("options", "fact"),
    [(["--scheduler", "heun"], "'heun'"), (["--steps", "0"], "--steps")],
)
def test_a_schedule_that_cannot_be_is_refused(
    mini_chain: Chain, options: list[str], fact: str
) -> None:
    ended = cli("schedule", "-w", mini_chain.root, *options)
    assert (ended.code, fact in ended.err) == (2, True)
