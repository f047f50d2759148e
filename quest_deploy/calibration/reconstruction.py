"""Q-Diffusion's block reconstruction (arXiv 2302.04304, after BRECQ, arXiv 2102.05426): rounding
and activation scales, learned.

Unit by unit in execution order: a ResBlock, a transformer block, an attention block; every other
layer alone. A unit reads what the quantized model before it gives, and its target is what the float
model gives. First each weight learns whether it is rounded up or down (AdaRound, arXiv 2004.10568)
while activations are in float; then the scales of the unit's activations are learned. Only a unit's
own inputs and targets are ever held, and every part of the model behind it is left out of the runs
that record them.

Each unit that is done is saved with the generator's state, so an interrupted run goes on at the
next one, to the same result.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quest_deploy import __version__
from quest_deploy.calibration.training_state import TrainingState, hash_of_tensors
from quest_deploy.errors import InputError
from quest_deploy.files import sha256_of_json
from quest_deploy.progress import no_progress
from quest_deploy.quantization.affine import per_sample
from quest_deploy.quantization.model import QuantizedModel, set_submodule
from quest_deploy.quantization.prepare import LowRank

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from quest_deploy.artifacts.checkpoint import Checkpoint
    from quest_deploy.calibration.trajectories import Trajectories
    from quest_deploy.progress import Progress
    from quest_deploy.quantization.layers import QuantizedLayer

UNITS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention", LowRank.__name__)
"""The diffusers blocks, and layers with their branch, that are reconstructed as a whole, the
outermost that matches.
"""
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
"""gamma and zeta of AdaRound's stretched sigmoid: h = clip(sigmoid(alpha) * (zeta - gamma) + gamma,
0, 1).
"""
ROUNDING_LOSS, WARM_UP, FIRST_BETA, LAST_BETA = 0.01, 0.2, 20.0, 2.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReconstructOptions:
    """How to reconstruct. The paper's values are for a GPU and days; the defaults fit the embedded
    model into minutes on one core.

    Attributes:
        samples: recorded (step, sampling) pairs, spread evenly over the steps (paper: 5120 to
            6400).
        rounding_steps: Adam steps a unit that learn the rounding (paper: 20,000). 0 leaves the
            rounding as it is.
        scale_steps: Adam steps a unit that learn the activation scales (paper: 5,000). 0 leaves the
            scales as they are.
        batch: pairs a step (paper: 32; Stable Diffusion 8).
        rounding_rate: Adam's learning rate of alpha (paper: 1e-3).
        scale_rate: of the scales, in the log domain, falling to 0 along a cosine (paper: 4e-4, of
            the scales themselves).
        seed: of the pairs and the batches.
    """

    samples: int = 320
    rounding_steps: int = 200
    scale_steps: int = 60
    batch: int = 32
    rounding_rate: float = 3e-2
    scale_rate: float = 4e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch < 1 or self.rounding_steps < 0 or self.scale_steps < 0:
            raise InputError(
                "reconstruction: expected samples and a batch of 1 or more, and steps of 0 or more"
            )


def reconstruct(
    unet: nn.Module,
    calibrated: Checkpoint,
    trajectories: Trajectories,
    options: ReconstructOptions,
    progress: Progress = no_progress,
    *,
    state_path: Path | None = None,
) -> Checkpoint:
    """Learn the rounding and the activation scales of ``calibrated``, any scheme of any number of
    buckets.

    Args:
        unet: the float model that ``calibrated`` was made from; not changed.
        trajectories: recorded on ``unet``; ``options.samples`` of their (step, sampling) pairs are
            used.
        state_path: the folder that each unit is saved in when it is done; where it holds this run's
            units, they are not learned again. It may be removed once the result is kept.

    Returns:
        The checkpoint with other weight codes, each of them the weight rounded down or up, and
        other scales.
    """
    student = QuantizedModel.from_checkpoint(calibrated, unet).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(options.seed)
    rows = _rows(trajectories, options.samples, generator)
    units = units_of(student)
    key = _run_key(student, unet, trajectories, options) if state_path else ""
    done = _resume(student, list(units.values()), generator, state_path, key) if state_path else 0
    learned: set[str] = set()
    for i, (name, layers) in enumerate(units.items()):
        quantizers = [
            quantizer
            for quantizer in _quantizers_of(student, name, layers)
            if quantizer not in learned
        ]
        learned.update(quantizers)
        if i < done:
            continue
        data = _record(unet, student, name, trajectories, rows, options.batch)
        if options.rounding_steps:
            _learn_rounding(student, name, layers, data, options, generator)
        for layer in layers:
            student.quantized_layers()[layer].freeze()
        if options.scale_steps and quantizers:
            _learn_scales(student, name, quantizers, data, options, generator)
        if state_path:
            parameters = _parameters(student, layers, quantizers)
            TrainingState(key, i + 1, parameters, {}, generator.get_state()).save(
                _state_file(state_path, i)
            )
        progress("reconstruction", i + 1, len(units), name)
    provenance = {
        **calibrated.provenance,
        "method": "qdiff",
        "reconstruction": dataclasses.asdict(options),
    }
    return student.to_checkpoint(provenance)


def units_of(student: QuantizedModel) -> dict[str, tuple[str, ...]]:
    """The units by module path, in execution order, each with its quantized layers; every layer is
    in exactly one.
    """
    units: dict[str, tuple[str, ...]] = {}
    for layer in student.checkpoint.layers:
        parts = layer.split(".")
        prefixes = (".".join(parts[:count]) for count in range(1, len(parts)))
        unit = next(
            (p for p in prefixes if type(student.model.get_submodule(p)).__name__ in UNITS), layer
        )
        units[unit] = (*units.get(unit, ()), layer)
    return units


def _run_key(
    student: QuantizedModel,
    unet: nn.Module,
    trajectories: Trajectories,
    options: ReconstructOptions,
) -> str:
    made_from = [
        hash_of_tensors(part)
        for part in (
            student.state_dict(),
            unet.state_dict(),
            trajectories.recorded | trajectories.conditions,
        )
    ]
    return sha256_of_json(
        [__version__, student.checkpoint.scheme.to_json(), dataclasses.asdict(options), made_from]
    )


def _state_file(folder: Path, unit: int) -> Path:
    # A file for each unit: at Stable Diffusion's size, a single one would be written again and
    # again in gigabytes.
    return folder / f"unit-{unit}.pt"


def _resume(
    student: QuantizedModel,
    units: list[tuple[str, ...]],
    generator: torch.Generator,
    folder: Path,
    key: str,
) -> int:
    """Put what an interrupted run learned into ``student`` and ``generator``; the number of units,
    given by their layers, it did.
    """
    done = 0
    for layers in units:
        try:
            state = TrainingState.load(_state_file(folder, done), key)
        except InputError as e:
            logger.warning("%s: it is ignored", e)
            break
        if state is None or state.generator is None:
            break
        student.load_state_dict(state.model, strict=False)
        generator.set_state(state.generator)
        for layer in layers:
            student.quantized_layers()[layer].freeze()
        done += 1
    if done:
        logger.info("resuming at unit %d of %d", done, len(units))
    return done


def _parameters(
    student: QuantizedModel, layers: tuple[str, ...], sites: list[str]
) -> dict[str, Tensor]:
    quantized, quantizers = student.quantized_layers(), student.activation_quantizers()
    learned = {
        id(p)
        for p in (
            *(quantized[layer].weight for layer in layers),
            *(quantizers[quantizer].log_shift for quantizer in sites),
        )
    }
    return {
        name: parameter.detach()
        for name, parameter in student.named_parameters()
        if id(parameter) in learned
    }


@dataclass(frozen=True)
class _UnitData:
    """What a unit is called with, as (args, kwargs) of tensors [N, ...] and tuples of them, its
    targets [N, ...] and the rows' timesteps [N].
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Tensor
    timesteps: Tensor

    def take(self, rows: Tensor) -> _UnitData:
        args = tuple(_index(value, rows) for value in self.args)
        kwargs = {key: _index(value, rows) for key, value in self.kwargs.items()}
        return _UnitData(args, kwargs, self.targets[rows], self.timesteps[rows])

    def run(self, student: QuantizedModel, unit: str) -> Tensor:
        """The unit's output for these rows."""
        with student.at_timesteps(self.timesteps):
            output = student.model.get_submodule(unit)(*self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]


