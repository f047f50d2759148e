"""QuEST's two-stage selective finetuning against the float model, data-free.

Stage 1 trains the temporal layers (the time-embedding projections) and the scales of what they read; stage 2 trains them on,
together with the sensitive layers (attention and feed-forward) and every site's scales. Both are supervised by the float model's
final output and by its blocks' outputs, on its own sampling trajectories. What the official code gets wrong is done right: one
optimizer per stage (it keeps its momentum), scales that stay positive, rounding that follows the weights, a batch that mixes
timesteps, and a loss in which no timestep outweighs the others.

Every step draws its batch from (seed, step) alone, so an interrupted run that resumes from :class:`TrainingState` ends at the
same result.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quest_deploy import __version__
from quest_deploy.checkpoint import SiteData
from quest_deploy.errors import InputError
from quest_deploy.files import atomic_file, sha256_of_json
from quest_deploy.finetune.layer_sets import LAYER_SETS, select_layers
from quest_deploy.quant.model import QuantizedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from quest_deploy.checkpoint import Checkpoint
    from quest_deploy.quant.layers import SiteQuantizer
    from quest_deploy.trajectories import Trajectories

SUPERVISED_BLOCKS = ("ResnetBlock2D", "Transformer2DModel")
"""The diffusers blocks whose outputs are compared with the float model's."""


@dataclass(frozen=True)
class FinetuneOptions:
    """How to finetune.

    Attributes:
        family: the row of ``LAYER_SETS`` that says which layers each stage trains.
        temporal_steps, sensitive_steps: optimizer steps of stages 1 and 2.
        batch: samples a step, their timesteps spread evenly over the trajectories' steps.
        weight_rate, scale_rate: Adam's learning rates of weights, and of scales (in the log domain) and zero-points.
        block_loss: weight of the mean :func:`log_error` of the blocks' outputs, beside that of the model's output.
        seed: of the batches.
    """

    family: str
    temporal_steps: int = 100
    sensitive_steps: int = 700
    batch: int = 32
    weight_rate: float = 1e-3
    scale_rate: float = 5e-3
    block_loss: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in LAYER_SETS:
            raise InputError(f"unknown model family {self.family!r}: expected one of {', '.join(LAYER_SETS)}")
        if self.temporal_steps < 0 or self.sensitive_steps < 0 or self.batch < 1:
            raise InputError("finetuning needs a positive batch and step counts that are not negative")


