"""Diffusers' schedulers under short names, and what a model's own configuration says of its noise.

A model is known here by betas over its training steps, or, of flow matching, by the shift of its
schedule. Another schedule in sigmas (EDM, variance exploding, consistency models) has neither, and
read as betas it would silently be another one: it is refused by its class.
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
OF_BETAS = frozenset(
    {
        *SCHEDULERS.values(),
        "DDIMInverseScheduler",
        "DDIMParallelScheduler",
        "DDPMParallelScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepInverseScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "SASolverScheduler",
        "TCDScheduler",
    }
)
"""The classes whose configurations describe a model by betas over its training steps."""
IN_SIGMAS = {"timestep_type": "continuous", "use_flow_sigmas": True, "use_dynamic_shifting": True}
"""Options by which a scheduler of these classes samples in sigmas all the same."""
NOISE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
"""What a configuration says of the model; the rest is about sampling."""
UNBOUNDED = ("lambda_min_clipped",)
"""Options that are infinite by default, which files of numbers cannot say."""
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
FLOW = "flow_prediction"
"""What a model of flow matching predicts, as diffusers calls it."""
FLOW_SCHEDULERS = {
    "ddim": "FlowMatchEulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Those that sample a model of flow matching; DDIM's step and Euler's are the same one there."""
OF_TOKENS = "of_tokens"
"""What a :func:`flow_schedule` calls the part of it that a pipeline tells its scheduler."""
DYNAMIC = "use_dynamic_shifting"
_SHIFTS = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
"""What a shift by a sample's tokens is computed of: numbers of tokens, and the logarithms of their
shifts; diffusers' defaults.
"""
MOST_SHIFT = 16.0
"""The largest logarithm of a shift."""
OTHER_SIGMAS = (
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)
"""Options by which a schedule of flow matching is more than its shift."""
_SOME = (20, 10, 4, 2, 1)
"""Numbers of steps of which a scheduler that takes any takes one."""


def noise_schedule(
    config: Mapping[str, Any], class_name: str | None, where: str, *, latent: bool
) -> dict[str, Any]:
    """A scheduler's configuration that means the same in every class of ``SCHEDULERS``.

    What the file leaves to its class's defaults is written out, since the classes' differ. A latent
    model's samples are not clipped unless the file says so: they go beyond [-1, 1], and some
    classes clip by default.

    Args:
        config: the content of scheduler_config.json.
        class_name: what the pipeline's index calls its class, if it does.
        where: what messages begin with.

    Raises:
        InputError: the schedule is in sigmas, of an unknown class, or its betas are not as many as
            the training steps.
    """
    import diffusers

    names = [name for name in (class_name, config.get("_class_name")) if name is not None]
    if unknown := [str(name) for name in names or ["no class"] if str(name) not in OF_BETAS]:
        raise InputError(
            f"{where}: {unknown[0]} is not supported: expected a noise schedule of betas over "
            f"training steps, of {', '.join(sorted(OF_BETAS))}; models in sigmas (EDM, flow "
            "matching, variance exploding, consistency) cannot be sampled with those"
        )
    in_sigmas = {**IN_SIGMAS, "prediction_type": FLOW}
    if wrong := [f"{key} {config[key]!r}" for key, x in in_sigmas.items() if config.get(key) == x]:
        raise InputError(f"{where}: {names[0]} with {wrong[0]} samples in sigmas: not supported")
    parameters = inspect.signature(getattr(diffusers, names[0]).__init__).parameters
    defaults = {name: parameters[name].default for name in NOISE if name in parameters}
    if missing := [key for key in NOISE[:4] if key not in {**defaults, **config}]:
        raise InputError(  # diffusers has the class only where a package of its own is installed
            f"{where}: {', '.join(missing)}: missing, and this installation of diffusers does not "
            f"know the defaults of {names[0]}"
        )
    betas, steps = (
        {**defaults, **config}.get(key) for key in ("trained_betas", "num_train_timesteps")
    )
    if isinstance(betas, list) and len(betas) != steps:
        raise InputError(
            f"{where}: trained_betas holds {len(betas)} numbers: expected as many as "
            f"num_train_timesteps, {steps}"
        )
    finite = {key: x for key, x in config.items() if key not in UNBOUNDED or x != -math.inf}
    return {**defaults, **({"clip_sample": False} if latent else {}), **finite}


