"""QuEST's selective finetuning against the float model, data-free.

The temporal stage trains the temporal layers (the time-embedding projections) and the scales of
what they read; the sensitive stage trains the sensitive layers (attention and feed-forward) and
every quantizer's scales, and goes on with the temporal layers where their stage came first
(published QuEST freezes them: ``carry_temporal``). Both are supervised by the float model's final
output and by its blocks' outputs, on its own sampling trajectories. What the official code gets
wrong is done right: one optimizer per stage (it keeps its momentum), scales that stay positive,
rounding that follows the weights, a batch that mixes timesteps, and a loss in which no timestep
outweighs the others. :func:`guidance_error` is ours.

Every step draws its batch from (seed, step) alone. So an interrupted run that resumes from
:class:`TrainingState` ends at the same result, and the float model can run ahead over many steps
(:class:`TargetStream`) and be gone while the student trains.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quest_deploy import __version__
from quest_deploy.artifacts.checkpoint import ActivationQuantizerData
from quest_deploy.calibration.training_state import TrainingState, hash_of_tensors
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import sha256_of_json
from quest_deploy.finetuning.block_outputs import BlockOutputs, supervised_blocks
from quest_deploy.finetuning.choices import PRECISIONS, STAGES
from quest_deploy.finetuning.distributed import Processes, gradients
from quest_deploy.finetuning.gradient_checkpointing import enable_gradient_checkpointing
from quest_deploy.finetuning.layer_sets import layer_sets, select_layers
from quest_deploy.finetuning.teacher_cache import TargetStream
from quest_deploy.models.networks import kind_of
from quest_deploy.progress import no_progress
from quest_deploy.quantization.model import QuantizedModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from quest_deploy.artifacts.checkpoint import Checkpoint
    from quest_deploy.calibration.trajectories import Trajectories
    from quest_deploy.progress import Progress

TARGETS = "targets from the float model"
"""The phase of progress in which it runs ahead."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneOptions:
    """How to finetune; everything that shapes the result.

    Attributes:
        family: the row of :mod:`quest_deploy.finetuning.layer_sets` that says which layers each
            stage trains.
        stages: some of ``STAGES``, in the order in which they run.
        temporal_layers, sensitive_layers: glob patterns over layer names that replace the family's.
        carry_temporal: whether the sensitive stage trains on what an earlier temporal stage
            trained; False freezes it, as published.
        temporal_steps, sensitive_steps: optimizer steps of each stage.
        batch: samples a step, their timesteps spread evenly over the trajectories' steps.
        weight_rate, scale_rate: Adam's learning rates of weights, and of scales (in the log domain)
            and zero-points.
        output_loss: weight of the :func:`log_error` of the model's output.
        block_loss: weight of the mean :func:`log_error` of the blocks' outputs.
        guidance_loss: weight of the :func:`guidance_error`, where the trajectories are guided; a
            batch is then of whole samplings.
        precision: "bf16" computes the float layers under autocast; the quantizers, the loss and the
            float model stay in float32.
        seed: of the batches.
    """

    family: str
    stages: tuple[str, ...] = STAGES
    temporal_layers: tuple[str, ...] | None = None
    sensitive_layers: tuple[str, ...] | None = None
    carry_temporal: bool = True
    temporal_steps: int = 100
    sensitive_steps: int = 700
    batch: int = 32
    weight_rate: float = 1e-3
    scale_rate: float = 5e-3
    output_loss: float = 1.0
    block_loss: float = 0.1
    guidance_loss: float = 0.0
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        layer_sets(self.family)
        if (
            not self.stages
            or len(set(self.stages)) != len(self.stages)
            or not set(self.stages) <= set(STAGES)
        ):
            raise InputError(
                f"expected one or both of the stages {', '.join(STAGES)}, each once; found "
                f"{', '.join(self.stages)!r}"
            )
        if self.temporal_steps < 0 or self.sensitive_steps < 0 or self.batch < 1:
            raise InputError(
                "finetuning: expected a batch of 1 or more, and step counts of 0 or more"
            )
        if not (
            self.output_loss >= 0
            and self.block_loss >= 0
            and 0 <= self.guidance_loss < math.inf
            and 0 < self.output_loss + self.block_loss < math.inf
        ):
            raise InputError(
                "expected loss weights of 0 or more, that of the model's output or that of its "
                "blocks' above 0"
            )
        if self.precision not in PRECISIONS:
            raise InputError(
                f"unknown precision {self.precision!r}: expected one of {', '.join(PRECISIONS)}"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps over all stages."""
        return sum(self.steps_of(stage) for stage in self.stages)

    def steps_of(self, stage: str) -> int:
        """Optimizer steps of ``stage``."""
        return self.temporal_steps if stage == "temporal" else self.sensitive_steps

    def layers_of(self, stage: str) -> tuple[str, ...]:
        """The glob patterns of the layers that ``stage`` is about."""
        sets = layer_sets(self.family)
        if stage == "temporal":
            return sets.temporal if self.temporal_layers is None else self.temporal_layers
        return sets.sensitive if self.sensitive_layers is None else self.sensitive_layers


@dataclass(frozen=True)
class Step:
    """What a run computed in a step.

    Attributes:
        stage: one of ``STAGES``.
        step, steps: the steps done, and all of them, over all stages.
        loss: of this step's batch.
        buckets: the lowest and the highest timestep bucket in it.
    """

    stage: str
    step: int
    steps: int
    loss: float
    buckets: tuple[int, int]


@dataclass(frozen=True)
class _Stage:
    name: str
    layers: tuple[str, ...]
    weights: list[nn.Parameter]
    scales: list[nn.Parameter]
    first_step: int
    steps: int

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.weights, *self.scales]


def finetune(
    load_teacher: Callable[[], nn.Module],
    calibrated: Checkpoint,
    trajectories: Trajectories,
    options: FinetuneOptions,
    *,
    device: str = "cpu",
    gradient_checkpointing: bool = False,
    state_path: Path | None = None,
    save_every: int = 20,
    targets_path: Path | None = None,
    target_cache: int = 1024,
    progress: Progress = no_progress,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Checkpoint:
    """Finetune ``calibrated`` towards the float model; resume from ``state_path`` where it holds
    this run's state.

    Under `accelerate launch` every process calls this with the same arguments and gets the same
    result; each computes its share of every batch. Only the main one writes the state; each keeps
    its own share of the targets.

    Args:
        load_teacher: gives the float model, FP32; called again whenever targets are due, its result
            is released in between.
        trajectories: recorded on the float model.
        device: "cpu" or "cuda".
        gradient_checkpointing: compute a block's activations again in the backward pass instead of
            keeping them.
        save_every: steps between two saved states.
        targets_path: where the float model's block outputs are cached, with ".1" and so on behind
            it by the further processes; a temporary folder where it is None. All are removed at the
            end.
        target_cache: MiB that each process's cache may take (it holds at least one step).
        on_step: called after each step.

    Raises:
        InputError: the layer sets match no layer, the device is absent, or the processes cannot
            share a batch, or the samplings that it holds.
    """
    with ExitStack() as stack:
        processes = stack.enter_context(Processes(device, options.batch))
        if targets_path is None:
            targets_path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "targets.bin"
        elif not processes.is_main:
            targets_path = targets_path.with_name(f"{targets_path.name}.{processes.index}")
        batches = _Batches(trajectories, options, processes)  # refused before anything is loaded
        teacher = load_teacher()
        made_from: dict[str, str | int] = {
            "teacher": hash_of_tensors(teacher.state_dict()),
            "trajectories": hash_of_tensors(trajectories.recorded | trajectories.conditions),
            "together": batches.together,
        }
        student = QuantizedModel.from_checkpoint(calibrated, teacher).eval().to(processes.device)
        del teacher
        stages = _stages(student, options)
        _freeze_all_but(student, {name for stage in stages for name in stage.layers})
        if gradient_checkpointing:
            enable_gradient_checkpointing(student.model)

        plan = {
            **made_from,
            "seed": options.seed,
            "batch": options.batch,
            "share": [processes.index, processes.count],
        }
        stream = TargetStream(
            targets_path,
            sha256_of_json([__version__, kind_of(student.model).supervised_blocks, plan]),
            target_cache * 2**20,
        )
        targets = _Targets(stream, load_teacher, batches, options.steps, progress)
        supervised = options.block_loss > 0 and supervised_blocks(student.model)
        key = _run_key(calibrated, options, made_from)
        names = {id(parameter): name for name, parameter in student.named_parameters()}
        learned = {
            names[id(parameter)]: parameter for stage in stages for parameter in stage.parameters
        }
        state = _load_state(state_path, key, options.steps, logs=processes.is_main)
        if state is not None:
            student.load_state_dict(state.model, strict=False)
            state.model.clear()

        def save(total: int, optimizer: torch.optim.Optimizer) -> None:
            if state_path and processes.is_main and total % save_every == 0:
                parameters = {name: parameter.detach() for name, parameter in learned.items()}
                TrainingState(key, total, parameters, optimizer.state_dict()).save(state_path)

        for stage in stages:
            done = state.step - stage.first_step if state else 0
            if done >= stage.steps:
                continue
            optimizer, schedule = _optimizer(student, stage, options)
            if state is not None and done > 0:
                optimizer.load_state_dict(state.optimizer)
            for step in range(max(done, 0), stage.steps):
                total = stage.first_step + step + 1
                schedule(step)
                loss = _backward(
                    student,
                    *batches.share(total - 1),
                    targets.of(total - 1) if supervised else [],
                    options,
                    batches.together,
                )
                processes.average([*gradients(stage.parameters), loss])
                _check_finite(loss, stage, total, names)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                save(total, optimizer)
                low, high = batches.buckets(total - 1, student)
                progress(
                    f"{stage.name} layers",
                    total,
                    options.steps,
                    f"buckets {low}-{high}, loss {loss.item():.4f}",
                )
                on_step(Step(stage.name, total, options.steps, loss.item(), (low, high)))
        stream.remove()
    if processes.is_main:
        # By now every process is done with its own. What is left is of an interrupted run of more
        # processes than this one.
        for left in targets_path.parent.glob(f"{targets_path.name}.*"):
            left.unlink(missing_ok=True)
    provenance = {
        **calibrated.provenance,
        "method": "quest",
        "start": calibrated.provenance["method"],
        **asdict(options),
    }
    return student.cpu().to_checkpoint(provenance)


def log_error(output: Tensor, target: Tensor) -> Tensor:
    """The mean over samples of log(|output - target|^2 / |target|^2); both [B, ...].

    A mean of logarithms, because errors differ a hundredfold between timesteps: in a plain mean the
    last step (t = 1), which hardly touches the image, would outweigh all others. Here halving an
    error counts the same at every timestep and in every block.
    """
    error = (output - target).square().flatten(1).mean(1)
    power = target.square().flatten(1).mean(1).clamp(min=1e-6)
    return (error / power).clamp(min=1e-8).log().mean()


def guidance_error(output: Tensor, target: Tensor, parts: int) -> Tensor:
    """The mean of (<d, t> / |t|^2 - 1)^2, where d and t are what guidance multiplies: the
    differences between one part of a sampling's output, or of its target, and the part before;
    both [B, ...], each ``parts`` rows in turn one sampling's at one step.

    The least squared error of a noisy model is that of one whose conditional and unconditional
    outputs differ too little (shrinkage towards the mean): guidance then is weaker than it was
    asked to be, and images show their prompts less often. This keeps the difference's length.
    """
    found, wanted = (
        x.unflatten(0, (-1, parts)).diff(dim=1).flatten(0, 1).flatten(1) for x in (output, target)
    )
    power = wanted.square().mean(1)
    # An empty prompt's outputs are the unconditional ones: there is nothing to keep.
    gain = (found * wanted).mean(1) / power.clamp(min=1e-6)
    error: Tensor = ((gain - 1).square() * (power > 1e-6)).mean()
    return error


def _check_finite(loss: Tensor, stage: _Stage, step: int, names: dict[int, str]) -> None:
    """Raise QuestDeployError where a step's loss or gradients are not finite: the parameters would
    be lost, and with them all steps that are done.
    """
    wrong = [names[id(p)] for p in stage.parameters if p.grad is not None and not _finite(p.grad)]
    if not _finite(loss) or wrong:
        raise QuestDeployError(
            f"finetuning diverged: step {step}, of the {stage.name} layers, has a loss of "
            f"{loss.item():.4g}"
            + (f" and no finite gradient of {wrong[0]}" if wrong else "")
            + "; choose smaller --weight-rate and --scale-rate"
        )


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _stages(student: QuantizedModel, options: FinetuneOptions) -> list[_Stage]:
    layers, in_float = student.quantized_layers(), _trained_in_float(student, options)
    stages: list[_Stage] = []
    for name in options.stages:
        asked = options.temporal_layers if name == "temporal" else options.sensitive_layers
        chosen = select_layers((*layers, *in_float), options.layers_of(name), or_all=asked is None)
        if name == "temporal":
            quantizers = list(
                {
                    id(quantizer): quantizer
                    for quantizer in (layers[layer].site for layer in chosen if layer in layers)
                }.values()
            )
        else:
            if options.carry_temporal:
                # The best time embedding depends on the layers that are trained here.
                chosen = tuple(
                    dict.fromkeys((*(layer for stage in stages for layer in stage.layers), *chosen))
                )
            quantizers = list(student.activation_quantizers().values())
        weights = [
            p
            for layer in chosen
            for p in (
                (layers[layer].weight, layers[layer].bias) if layer in layers else in_float[layer]
            )
            if p is not None
        ]
        scales = [
            p
            for quantizer in quantizers
            for p in (
                (quantizer.log_shift, quantizer.zero_point)
                if quantizer.learns_zero_point
                else (quantizer.log_shift,)
            )
        ]
        first_step = stages[-1].first_step + stages[-1].steps if stages else 0
        stages.append(_Stage(name, chosen, weights, scales, first_step, options.steps_of(name)))
    return stages


def _trained_in_float(
    student: QuantizedModel, options: FinetuneOptions
) -> dict[str, list[nn.Parameter]]:
    """The parameters in float that a stage may train, by the name of their module, or their own."""
    quantized, network = student.quantized_layers(), student.model
    found: dict[str, list[nn.Parameter]] = {}
    for pattern in layer_sets(options.family).in_float:
        for name, module in network.named_modules():
            if fnmatchcase(name, pattern) and name not in quantized:
                found[name] = list(module.parameters())
        for name, parameter in network.named_parameters():
            if fnmatchcase(name, pattern):
                found[name] = [parameter]
    return found


def _freeze_all_but(student: QuantizedModel, trained: set[str]) -> None:
    for name, layer in student.quantized_layers().items():
        if name not in trained:
            layer.freeze()


def _optimizer(
    student: nn.Module, stage: _Stage, options: FinetuneOptions
) -> tuple[torch.optim.Adam, Callable[[int], None]]:
    student.requires_grad_(False)
    for parameter in stage.parameters:
        parameter.requires_grad_(True)
    rates = (options.weight_rate, options.scale_rate)
    optimizer = torch.optim.Adam(
        [{"params": stage.weights}, {"params": stage.scales}], lr=0.0, fused=True
    )

    def schedule(step: int) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / stage.steps))

    return optimizer, schedule


def _backward(
    student: QuantizedModel,
    inputs: dict[str, Tensor],
    target: Tensor,
    block_targets: list[Tensor],
    options: FinetuneOptions,
    together: int = 1,
) -> Tensor:
    """Leave the gradients of one batch in the student's parameters; the loss."""
    # The hooks are gone before the backward pass, in which checkpointed blocks run again.
    with (
        BlockOutputs(student.model) as blocks,
        torch.autocast(target.device.type, torch.bfloat16, options.precision == "bf16"),
    ):
        output = student(**inputs)
        block_outputs = blocks.take()
    loss = options.output_loss * log_error(output.float(), target)
    if together > 1:
        loss = loss + options.guidance_loss * guidance_error(output.float(), target, together)
    if block_targets:
        errors = [
            log_error(mine.float(), theirs)
            for mine, theirs in zip(block_outputs, block_targets, strict=True)
        ]
        loss = loss + options.block_loss * torch.stack(errors).mean()
    with student.at_timesteps(inputs["timestep"], sharing=True):
        loss.backward()
    return loss.detach()


@dataclass(frozen=True)
class _Batches:
    """The batch of each step, counted from 0 over all stages."""

    trajectories: Trajectories
    options: FinetuneOptions
    processes: Processes

    def __post_init__(self) -> None:
        if self.options.batch % (self.together * self.processes.count):
            raise InputError(
                f"the recorded samplings are guided, {self.together} rows at a step: expected a "
                f"--batch that is a multiple of {self.together * self.processes.count} "
                f"(processes: {self.processes.count}), not {self.options.batch}; or give "
                "--guidance-loss 0"
            )

    @property
    def together(self) -> int:
        """How many rows in turn are one sampling's at one step."""
        return self.trajectories.parts if self.options.guidance_loss > 0 else 1

    def share(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """This process's inputs and targets [B / processes, ...], on its device."""
        steps, rows = (self.processes.share(part) for part in self._plan(step))
        inputs, target = (
            self.trajectories.inputs(steps, rows),
            self.trajectories.output[steps, rows],
        )
        return {name: value.to(self.processes.device) for name, value in inputs.items()}, target.to(
            self.processes.device
        )

    def buckets(self, step: int, student: QuantizedModel) -> tuple[int, int]:
        """The lowest and the highest timestep bucket in the whole batch."""
        buckets = student.bucket_of(
            self.trajectories.timestep[self._plan(step)[0]].to(student.edges.device)
        )
        return int(buckets.min()), int(buckets.max())

    def _plan(self, step: int) -> tuple[Tensor, Tensor]:
        together = self.together
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + step)
        recorded, rows = self.trajectories.sample.shape[:2]
        count = self.options.batch // together
        # Evenly spread steps with a random offset: every batch sees early and late timesteps alike.
        offset = torch.rand(1, generator=generator) * recorded
        steps = (torch.arange(count) * recorded / count + offset).long() % recorded
        samplings = torch.randint(rows // together, (count,), generator=generator)
        return steps.repeat_interleave(together), (
            samplings[:, None] * together + torch.arange(together)
        ).flatten()


@dataclass(frozen=True)
class _Targets:
    """The float model's block outputs for this process's share of each step's batch."""

    stream: TargetStream
    load_teacher: Callable[[], nn.Module]
    batches: _Batches
    steps: int
    progress: Progress

    def of(self, step: int) -> list[Tensor]:
        """The block outputs at ``step``, in execution order, each [B / processes, ...]."""
        targets = self.stream.read(step)
        if targets is None:
            self._run_ahead(step)
            gc.collect()  # a module tree may hold cycles, and a float model is large
            targets = self.stream.read(step)
        if targets is None:
            raise QuestDeployError(
                f"{self.stream.path}: what was just written cannot be read back; check the disk"
            )
        return [target.to(self.batches.processes.device) for target in targets]

    @torch.no_grad()
    def _run_ahead(self, first: int) -> None:
        teacher = self.load_teacher().eval().to(self.batches.processes.device)
        with BlockOutputs(teacher) as blocks:

            def run(step: int) -> list[Tensor]:
                teacher(**self.batches.share(step)[0])
                return blocks.take()

            def computed(step: int) -> None:
                self.progress(TARGETS, step + 1, self.steps)

            self.stream.write(first, self.steps, run, computed)


def _load_state(path: Path | None, key: str, steps: int, *, logs: bool) -> TrainingState | None:
    try:
        state = TrainingState.load(path, key) if path else None
    except InputError as e:
        if logs:
            logger.warning("%s: it is ignored", e)
        return None
    if state is not None and logs:
        logger.info("resuming at step %d of %d", state.step, steps)
    return state


def _run_key(
    calibrated: Checkpoint, options: FinetuneOptions, made_from: dict[str, str | int]
) -> str:
    digest = hashlib.sha256()
    for quantizer in calibrated.quantizers.values():
        tables = (
            (quantizer.scale, quantizer.low, quantizer.channel)
            if isinstance(quantizer, ActivationQuantizerData)
            else (quantizer.scale, quantizer.zero_point)
        )
        for table in tables:
            digest.update(table.tobytes())
    for layer in calibrated.layers.values():
        digest.update(layer.weight_codes.tobytes() + layer.weight_scale.tobytes())
    return sha256_of_json(
        [__version__, calibrated.scheme.to_json(), digest.hexdigest(), asdict(options), made_from]
    )