@dataclass
class TrainingState:
    """Where an interrupted run goes on: ``step`` optimizer steps are done, over both stages.

    ``key`` identifies the options and inputs that made it; a state with another key is never used.
    """

    key: str
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the state, whole or not at all."""
        buffer = io.BytesIO()  # torch.save's own errors on a full disk are no OSError
        torch.save({"key": self.key, "step": self.step, "model": self.model, "optimizer": self.optimizer}, buffer)
        with atomic_file(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    @classmethod
    def load(cls, path: Path, key: str) -> TrainingState | None:
        """The state at ``path``, or None where there is none, or it is damaged or of another run."""
        try:
            state = cls(**torch.load(path, weights_only=True))
        except FileNotFoundError:
            return None
        except Exception:  # torch.load raises whatever the damage provokes; a state is only a shortcut
            return None
        return state if state.key == key else None


@dataclass(frozen=True)
class Progress:
    """What a run reports after each step: its stage, the step over both stages, and the loss."""

    stage: str
    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class _Stage:
    name: str
    weights: list[nn.Parameter]
    scales: list[nn.Parameter]
    first_step: int
    steps: int


def finetune(
    teacher: nn.Module,
    calibrated: Checkpoint,
    trajectories: Trajectories,
    options: FinetuneOptions,
    *,
    state_path: Path | None = None,
    save_every: int = 20,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Checkpoint:
    """Finetune ``calibrated`` towards the float ``teacher``; resume from ``state_path`` where it holds this run's state.

    Raises:
        InputError: the layer sets match no layer.
    """
    student = QuantizedModel.from_checkpoint(calibrated, teacher).eval()
    teacher.requires_grad_(False)
    stages = _stages(student, options)
    key = _run_key(calibrated, options, trajectories)
    state = TrainingState.load(state_path, key) if state_path else None
    if state is not None:
        student.load_state_dict(state.model)
    with _BlockOutputs(student.model) as student_blocks, _BlockOutputs(teacher) as teacher_blocks:
        for stage in stages:
            done = state.step - stage.first_step if state else 0
            if done >= stage.steps:
                continue
            optimizer, schedule = _optimizer(student, stage, options)
            if state is not None and done > 0:
                optimizer.load_state_dict(state.optimizer)
            for step in range(max(done, 0), stage.steps):
                schedule(step)
                inputs, target = _batch(trajectories, options, stage.first_step + step)
                optimizer.zero_grad(set_to_none=True)
                with torch.no_grad():
                    teacher(**inputs)
                output = student(**inputs)
                pairs = zip(student_blocks.take(), teacher_blocks.take(), strict=True)
                block_errors = [log_error(mine, theirs) for mine, theirs in pairs]
                loss = log_error(output, target)
                if block_errors:
                    loss = loss + options.block_loss * torch.stack(block_errors).mean()
                loss.backward()
                optimizer.step()
                total = stage.first_step + step + 1
                if state_path and total % save_every == 0:
                    TrainingState(key, total, student.state_dict(), optimizer.state_dict()).save(state_path)
                on_progress(Progress(stage.name, total, options.temporal_steps + options.sensitive_steps, loss.item()))
    provenance = {**calibrated.provenance, "method": "quest", "start": calibrated.provenance["method"], **asdict(options)}
    return student.to_checkpoint(provenance)


def log_error(output: Tensor, target: Tensor) -> Tensor:
    """The mean over samples of log(|output - target|^2 / |target|^2); both [B, ...].

    A mean of logarithms, because errors differ a hundredfold between timesteps: in a plain mean the last step (t = 1), which
    hardly touches the image, would outweigh all others. Here halving an error counts the same at every timestep and in every
    block.
    """
    error = (output - target).square().flatten(1).mean(1)
    power = target.square().flatten(1).mean(1).clamp(min=1e-6)
    return (error / power).clamp(min=1e-8).log().mean()


def _stages(student: QuantizedModel, options: FinetuneOptions) -> list[_Stage]:
    sets, layers = LAYER_SETS[options.family], student.quantized_layers()
    temporal, sensitive = select_layers(layers, sets.temporal), select_layers(layers, sets.sensitive)
    sites = list(student.site_quantizers().values())
    temporal_sites = list({id(site): site for site in (layers[name].site for name in temporal)}.values())

    def weights(names: tuple[str, ...]) -> list[nn.Parameter]:
        return [p for name in names for p in (layers[name].weight, layers[name].bias) if p is not None]

    def scales(sites: list[SiteQuantizer]) -> list[nn.Parameter]:
        return [p for s in sites for p in (s.log_shift, s.zero_point)]

    first = _Stage("temporal layers", weights(temporal), scales(temporal_sites), 0, options.temporal_steps)
    # What stage 1 trained goes on in stage 2: the best time embedding depends on the layers that are trained there.
    both = tuple(dict.fromkeys(temporal + sensitive))
    return [first, _Stage("sensitive layers", weights(both), scales(sites), options.temporal_steps, options.sensitive_steps)]


def _optimizer(student: nn.Module, stage: _Stage, options: FinetuneOptions) -> tuple[torch.optim.Adam, Callable[[int], None]]:
    student.requires_grad_(False)
    for parameter in (*stage.weights, *stage.scales):
        parameter.requires_grad_(True)
    rates = (options.weight_rate, options.scale_rate)
    optimizer = torch.optim.Adam([{"params": stage.weights}, {"params": stage.scales}], lr=0.0)

    def schedule(step: int) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / stage.steps))

    return optimizer, schedule


def _batch(trajectories: Trajectories, options: FinetuneOptions, step: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    recorded, samples = trajectories.sample.shape[:2]
    # Evenly spread steps with a random offset: every batch sees early and late timesteps alike.
    offset = torch.rand(1, generator=generator) * recorded
    steps = (torch.arange(options.batch) * recorded / options.batch + offset).long() % recorded
    rows = torch.randint(samples, (options.batch,), generator=generator)
    return trajectories.inputs(steps, rows), trajectories.output[steps, rows]


class _BlockOutputs:
    """Collects the outputs of a model's supervised blocks, in execution order."""

    def __init__(self, model: nn.Module) -> None:
        self._blocks = [m for m in model.modules() if type(m).__name__ in SUPERVISED_BLOCKS]
        self._handles: list[Any] = []
        self._outputs: list[Tensor] = []

    def __enter__(self) -> _BlockOutputs:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._outputs.append(output if isinstance(output, Tensor) else output[0])

        self._handles = [block.register_forward_hook(hook) for block in self._blocks]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> Iterator[Tensor]:
        """The outputs since the last call."""
        outputs, self._outputs = self._outputs, []
        return iter(outputs)


def _run_key(calibrated: Checkpoint, options: FinetuneOptions, trajectories: Trajectories) -> str:
    digest = hashlib.sha256()
    for site in calibrated.sites.values():
        tables = (site.scale, site.low, site.channel) if isinstance(site, SiteData) else (site.scale, site.zero_point)
        for table in tables:
            digest.update(table.tobytes())
    for layer in calibrated.layers.values():
        digest.update(layer.weight_codes.tobytes() + layer.weight_scale.tobytes())
    recorded = [list(trajectories.sample.shape), float(trajectories.output.double().sum())]
    return sha256_of_json([__version__, calibrated.scheme.to_json(), digest.hexdigest(), asdict(options), recorded])
