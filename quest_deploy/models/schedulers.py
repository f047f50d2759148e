"""Diffusers' schedulers under short names."""

from __future__ import annotations

from typing import Any

from quest_deploy.errors import InputError

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def make_scheduler(name: str, config: dict[str, Any]) -> Any:
    """A new diffusers scheduler of the short ``name`` with the model's noise schedule; raise
    InputError for an unknown name.
    """
    import diffusers

    if name not in SCHEDULERS:
        raise InputError(f"unknown scheduler {name!r}: expected one of {', '.join(SCHEDULERS)}")
    if name != "ddpm":  # the others get the mean alone; DPM++ would cut it down to three channels
        config = {key: value for key, value in config.items() if key != "variance_type"}
    try:
        return getattr(diffusers, SCHEDULERS[name]).from_config(config)
    except Exception as e:  # diffusers raises whatever a configuration provokes
        raise InputError(
            f"scheduler_config.json cannot configure {SCHEDULERS[name]} ({e}); choose another "
            "--scheduler"
        ) from e


def set_steps(scheduler: Any, steps: int) -> None:
    """Choose ``steps`` timesteps; raise InputError where they leave the range the model was trained
    on, as an offset can make them.
    """
    try:
        scheduler.set_timesteps(steps)
    except Exception as e:  # diffusers raises whatever a configuration provokes
        raise InputError(f"{type(scheduler).__name__} cannot take {steps} steps ({e})") from e
    highest, trained = float(scheduler.timesteps.max()), scheduler.config.num_train_timesteps
    if highest >= trained:
        raise InputError(
            f"{steps} steps begin at timestep {highest:g}, and the model knows those below "
            f"{trained}; take fewer steps"
        )