def flow_schedule(
    config: Mapping[str, Any], class_name: str | None, where: str, tokens: int | None = None
) -> dict[str, Any]:
    """What the scheduler's configuration of a model of flow matching (arXiv 2210.02747) says, the
    same for every class of ``FLOW_SCHEDULERS``: num_train_timesteps, prediction_type and shift;
    and its _class_name.

    Args:
        config, class_name, where: as of :func:`noise_schedule`.
        tokens: of the model's own samples, where its pipeline tells the scheduler its sigmas; a
            shift may depend on them then, and what it is computed of is under ``OF_TOKENS``.

    Raises:
        InputError: it is of another class, or more than a shift.
    """
    names = [name for name in (class_name, config.get("_class_name")) if name is not None]
    known = set(FLOW_SCHEDULERS.values())
    euler = FLOW_SCHEDULERS["euler"]
    wrong = [str(name) for name in names or ["no class"] if str(name) not in known]
    if not wrong and names[-1] != euler and not config.get("use_flow_sigmas"):
        wrong = [f"{names[-1]} without use_flow_sigmas"]
    if wrong:
        raise InputError(
            f"{where}: {wrong[0]} is not supported: the model is one of flow matching, and needs "
            f"{euler}, or {' or '.join(sorted(known - {euler}))} with use_flow_sigmas"
        )
    dynamic = tokens is not None and bool(config.get(DYNAMIC))
    if others := [x for x in OTHER_SIGMAS if config.get(x) and not (x == DYNAMIC and dynamic)]:
        raise InputError(f"{where}: {others[0]} {config[others[0]]!r} is not supported")
    schedule = {
        "_class_name": names[-1],
        "num_train_timesteps": config.get("num_train_timesteps", 1000),
        "prediction_type": FLOW,
        "shift": float(config.get("shift" if names[-1] == euler else "flow_shift") or 1.0),
    }
    if tokens is None:
        return schedule
    sizes = {
        key: usual if config.get(key) is None else config[key] for key, usual in _SHIFTS.items()
    }
    if dynamic:
        schedule["shift"] = math.exp(_shift_of(tokens, sizes, config.get("time_shift_type"), where))
    return {**schedule, OF_TOKENS: {DYNAMIC: dynamic, **sizes}}


def _shift_of(tokens: int, sizes: Mapping[str, float], kind: str | None, where: str) -> float:
    """The logarithm of the shift for so many tokens: on the line through two."""
    if kind not in (None, "exponential"):
        raise InputError(
            f"{where}: time_shift_type {kind!r} is not supported; expected exponential"
        )
    fewest, most, low, high = sizes.values()
    if fewest == most:
        raise InputError(
            f"{where}: base_image_seq_len and max_image_seq_len are both {most}: expected two "
            "numbers of tokens, between which the shift changes"
        )
    found = low + (high - low) / (most - fewest) * (tokens - fewest)
    if abs(found) > MOST_SHIFT:
        raise InputError(
            f"{where}: base_shift {low:g} and max_shift {high:g} give {found:g} for {tokens} "
            f"tokens: expected at most {MOST_SHIFT:g}, above or below zero"
        )
    return found


def flow_sampler(schedule: Mapping[str, Any]) -> str:
    """The short name of the scheduler whose :func:`flow_schedule` it is."""
    return {kind: name for name, kind in FLOW_SCHEDULERS.items()}[schedule["_class_name"]]


