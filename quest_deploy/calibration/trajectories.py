"""Calibration data without data: the float model's own sampling trajectories.

Q-Diffusion's timestep-aware calibration (arXiv 2302.04304): what the model sees while it samples,
at every step, with the conditions it is used with. Targets for finetuning come along: they are the
model's own outputs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from quest_deploy.artifacts.tensors import read_tensors
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import atomic_file
from quest_deploy.models.channels import IMAGE_CONDITION, for_scheduler, guidance_of, joined
from quest_deploy.models.residuals import IMAGE_PROMPT, IMAGE_SCALE
from quest_deploy.models.schedulers import set_steps
from quest_deploy.progress import no_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from quest_deploy.artifacts.scheme import Scheme
    from quest_deploy.models.channels import Guidance
    from quest_deploy.models.registry import DiffusionModel
    from quest_deploy.progress import Progress


FEWEST_SAMPLES = 16
_CONDITION, _RESIDUAL = "condition.", "residual."
"""How a file calls them."""
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
        residuals: what ControlNets added to the model in the first M rows, each float32 [S, M,
            ...], by the name of its input; the other rows had nothing added, which zeros are.
    """

    sample: Tensor
    timestep: Tensor
    output: Tensor
    conditions: dict[str, Tensor]
    parts: int = 1
    residuals: dict[str, Tensor] = field(default_factory=dict)

    @property
    def recorded(self) -> dict[str, Tensor]:
        """What was recorded of the model, by name, without the conditions."""
        residuals = {f"{_RESIDUAL}{name}": value for name, value in self.residuals.items()}
        steps = {"sample": self.sample, "timestep": self.timestep, "output": self.output}
        return steps | residuals

    @property
    def controlled(self) -> int:
        """How many rows have residuals or an image prompt, the first ones."""
        first = next(iter(self.residuals.values()), None)
        if first is not None:
            return first.shape[1] if first.dim() > 1 else 0
        scale = self.conditions.get(IMAGE_SCALE)
        return 0 if scale is None else int((scale != 0).sum())

    @property
    def added(self) -> tuple[str, ...]:
        """The inputs that may be zeros, which add nothing to the model."""
        return (*self.residuals, *(name for name in IMAGE_PROMPT if name in self.conditions))

    def first(self, rows: int) -> Trajectories:
        """The first ``rows`` of all rows N, or all where there are fewer; ``parts`` is 1 where they
        end amid a sampling. Where something is added, whole samplings with and without it in
        proportion, at least one of each, also where they have more rows.
        """
        total = self.sample.shape[1]
        if not self.controlled or rows >= total:
            return self._rows(slice(rows))
        samplings = max(rows // self.parts, 2)
        kept = max(samplings * self.controlled // total, 1)
        plain = dataclasses.replace(self._rows(slice(self.controlled, None)), residuals={})
        return joined_rows(
            self._rows(slice(kept * self.parts)),
            plain._rows(slice((samplings - kept) * self.parts)),
        )

    def _rows(self, rows: slice) -> Trajectories:
        conditions = {name: value[rows] for name, value in self.conditions.items()}
        sample = self.sample[:, rows]
        parts = 1 if sample.shape[1] % self.parts else self.parts
        residuals = {name: value[:, rows] for name, value in self.residuals.items()}
        return Trajectories(
            sample, self.timestep, self.output[:, rows], conditions, parts, residuals
        )

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
        conditions |= {name: _at(value, steps, rows) for name, value in self.residuals.items()}
        return {"sample": self.sample[steps, rows], "timestep": self.timestep[steps], **conditions}

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all."""
        tensors = self.recorded | {
            f"{_CONDITION}{name}": value for name, value in self.conditions.items()
        }
        tensors["parts"] = torch.tensor(self.parts)
        with atomic_file(path) as temporary:
            temporary.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}))

    @classmethod
    def load(cls, path: Path) -> Trajectories:
        """Read what :meth:`save` wrote; raise InputError where it is missing or damaged."""
        try:
            tensors = read_tensors(path, "pt")
            conditions, residuals = (
                {k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)}
                for kind in (_CONDITION, _RESIDUAL)
            )
            parts = tensors["parts"]
            if parts.dtype != torch.int64 or parts.dim():
                raise ValueError(f"parts: expected one int64, found {parts.dtype} {[*parts.shape]}")
            loaded = cls(
                tensors["sample"],
                tensors["timestep"],
                tensors["output"],
                conditions,
                int(parts),
                residuals,
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
        if self.controlled > samples:
            raise ValueError(f"residuals: expected up to {samples} rows, found {self.controlled}")
        for name, tensor, leading in (
            ("sample", self.sample, (steps, samples)),
            ("timestep", self.timestep, (steps,)),
            ("output", self.output, (steps, samples)),
            *((f"{_CONDITION}{name}", x, (samples,)) for name, x in self.conditions.items()),
            *(
                (f"{_RESIDUAL}{name}", x, (steps, self.controlled))
                for name, x in self.residuals.items()
            ),
        ):
            if tensor.dtype != torch.float32 or tuple(tensor.shape[: len(leading)]) != leading:
                raise ValueError(
                    f"{name}: expected float32 {[*leading, '...']}, found {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: expected finite values")


def joined_rows(controlled: Trajectories, plain: Trajectories) -> Trajectories:
    """The rows of both, which were recorded at the same timesteps; those of ``plain`` have no
    residuals.
    """
    return Trajectories(
        torch.cat([controlled.sample, plain.sample], 1),
        controlled.timestep,
        torch.cat([controlled.output, plain.output], 1),
        {k: torch.cat([x, plain.conditions[k]]) for k, x in controlled.conditions.items()},
        min(controlled.parts, plain.parts),
        controlled.residuals,
    )


def _at(residual: Tensor, steps: Tensor, rows: Tensor) -> Tensor:
    """A residual [S, M, ...] at (steps[i], rows[i]), zeros beyond M."""
    found = residual.new_zeros(len(rows), *residual.shape[2:])
    recorded = rows < residual.shape[1]
    found[recorded] = residual[steps[recorded], rows[recorded]]
    return found


def _scheduler(model: DiffusionModel, steps: int, scheme: Scheme | None) -> Any:
    scheduler = model.load_scheduler(model.calibration_scheduler)
    set_steps(scheduler, steps)
    if scheme is None:
        return scheduler
    for spacing, count in _further(model, max(steps, scheme.buckets)):
        if len({scheme.bucket_of(t) for t in scheduler.timesteps.tolist()}) == scheme.buckets:
            break
        scheduler = model.load_scheduler(model.calibration_scheduler, **spacing)
        scheduler.set_timesteps(count)
    return scheduler


def _further(model: DiffusionModel, least: int) -> Iterator[tuple[dict[str, str], int]]:
    """The spacings and numbers of steps to try where fewer leave a bucket out.

    The model's own spacing visits the timesteps at which it will sample; "trailing" ends each of so
    many equal parts of the training steps, so that no part is left out. Flow matching knows no
    spacing: the steps that its buckets were made for visit all of them.
    """
    yield {}, least
    if model.bucket_steps is not None:
        yield {}, model.bucket_steps
    spacing = TRAILING if model.bucket_steps is None else {}
    while least < model.train_timesteps:
        yield spacing, least
        least *= 2
    yield spacing, model.train_timesteps


def samples_for(model: DiffusionModel, scheme: Scheme, steps: int) -> int:
    """How many samplings to record: more steps for more buckets, but not more data; finely divided
    timesteps need fewer each.
    """
    fewest = min(FEWEST_SAMPLES, model.calibration_samples)
    return max(
        fewest, model.calibration_samples * model.calibration_steps // max(steps, scheme.buckets)
    )


class ImagePrompt(Protocol):
    """Images that are conditions of the model, as an IP-Adapter's are."""

    def nothing(self, count: int) -> dict[str, Tensor]:
        """The conditions of ``count`` samplings without an image, which add nothing."""

    def asked(self, latents: NDArray[np.float32]) -> dict[str, Tensor]:
        """Those of samplings [B, ...] that are shown images, of which these would be the results
        without them.
        """

    def null(self, count: int) -> dict[str, Tensor]:
        """Those of guidance's unconditional rows beside them."""


class Control(Protocol):
    """What adds to the model while it samples, such as ControlNets."""

    def images(self, latents: NDArray[np.float32]) -> dict[str, Tensor]:
        """What it is shown in samplings [B, ...], by name, of which these would be the results
        without it.
        """

    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> dict[str, Tensor]:
        """What it adds, by the name of the model's input, each [B, ...]; ``conditions`` are the
        model's and what it is shown.
        """


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
    control: Control | None = None,
    prompt: ImagePrompt | None = None,
    progress: Progress = no_progress,
) -> Trajectories:
    """Sample with the model's ``calibration_scheduler`` and the float ``unet``, and record every
    step. Padding of prompts is recorded without what it holds, which counts for nothing.

    Args:
        steps: its steps, spaced as the model's scheduler spaces them.
        scheme: visit each of its buckets; where ``steps`` would miss one, with other spacing and
            more steps.
        samples: how many samplings run side by side; their conditions are drawn by the model.
        guidance: the guidance weight, the model's where it is None. Where it is classifier-free and
            above 1, both halves of every sampling are recorded, the unconditional one first: 2 x
            ``samples`` rows; of a model that edits images three, in the order of
            :meth:`quest_deploy.models.channels.Guidance.parts`.
        image_guidance: the weight of the image that is edited, the model's where it is None.
        rows: how many rows run at once; all where it is None.
        control, prompt: half of the samplings run with them, under the conditions of the other
            half, which runs first; as many of both, and so one more where ``samples`` is odd.

    Raises:
        InputError: a condition is not finite, or the scheduler cannot take the steps.
        QuestDeployError: an output of the model is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    scheduler = _scheduler(model, steps, scheme)
    guide = guidance_of(model, guidance, image_guidance)
    halves = control is not None or prompt is not None
    samples = -(-samples // 2) if halves else samples

    def by_row(asked: dict[str, Tensor], null: dict[str, Tensor] | None) -> dict[str, Tensor]:
        parts = guide.parts(asked, null)
        return {name: torch.stack([x[name] for x in parts], 1).flatten(0, 1) for name in parts[0]}

    drawn = model.draw_conditions(samples, generator)
    null = model.null_conditions(samples) if guide.guided else None
    parts, conditions = len(guide.parts(drawn, null)), by_row(drawn, null)
    for name, value in conditions.items():
        if not torch.isfinite(value).all():
            raise InputError(
                f"the condition {name} is not finite; check the text encoder's weights, or the "
                "table of classes"
            )
    conditions = model.without_padding(conditions)
    image = conditions.pop(IMAGE_CONDITION, None)
    if prompt is not None:
        nothing = prompt.nothing(samples)
        conditions |= by_row(nothing, nothing)
    recorder = _Recorder(model, unet, scheduler, guide, parts, conditions, image, rows, progress)

    def noise() -> Tensor:
        return torch.randn(samples, *model.sample_shape, generator=generator)

    plain, latents = recorder.record(noise())
    if not halves:
        return plain
    if prompt is not None:
        shown = by_row(prompt.asked(latents.numpy()), prompt.null(samples))
        recorder = dataclasses.replace(recorder, conditions=conditions | shown)
    shown = {} if control is None else control.images(latents.numpy())
    shown = {name: value.repeat_interleave(parts, 0) for name, value in shown.items()}
    controlled, _ = recorder.record(noise(), control, shown)
    return joined_rows(controlled, plain)


@dataclass(frozen=True)
class _Recorder:
    """Samples under ``conditions``, each [N, ...], and an image's, and records every step; see
    :class:`Trajectories` for ``parts`` and :func:`record_trajectories` for ``rows``.
    """

    model: DiffusionModel
    unet: nn.Module
    scheduler: Any
    guide: Guidance
    parts: int
    conditions: dict[str, Tensor]
    image: Tensor | None
    rows: int | None
    progress: Progress

    def record(
        self, sample: Tensor, control: Control | None = None, shown: dict[str, Tensor] | None = None
    ) -> tuple[Trajectories, Tensor]:
        """The trajectories from the noise ``sample`` [samplings, ...], and their end."""
        channels, timesteps, parts = (
            self.model.sample_shape[0],
            self.scheduler.timesteps,
            self.parts,
        )
        prompted = bool(self.conditions.get(IMAGE_SCALE, torch.zeros(0)).any())
        names = {"ControlNet": control is not None, "IP-Adapter": prompted}
        with_what = " and ".join(name for name, given in names.items() if given)
        phase = f"recording trajectories{f' with {with_what}' if with_what else ''}"
        inputs, outputs, residuals = [], [], []
        for i, timestep in enumerate(timesteps):
            entered = joined(sample.repeat_interleave(parts, 0), self.image)
            output, added = self._predicted(entered, timestep, i, control, shown or {})
            inputs.append(entered)
            outputs.append(output)
            residuals.append(added)
            guided = self.guide.combine([output[i::parts] for i in range(parts)], channels)
            prediction = for_scheduler(self.scheduler, guided, channels)
            sample = self.scheduler.step(prediction, timestep, sample).prev_sample
            self.progress(phase, i + 1, len(timesteps))
        recorded = Trajectories(
            torch.stack(inputs),
            timesteps.float(),
            torch.stack(outputs),
            self.conditions,
            parts,
            {name: torch.stack([x[name] for x in residuals]) for name in residuals[0]},
        )
        return recorded, sample

    def _predicted(
        self,
        entered: Tensor,
        timestep: Tensor,
        step: int,
        control: Control | None,
        shown: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's output for ``entered`` [rows, ...], and what ``control`` added."""
        found: list[dict[str, Tensor]] = []

        def run(x: Tensor, **given: Tensor) -> Tensor:
            latents = x[:, : self.model.sample_shape[0]]
            found.append({} if control is None else control(latents, timestep, **given))
            conditions = {name: given[name] for name in self.conditions}
            output: Tensor = self.unet(x, timestep, **conditions, **found[-1], return_dict=False)[0]
            return output

        try:
            output = chunked(run, self.rows, entered, **self.conditions, **shown)
        except Exception as e:  # diffusers raises whatever a configuration provokes
            # What ran once is not at fault, nor is a machine without memory.
            if step or isinstance(e, QuestDeployError | OSError) or _lacks_memory(e):
                raise
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
            at_fault = "its network" if found else "what is added to its network"
            raise InputError(
                f"{self.model.name}: {at_fault} does not run on samples "
                f"{list(self.model.sample_shape)} and "
                f"{', '.join((*self.conditions, *shown)) or 'no conditions'} ({reason})"
            ) from e
        if not torch.isfinite(output).all():
            raise QuestDeployError(
                f"the model's output at timestep {timestep.item():g}, step {step + 1} of "
                f"{len(self.scheduler.timesteps)}, is not finite; check its weights"
            )
        return output, {name: torch.cat([x[name] for x in found]) for name in found[0]}


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
