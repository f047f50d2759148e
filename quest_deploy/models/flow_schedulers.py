"""Schedulers of flow matching for models whose pipeline tells them their sigmas and, by the size of
the sample, the logarithm ``mu`` of their shift, as FLUX's does.

Where nobody tells them, as in our own loops, their sigmas are the ones that such a pipeline gives,
and the shift is that of their configuration: of the model's own size. They are called as diffusers
calls them, in configurations and messages.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from diffusers.schedulers import scheduling_dpmsolver_multistep as dpm
from diffusers.schedulers import scheduling_flow_match_euler_discrete as euler
from diffusers.schedulers import scheduling_unipc_multistep as unipc


class FlowMatchEulerDiscreteScheduler(euler.FlowMatchEulerDiscreteScheduler):
    """Euler's steps from 1 to 1/n, shifted."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """As diffusers'."""
        if sigmas is None and timesteps is None and num_inference_steps is not None:
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        own = math.log(self.config["shift"])
        super().set_timesteps(
            num_inference_steps, device, sigmas, own if mu is None else mu, timesteps
        )


EULER = FlowMatchEulerDiscreteScheduler.__name__
"""Whose configuration says what a shift is computed of; the others keep it for the pipeline."""


class UniPCMultistepScheduler(unipc.UniPCMultistepScheduler):
    """UniPC's steps, which have sigmas of their own, shifted."""

    _compatibles = [*unipc.UniPCMultistepScheduler._compatibles, EULER]  # noqa: RUF012 - diffusers'

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: Any = None,
    ) -> None:
        """As diffusers'."""
        own: Any = math.log(self.config["flow_shift"])
        super().set_timesteps(num_inference_steps, device, sigmas, own if mu is None else mu)


class DPMSolverMultistepScheduler(dpm.DPMSolverMultistepScheduler):
    """DPM-Solver++'s steps, likewise."""

    _compatibles = [*dpm.DPMSolverMultistepScheduler._compatibles, EULER]  # noqa: RUF012

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """As diffusers', which takes no ``mu`` where the shift is always the same one."""
        shifts = self.config["use_dynamic_shifting"]
        super().set_timesteps(num_inference_steps, device, mu if shifts else None, timesteps)


TOLD = {
    kind.__name__: kind
    for kind in (
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
        DPMSolverMultistepScheduler,
    )
}
"""By the names of diffusers' classes."""