def _flow_options(name: str, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    import diffusers

    if name not in FLOW_SCHEDULERS:
        raise InputError(
            f"--scheduler {name}: expected one of {', '.join(FLOW_SCHEDULERS)} for a model of flow "
            "matching"
        )
    kind: Any = getattr(diffusers, FLOW_SCHEDULERS[name])
    if OF_TOKENS in config:
        from quest_deploy.models.flow_schedulers import TOLD

        kind = TOLD[kind.__name__]
    shared = {
        "num_train_timesteps": config["num_train_timesteps"],
        **config.get(OF_TOKENS, {}),
    }
    if name in ("ddim", "euler"):
        return kind, {"shift": config["shift"], **shared}
    sigmas = {"use_flow_sigmas": True, "flow_shift": config["shift"]}
    return kind, {"prediction_type": FLOW, **sigmas, **shared}


def first_scale(scheduler: Any) -> Any:
    """What the noise is multiplied by that sampling begins with."""
    return getattr(scheduler, "init_noise_sigma", 1.0)


def scaled_input(scheduler: Any, sample: Any, timestep: Any) -> Any:
    """``sample`` as the network is given it at ``timestep``."""
    if not hasattr(scheduler, "scale_model_input"):  # flow matching's own
        return sample
    return scheduler.scale_model_input(sample, timestep)


def make_scheduler(name: str, config: dict[str, Any]) -> Any:
    """A new diffusers scheduler of the short ``name`` with the model's noise schedule; raise
    InputError for an unknown name, or one that does not know the model's kind of schedule.
    """
    kind, options = scheduler_options(name, config)
    try:
        return kind.from_config(options)
    except Exception as e:  # diffusers raises whatever a configuration provokes
        raise InputError(
            f"scheduler_config.json cannot configure {SCHEDULERS[name]} ({e}); "
            + _advice(kind, options, lambda _: True)
        ) from e


def scheduler_options(name: str, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class of :func:`make_scheduler`, and what it is configured with; raise InputError
    likewise.
    """
    import diffusers

    if name not in SCHEDULERS:
        raise InputError(f"unknown scheduler {name!r}: expected one of {', '.join(SCHEDULERS)}")
    if config.get("prediction_type") == FLOW:
        return _flow_options(name, config)
    kind = getattr(diffusers, SCHEDULERS[name])
    zero_snr = "rescale_betas_zero_snr"
    if config.get(zero_snr) and zero_snr not in inspect.signature(kind.__init__).parameters:
        raise InputError(
            f"--scheduler {name}: {SCHEDULERS[name]} knows no {zero_snr}, which the model has; "
            "choose another one"
        )
    if name != "ddpm":  # the others get the mean alone; DPM++ would cut it down to three channels
        config = {key: value for key, value in config.items() if key != "variance_type"}
    return kind, config


def set_steps(scheduler: Any, steps: int) -> None:
    """Choose ``steps`` timesteps.

    Raises:
        InputError: the scheduler cannot run through them, or they leave the range the model was
            trained on, as an offset can make them; the message says which numbers would work.
    """
    if (problem := _problem(scheduler, steps)) is not None:
        some = next((n for n in _SOME if _problem(scheduler, n) is None), None)
        raise InputError(
            f"{type(scheduler).__name__} cannot take {steps} steps: {problem}; "
            + (_numbers(scheduler, some) if some else _advice_on_steps(scheduler))
        )
    scheduler.set_timesteps(steps)
    if scheduler.config.get("use_flow_sigmas"):
        # It would look for the first timestep by its value, which a shift may give the second too.
        scheduler.set_begin_index(0)


def most_steps(scheduler: Any, most: int) -> int:
    """The largest number of steps up to ``most`` that a scheduler takes; ``most`` where it takes
    none, which :func:`set_steps` then refuses.
    """
    return next((n for n in range(most, 0, -1) if _problem(scheduler, n) is None), most)


def _advice_on_steps(scheduler: Any) -> str:
    """Return what to do about a scheduler that takes no number of steps."""
    return _advice(
        type(scheduler),
        scheduler.config,
        lambda tried: any(_problem(tried, steps) is None for steps in _SOME),
    )


def _advice(kind: Any, config: Mapping[str, Any], works: Callable[[Any], bool]) -> str:
    """Return what to do about a configuration that does not work: which settings it would work
    without, each alone.
    """

    def works_without(key: str) -> bool:
        try:
            return works(kind.from_config({name: x for name, x in config.items() if name != key}))
        except Exception:  # diffusers raises whatever a configuration provokes
            return False

    settings = [key for key in config if not key.startswith("_") and works_without(key)]
    named = " or ".join(f"{key} ({str(config[key])[:40]})" for key in settings) or "it"
    return (
        f"change {named} in scheduler_config.json, or choose another --scheduler where the command "
        "takes one"
    )


def _numbers(scheduler: Any, some: int) -> str:
    """Return which numbers of steps work, ``some`` among them."""
    trained = scheduler.config.num_train_timesteps
    fewest = 1 + bisect_left(range(1, some), True, key=lambda n: _problem(scheduler, n) is None)
    most = some + bisect_left(
        range(some + 1, trained + 1), True, key=lambda n: _problem(scheduler, n) is not None
    )
    return f"it takes {fewest} to {most}"


def _problem(scheduler: Any, steps: int) -> str | None:
    """Return why a scheduler like this one cannot take ``steps`` steps; it is run through them,
    since some fail only on the way.
    """
    import diffusers
    import torch

    from quest_deploy.models.channels import uses_variance

    trained = scheduler.config.num_train_timesteps
    if not 1 <= steps <= trained:
        return f"the model was trained with {trained}"
    tried = type(scheduler).from_config(scheduler.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sample, prediction = torch.randn(2, 1, 1, 2, 2)
        if uses_variance(tried):
            # "learned" is a variance itself, and none is negative.
            prediction = torch.cat([prediction, prediction.abs()], 1)
        try:
            tried.set_timesteps(steps)
            highest = float(tried.timesteps.max())
            # Flow matching begins at the last timestep itself, pure noise.
            euler = getattr(diffusers, FLOW_SCHEDULERS["euler"])
            begins = trained + isinstance(tried, euler)
            if highest >= begins:
                return (
                    f"they begin at timestep {highest:g}, and the model knows those below {trained}"
                )
            if steps > 1 and len(tried.timesteps.unique()) == 1:
                return f"all of them are at timestep {highest:g}"
            for timestep in tried.timesteps:
                scaled_input(tried, sample, timestep)
                sample = tried.step(prediction, timestep, sample).prev_sample
                if not sample.isfinite().all():
                    zero = (
                        tried.config.get("rescale_betas_zero_snr") or not tried.alphas_cumprod[-1]
                    )
                    return (
                        f"its sample after timestep {timestep:g} is not finite with "
                        f"{tried.config.prediction_type} predictions"
                        + " (at zero terminal SNR only v_prediction can be sampled)"
                        * bool(zero)
                    )
        except Exception as e:  # diffusers raises whatever a configuration provokes
            return (str(e).strip().splitlines() or [type(e).__name__])[0]
    return None