def _index(value: Any, rows: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_index(each, rows) for each in value)
    return value[rows] if isinstance(value, Tensor) else value


def _rows(
    trajectories: Trajectories, samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    steps, samplings = trajectories.sample.shape[:2]
    # In random order, so that neither steps nor conditions come in blocks.
    chosen = torch.arange(samples)[torch.randperm(samples, generator=generator)] % steps
    return chosen, torch.randint(samplings, (samples,), generator=generator)


class _StopForward(Exception):  # noqa: N818 - no error: it ends a run early
    """Raised where the rest of the model need not run."""


@torch.no_grad()
def _record(
    unet: nn.Module,
    student: QuantizedModel,
    unit: str,
    trajectories: Trajectories,
    rows: tuple[Tensor, Tensor],
    batch: int,
) -> _UnitData:
    """The unit's inputs in the quantized model and its outputs in the float one."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _StopForward

    def after(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])
        raise _StopForward

    target = _submodule(unet, unit)
    handles = [
        student.model.get_submodule(unit).register_forward_pre_hook(before, with_kwargs=True),
        target.register_forward_hook(after),
    ]
    timesteps = []
    try:
        for steps, samplings in zip(rows[0].split(batch), rows[1].split(batch), strict=True):
            inputs = trajectories.inputs(steps, samplings)
            timesteps.append(inputs["timestep"])
            for model in (student, unet):
                try:
                    model(**inputs)
                except _StopForward:
                    continue
    finally:
        for handle in handles:
            handle.remove()
    args = tuple(_joined(column) for column in zip(*(args for args, _ in calls), strict=True))
    kwargs = {key: _joined([kwargs[key] for _, kwargs in calls]) for key in calls[0][1]}
    return _UnitData(args, kwargs, torch.cat(outputs), torch.cat(timesteps))


def _submodule(unet: nn.Module, unit: str) -> nn.Module:
    try:
        return unet.get_submodule(unit)
    except AttributeError as e:
        raise InputError(
            f"the float model has no module {unit}: the checkpoint was made from another model"
        ) from e


def _joined(values: Any) -> Any:
    if isinstance(values[0], tuple):
        return tuple(map(_joined, zip(*values, strict=True)))
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else values[0]


def _learn_rounding(
    student: QuantizedModel,
    unit: str,
    layers: tuple[str, ...],
    data: _UnitData,
    options: ReconstructOptions,
    generator: torch.Generator,
) -> None:
    quantized = student.quantized_layers()
    soft = {name: _SoftRounding(quantized[name]) for name in layers}
    floats: dict[str, nn.Module] = {
        name: _FloatProduct() for name in student.quantized_matmuls() if name.startswith(f"{unit}.")
    }
    optimizer = torch.optim.Adam(
        [rounding.alpha for rounding in soft.values()], lr=options.rounding_rate
    )
    with _swapped(student, {**soft, **floats}):
        for step in range(options.rounding_steps):
            batch = data.take(
                torch.randint(len(data.targets), (options.batch,), generator=generator)
            )
            loss = _channel_error(batch.run(student, unit) - batch.targets, 2.0)
            progress = step / options.rounding_steps
            if progress >= WARM_UP:
                beta = FIRST_BETA + (LAST_BETA - FIRST_BETA) * (progress - WARM_UP) / (1 - WARM_UP)
                loss = (
                    loss
                    + ROUNDING_LOSS
                    * torch.stack([rounding.undecided(beta) for rounding in soft.values()]).sum()
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        for name, rounding in soft.items():
            quantized[name].weight.copy_(rounding.decided())


def _learn_scales(
    student: QuantizedModel,
    unit: str,
    sites: list[str],
    data: _UnitData,
    options: ReconstructOptions,
    generator: torch.Generator,
) -> None:
    quantizers = student.activation_quantizers()
    parameters = [quantizers[quantizer].log_shift for quantizer in sites]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=options.scale_rate)
    for step in range(options.scale_steps):
        optimizer.param_groups[0]["lr"] = (
            options.scale_rate * 0.5 * (1 + math.cos(math.pi * step / options.scale_steps))
        )
        batch = data.take(torch.randint(len(data.targets), (options.batch,), generator=generator))
        optimizer.zero_grad(set_to_none=True)
        _channel_error(batch.run(student, unit) - batch.targets, 2.4).backward()
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)


def _quantizers_of(student: QuantizedModel, unit: str, layers: tuple[str, ...]) -> list[str]:
    checkpoint = student.checkpoint
    products = [
        product for name, product in checkpoint.matmuls.items() if name.startswith(f"{unit}.")
    ]
    names = [checkpoint.quantizer_of(layer).name for layer in layers] + [
        s for product in products for s in product.sites if s is not None
    ]
    return list(dict.fromkeys(names))


def _channel_error(difference: Tensor, power: float) -> Tensor:
    """The mean over samples and positions of the sum over channels of |difference|^power."""
    channel_axis = 1 if difference.dim() == 4 else difference.dim() - 1
    return difference.abs().pow(power).sum(channel_axis).mean()


class _SoftRounding(nn.Module):
    """A layer in float whose weight lies between its rounded-down and its rounded-up value, as
    ``alpha`` says.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # it stays the student's own
        weight = layer.weight.detach()
        self.scale, self.low, self.high = (
            per_sample(values, weight)
            for values in (layer.weight_scale, layer.weight_low, layer.weight_high)
        )
        ratio = weight / self.scale
        self.floor = torch.floor(ratio)
        fraction = ((ratio - self.floor) - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)
        self.alpha = nn.Parameter(torch.log(fraction / (1 - fraction)))

    layer: QuantizedLayer

    def share_up(self) -> Tensor:
        """h, in [0, 1]."""
        return (torch.sigmoid(self.alpha) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)

    def undecided(self, beta: float) -> Tensor:
        """The sum of 1 - |2h - 1|^beta: zero where every weight is up or down."""
        return (1 - (2 * self.share_up() - 1).abs().pow(beta)).sum()

    def decided(self) -> Tensor:
        """The weight rounded up where alpha >= 0, and else down."""
        return torch.clamp(self.floor + (self.alpha >= 0), self.low, self.high) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.clamp(self.floor + self.share_up(), self.low, self.high) * self.scale
        return self.layer.compute(self.layer.site.unquantized(x), weight)


class _FloatProduct(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


@contextmanager
def _swapped(student: QuantizedModel, modules: dict[str, nn.Module]) -> Iterator[None]:
    """Put ``modules`` in the place of the student's, for a while."""
    own = {name: student.model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        set_submodule(student.model, name, module)
    try:
        yield
    finally:
        for name, module in own.items():
            set_submodule(student.model, name, module)
