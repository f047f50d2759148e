"""Calibration data without data: the float model's own sampling trajectories.

Q-Diffusion's timestep-aware calibration (arXiv 2302.04304): what the model sees while it samples,
at every step, with the conditions it is used with. Targets for finetuning come along: they are the
model's own outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from quest_deploy.artifacts.tensors import read_tensors
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import atomic_file
from quest_deploy.models.channels import IMAGE_CONDITION, for_scheduler, guidance_of, joined
from quest_deploy.models.schedulers import set_steps
from quest_deploy.progress import no_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import nn

    from quest_deploy.artifacts.scheme import Scheme
    from quest_deploy.models.registry import DiffusionModel
    from quest_deploy.progress import Progress


FEWEST_SAMPLES = 16
TRAILING = {"timestep_spacing": "trailing"}


@dataclass(frozen=True)
class Trajectories:
    """S recorded steps of N samplings.

    Attributes:
        sample: float32 [S, N, ...], what entered the model.
        timestep: float32 [S], descending.
        output: float32 [S, N, ...], what the float model answered.
        conditions: each float32 [N, ...], the same at every step of one sampling.
        parts: how many rows in turn are one sampling's, whose outputs guidance combines; 1 without
            guidance.
    """

    sample: Tensor
    timestep: Tensor
    output: Tensor
    conditions: dict[str, Tensor]
    parts: int = 1

    @property
    def recorded(self) -> dict[str, Tensor]:
        """What was recorded of the model, by name, without the conditions."""
        return {"sample": self.sample, "timestep": self.timestep, "output": self.output}

    def first(self, rows: int) -> Trajectories:
        """The first ``rows`` of all rows N, or all where there are fewer; ``parts`` is 1 where they
        end amid a sampling.
        """
        conditions = {name: value[:rows] for name, value in self.conditions.items()}
        sample = self.sample[:, :rows]
        parts = 1 if sample.shape[1] % self.parts else self.parts
        return Trajectories(sample, self.timestep, self.output[:, :rows], conditions, parts)

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """The model's inputs, one step and up to ``size`` samples at a time."""
        steps, samples = self.sample.shape[:2]
        for step in range(steps):
            for start in range(0, samples, size):
                rows = torch.arange(start, min(start + size, samples))
                yield self.inputs(torch.full_like(rows, step), rows)

    def inputs(self, steps: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """The model's inputs at (steps[i], rows[i]), each int64 [B]."""
        conditions = {name: value[rows] for name, value in self.conditions.items()}
        return {"sample": self.sample[steps, rows], "timestep": self.timestep[steps], **conditions}

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all."""
        tensors = self.recorded | {
            f"condition.{name}": value for name, value in self.conditions.items()
        }
        tensors["parts"] = torch.tensor(self.parts)
        with atomic_file(path) as temporary:
            temporary.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}))

    @classmethod
    def load(cls, path: Path) -> Trajectories:
        """Read what :meth:`save` wrote; raise InputError where it is missing or damaged."""
        try:
            tensors = read_tensors(path, "pt")
            conditions = {
                k.removeprefix("condition."): v
                for k, v in tensors.items()
                if k.startswith("condition.")
            }
            parts = tensors["parts"]
            if parts.dtype != torch.int64 or parts.dim():
                raise ValueError(f"parts: expected one int64, found {parts.dtype} {[*parts.shape]}")
            loaded = cls(
                tensors["sample"],
                tensors["timestep"],
                tensors["output"],
                conditions,
                int(parts),
            )
            loaded._check()
            return loaded
        except (OSError, SafetensorError, KeyError, ValueError) as e:
            raise InputError(
                f"{path}: not readable calibration trajectories ({e}); run `quest-deploy "
                "calibrate` again"
            ) from e

    def _check(self) -> None:
        """Raise ValueError where the tensors do not belong together."""
        steps, samples = (*self.sample.shape, 0, 0)[:2]
        if self.sample.dim() < 3 or not steps or not samples:
            raise ValueError(f"sample: expected [S, N, ...], found {list(self.sample.shape)}")
        if self.parts < 1 or samples % self.parts:
            raise ValueError(f"parts: expected a divisor of {samples}, found {self.parts}")
        for name, tensor, leading in (
            ("sample", self.sample, (steps, samples)),
            ("timestep", self.timestep, (steps,)),
            ("output", self.output, (steps, samples)),
            *((f"condition.{name}", x, (samples,)) for name, x in self.conditions.items()),
        ):
            if tensor.dtype != torch.float32 or tuple(tensor.shape[: len(leading)]) != leading:
                raise ValueError(
                    f"{name}: expected float32 {[*leading, '...']}, found {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: expected finite values")


def _scheduler(model: DiffusionModel, steps: int, scheme: Scheme | None) -> Any:
    scheduler = model.load_scheduler("ddim")
    set_steps(scheduler, steps)
    if scheme is None:
        return scheduler
    # The model's own spacing visits the timesteps at which it will sample; "trailing" ends each of
    # `count` equal parts of the training steps, so that no part is left out.
    least = max(steps, scheme.buckets)
    for spacing, count in (({}, least), (TRAILING, least), (TRAILING, model.train_timesteps)):
        if len({scheme.bucket_of(t) for t in scheduler.timesteps.tolist()}) == scheme.buckets:
            break
        scheduler = model.load_scheduler("ddim", **spacing)
        scheduler.set_timesteps(count)
    return scheduler


def samples_for(model: DiffusionModel, scheme: Scheme, steps: int) -> int:
    """How many samplings to record: more steps for more buckets, but not more data; finely divided
    timesteps need fewer each.
    """
    fewest = min(FEWEST_SAMPLES, model.calibration_samples)
    return max(
        fewest, model.calibration_samples * model.calibration_steps // max(steps, scheme.buckets)
    )


@torch.no_grad()
def record_trajectories(
    model: DiffusionModel,
    unet: nn.Module,
    *,
    steps: int,
    samples: int,
    seed: int,
    scheme: Scheme | None = None,
    guidance: float | None = None,
    image_guidance: float | None = None,
    rows: int | None = None,
    progress: Progress = no_progress,
) -> Trajectories:
    """Sample with DDIM and the float ``unet`` and record every step.

    Args:
        steps: DDIM steps, spaced as the model's scheduler spaces them.
        scheme: visit each of its buckets; where ``steps`` would miss one, with other spacing and
            more steps.
        samples: how many samplings run side by side; their conditions are drawn by the model.
        guidance: the classifier-free guidance weight, the model's where it is None. Where it is
            above 1, both halves of every sampling are recorded, the unconditional one first: 2 x
            ``samples`` rows; of a model that edits images three, in the order of
            :meth:`quest_deploy.models.channels.Guidance.parts`.
        image_guidance: the weight of the image that is edited, the model's where it is None.
        rows: how many rows run at once; all where it is None.

    Raises:
        InputError: a condition is not finite, or the scheduler cannot take the steps.
        QuestDeployError: an output of the model is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    scheduler = _scheduler(model, steps, scheme)
    guide = guidance_of(model, guidance, image_guidance)
    drawn = model.draw_conditions(samples, generator)
    parts = guide.parts(drawn, model.null_conditions(samples) if guide.guided else None)
    conditions = {
        name: torch.stack([part[name] for part in parts], 1).flatten(0, 1) for name in drawn
    }
    for name, value in conditions.items():
        if not torch.isfinite(value).all():
            raise InputError(
                f"the condition {name} is not finite; check the text encoder's weights, or the "
                "table of classes"
            )
    image = conditions.pop(IMAGE_CONDITION, None)
    channels = model.sample_shape[0]
    sample = torch.randn(samples, *model.sample_shape, generator=generator)
    inputs, outputs = [], []
    for i, timestep in enumerate(scheduler.timesteps):
        entered = joined(sample.repeat_interleave(len(parts), 0), image)
        try:
            output = chunked(
                lambda x, t=timestep, **c: unet(x, t, **c, return_dict=False)[0],
                rows,
                entered,
                **conditions,
            )
        except Exception as e:  # diffusers raises whatever a configuration provokes
            # What ran once is not at fault, nor is a machine without memory.
            if i or isinstance(e, QuestDeployError | OSError) or _lacks_memory(e):
                raise
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise InputError(
                f"{model.name}: its network does not run on samples {list(model.sample_shape)} and "
                f"{', '.join(conditions) or 'no conditions'} ({reason})"
            ) from e
        if not torch.isfinite(output).all():
            raise QuestDeployError(
                f"the model's output at timestep {timestep.item():g}, step {i + 1} of "
                f"{len(scheduler.timesteps)}, is not finite; check its weights"
            )
        inputs.append(entered)
        outputs.append(output)
        guided = guide.combine([output[i :: len(parts)] for i in range(len(parts))], channels)
        prediction = for_scheduler(scheduler, guided, channels)
        sample = scheduler.step(prediction, timestep, sample).prev_sample
        progress("recording trajectories", i + 1, len(scheduler.timesteps))
    return Trajectories(
        torch.stack(inputs),
        scheduler.timesteps.float(),
        torch.stack(outputs),
        conditions,
        len(parts),
    )


def _lacks_memory(error: Exception) -> bool:
    """Whether Python or torch, whose allocator on CPUs has no exception of its own, got none."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(
        error
    )


def chunked(
    run: Callable[..., Tensor], rows: int | None, sample: Tensor, **inputs: Tensor
) -> Tensor:
    """``run(sample, **inputs)``, each [B, ...], on ``rows`` rows at a time; on all of them where it
    is None.
    """
    if rows is None or len(sample) <= rows:
        return run(sample, **inputs)
    starts = range(0, len(sample), rows)
    return torch.cat(
        [
            run(sample[i : i + rows], **{name: x[i : i + rows] for name, x in inputs.items()})
            for i in starts
        ]
    )
