"""A diffusers scheduler as a table of numbers, for programs without Python: trt_plugins/runtime
reads it.

Most schedulers are linear in the samples and in the model's predictions, so that each step is

    next sample = sample_scales[0] * sample + sample_scales[1] * the one before + ...
                + prediction_scales[0] * prediction + prediction_scales[1] * the one before + ... +
                noise_scale * noise

whatever the scheduler is called: DDIM, Euler, PNDM, DPM-Solver++, UniPC, DDPM, LCM. The numbers are
found by running the scheduler itself, in float64, on samples and predictions that are unit vectors,
and then tried on random ones against it.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from quest_deploy.errors import InputError
from quest_deploy.files import sealed, write_json
from quest_deploy.models.channels import uses_variance

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

FORMAT = "quest-deploy schedule"
VERSION = 2
MAX_HISTORY = 8
"""How many samples and how many predictions a step may read; the C++ runtime's
Schedule::kMaxHistory.
"""
TOLERANCE = 1e-5
"""By how much the table may differ from the scheduler on random numbers, relative to the sample's
largest value.
"""
_NEGLIGIBLE = 1e-6
"""Schedulers compute in float32: what is smaller, relative to the largest share, is rounding."""


@dataclass(frozen=True)
class ScheduleStep:
    """One call of the model, on ``input_scale * sample`` at ``timestep``, and the step that
    follows; see the module's docstring.

    ``sample_scales`` and ``prediction_scales``: the newest one's first.
    """

    timestep: float
    input_scale: float
    sample_scales: tuple[float, ...]
    prediction_scales: tuple[float, ...]
    noise_scale: float


@dataclass(frozen=True)
class Schedule:
    """The steps, what the first sample's noise is multiplied by, and the scheduler's class."""

    scheduler: str
    init_noise_sigma: float
    steps: tuple[ScheduleStep, ...]

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        write_json(path, sealed({"format": FORMAT, "version": VERSION, **asdict(self)}))


def schedule_from_scheduler(make: Callable[[], Any]) -> Schedule:
    """The table of a diffusers scheduler.

    Args:
        make: returns the scheduler, its timesteps set; called several times, since a scheduler
            remembers what it did.

    Raises:
        InputError: it is not linear (it clips or thresholds samples), or a step reads more than the
            last eight samples or predictions.
    """
    scheduler = make()
    name = type(scheduler).__name__
    known = inspect.signature(type(scheduler).__init__).parameters
    for option in ("clip_sample", "thresholding"):  # others' options may lie in a configuration
        if option in known and scheduler.config.get(option):
            raise InputError(
                f"{name} with {option} is not linear, so that no table holds it; set {option} to "
                "False in its configuration"
            )
    if uses_variance(scheduler):
        raise InputError(
            f"{name} takes the variance that the UNet predicts, which no table holds; choose "
            "another --scheduler"
        )
    count = len(scheduler.timesteps)
    units = list(torch.eye(2 * count + 1, dtype=torch.float64).unsqueeze(1))
    run = _run(make(), units[: count + 1], units[count + 1 :])
    # Row i: the sample before step i, as its share of the first sample, of each prediction and of
    # each step's noise.
    shares = [sample[0].double() for sample in run.samples]
    steps = []
    for i, timestep in enumerate(scheduler.timesteps):
        wanted = shares[i + 1].clone()
        fresh, wanted[count + 1 + i] = float(wanted[count + 1 + i]), 0
        steps.append(
            ScheduleStep(
                float(timestep),
                run.input_scales[i],
                *_linear_step(name, [*shares[: i + 1], wanted]),
                fresh if abs(fresh) > _NEGLIGIBLE * float(shares[i].abs().max()) else 0.0,
            )
        )
    schedule = Schedule(name, float(getattr(scheduler, "init_noise_sigma", 1.0)), tuple(steps))
    _try(schedule, make)
    return schedule


def run_schedule(
    schedule: Schedule, sample: Tensor, predictions: list[Tensor], noise: list[Tensor]
) -> list[Tensor]:
    """The samples before and after each step of the table, whatever shape they have: what the C++
    runtime computes.
    """
    samples = [sample]
    for i, step in enumerate(schedule.steps):
        following = step.noise_scale * noise[i]
        for history, scales in (
            (samples, step.sample_scales),
            (predictions, step.prediction_scales),
        ):
            following = following + sum(
                scale * history[i - back] for back, scale in enumerate(scales)
            )
        samples.append(following)
    return samples


@dataclass(frozen=True)
class _Run:
    """The samples before and after each step, the scale of each step's input, and the noise that it
    drew, if any.
    """

    samples: list[Tensor]
    input_scales: list[float]
    noise: list[Tensor | None]


class _Drawn(TorchFunctionMode):
    """Keeps the noise that a scheduler draws, in whichever dtype it does; ``instead`` is drawn
    where it is not None.
    """

    def __init__(self, instead: Tensor | None) -> None:
        super().__init__()
        self.instead = instead
        self.noise: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.randn:
            made = self.noise = made if self.instead is None else self.instead.to(made.dtype)
        return made


def _run(scheduler: Any, values: list[Tensor], noise: list[Tensor] | None = None) -> _Run:
    """Run a scheduler from the first sample and the predictions in ``values``, with each step's
    ``noise``, or always with the same.
    """
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    generator = torch.Generator().manual_seed(0)
    extra = {"generator": generator} if takes_generator else {}
    run = _Run([values[0]], [], [])
    for i, timestep in enumerate(scheduler.timesteps):
        one = torch.ones(1, dtype=torch.float64)
        run.input_scales.append(
            float(scheduler.scale_model_input(one, timestep))
            if hasattr(scheduler, "scale_model_input")
            else 1.0
        )
        with _Drawn(None if noise is None else noise[i]) as drawn:
            following = scheduler.step(values[i + 1], timestep, run.samples[-1], **extra)
        run.samples.append(following.prev_sample)
        run.noise.append(drawn.noise)
    return run


def _linear_step(name: str, rows: list[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The fewest scales of samples and of predictions that make the last of ``rows`` of those
    before.

    Each row holds a sample's shares of the first sample, of each prediction and of the noise.
    """
    *earlier, wanted = rows
    units = torch.eye(len(wanted), dtype=wanted.dtype)
    longest = min(MAX_HISTORY, len(earlier))
    lengths = sorted(
        ((p, q) for p in range(1, longest + 1) for q in range(1, longest + 1)),
        key=lambda pair: (sum(pair), pair),
    )
    for samples, predictions in lengths:
        read = [
            *earlier[::-1][:samples],
            *(units[len(earlier) - back] for back in range(predictions)),
        ]
        columns = torch.stack(read, dim=1)
        scales = torch.linalg.lstsq(
            columns, wanted.unsqueeze(1), rcond=_NEGLIGIBLE, driver="gelsd"
        ).solution[:, 0]
        if float((columns @ scales - wanted).abs().max()) <= _NEGLIGIBLE * float(
            columns.abs().max()
        ):
            found = [float(scale) for scale in scales]
            return tuple(found[:samples]), tuple(found[samples:])
    raise InputError(
        f"{name} is not linear, or a step reads more than {MAX_HISTORY} samples or predictions: no "
        "table holds it"
    )


def _try(schedule: Schedule, make: Callable[[], Any]) -> None:
    """Raise InputError where the table gives other samples than the scheduler."""
    generator = torch.Generator().manual_seed(1)
    values = [
        torch.randn(1, 64, generator=generator, dtype=torch.float64)
        for _ in range(len(schedule.steps) + 1)
    ]
    expected = _run(make(), values)
    noise = [torch.zeros_like(values[0]) if drawn is None else drawn for drawn in expected.noise]
    found = run_schedule(schedule, values[0], values[1:], noise)
    error = max(
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(found, expected.samples, strict=True)
    )
    if not error <= TOLERANCE:
        raise InputError(
            f"{schedule.scheduler} is not linear: a table's samples differ from its own by "
            f"{error:.1e} of their largest value"
        )
