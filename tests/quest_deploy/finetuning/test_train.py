from __future__ import annotations

import copy
import dataclasses
import logging
import re
import weakref
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from quest_deploy.artifacts.checkpoint import Checkpoint, PerChannelQuantizerData
from quest_deploy.artifacts.scheme import Granularity, Scheme
from quest_deploy.calibration.ptq import CalibrationOptions, calibrate
from quest_deploy.calibration.training_state import TrainingState
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.errors import InputError
from quest_deploy.finetuning.block_outputs import BlockOutputs
from quest_deploy.finetuning.distributed import Processes
from quest_deploy.finetuning.gradient_checkpointing import enable_gradient_checkpointing
from quest_deploy.finetuning.layer_sets import LAYER_SETS, select_layers
from quest_deploy.finetuning.train import (
    TARGETS,
    FinetuneOptions,
    Step,
    _backward,
    _Batches,
    finetune,
    guidance_error,
)
from quest_deploy.quantization import layers as layers_module
from quest_deploy.quantization.layers import ActivationQuantizer
from quest_deploy.quantization.model import QuantizedModel
from tests.helpers import refused
from tests.quest_deploy.support import flip_byte, truncate

FAMILY = "class-conditional"
OPTIONS = FinetuneOptions(
    FAMILY, temporal_steps=3, sensitive_steps=5, batch=6, weight_rate=1e-2, scale_rate=1e-2
)
"""Few steps at high rates, so that codes change."""
Train = "Callable[..., Checkpoint]"


class StopError(Exception):
    """What interrupts a run."""


@pytest.fixture(scope="module")
def train(
    mini_unet: nn.Module, mini_checkpoint: Checkpoint, mini_trajectories: Trajectories
) -> Train:
    return partial(finetune, lambda: mini_unet, mini_checkpoint, mini_trajectories)


@pytest.fixture(scope="module")
def uninterrupted(train: Train) -> Checkpoint:
    return train(OPTIONS)


def interrupt(
    train: Train, step: int, options: FinetuneOptions = OPTIONS, *, save_every: int = 1, **more: Any
) -> None:
    """Start a run, and interrupt it after ``step``."""

    def stop(reached: Step) -> None:
        if reached.step == step:
            raise StopError

    with pytest.raises(StopError):
        train(options, save_every=save_every, on_step=stop, **more)


def steps_of(train: Train, options: FinetuneOptions = OPTIONS, **more: Any) -> list[int]:
    """The steps that a run does."""
    seen: list[int] = []
    train(options, on_step=lambda p: seen.append(p.step), **more)
    return seen


def learned(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    """Everything that finetuning may change, by name."""
    for layer in checkpoint.layers.values():
        yield f"{layer.name} codes", layer.weight_codes
        yield f"{layer.name} weight scale", layer.weight_scale
        if layer.bias is not None:
            yield f"{layer.name} bias", layer.bias
    for quantizer in checkpoint.quantizers.values():
        for table in (
            ("scale", "zero_point")
            if isinstance(quantizer, PerChannelQuantizerData)
            else ("scale", "low", "high", "channel")
        ):
            yield f"{quantizer.name} {table}", getattr(quantizer, table)


def differences(one: Checkpoint, other: Checkpoint) -> list[str]:
    return [
        name
        for (name, a), (_, b) in zip(learned(one), learned(other), strict=True)
        if not np.array_equal(a, b)
    ]


def changed_layers(one: Checkpoint, other: Checkpoint) -> set[str]:
    return {
        name.rsplit(" ", 1)[0]
        for name in differences(one, other)
        if name.endswith((" codes", " bias"))
    }


def log_error(checkpoint: Checkpoint, trajectories: Trajectories) -> float:
    """The mean logarithm of the deployed model's relative squared error over all recorded steps."""
    model = QuantizedModel.from_checkpoint(checkpoint).eval()
    steps, samples = trajectories.sample.shape[:2]
    rows = torch.arange(steps * samples)
    with torch.no_grad():
        output = model(**trajectories.inputs(rows // samples, rows % samples)).flatten(1)
    target = trajectories.output.flatten(0, 1).flatten(1)
    return float(((output - target).square().sum(1) / target.square().sum(1)).log().mean())


@pytest.mark.parametrize("save_every", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "step", [3, 7, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 2, 4))]
)
def test_an_interrupted_run_resumes_to_the_same_result_bit_for_bit(
    train: Train,
    uninterrupted: Checkpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    step: int,
    save_every: int,
) -> None:
    caplog.set_level(logging.INFO)
    state = tmp_path / "state.pt"
    interrupt(train, step, state_path=state, save_every=save_every)
    seen: list[int] = []
    resumed = train(
        OPTIONS,
        state_path=state,
        save_every=save_every,
        on_step=lambda p: seen.append(p.step),
    )
    done = step // save_every * save_every
    assert seen == list(range(done + 1, 9))
    assert [re.findall(r"\d+", said) for said in caplog.messages] == [[str(done), "8"]] * bool(done)
    assert differences(resumed, uninterrupted) == []
    assert resumed.provenance == uninterrupted.provenance


def test_a_run_that_is_interrupted_twice_ends_the_same(
    train: Train, uninterrupted: Checkpoint, tmp_path: Path
) -> None:
    state = tmp_path / "state.pt"
    for step in (2, 6):
        interrupt(train, step, state_path=state)
    assert differences(train(OPTIONS, state_path=state), uninterrupted) == []


def test_free_channels_are_learned_and_resume_like_any_others(
    mini_unet: nn.Module, mini_trajectories: Trajectories, tmp_path: Path
) -> None:
    scheme = Scheme.parse("w4a4", buckets=3, granularity=Granularity.PER_CHANNEL)
    start = calibrate("mini", mini_unet, mini_trajectories, scheme, CalibrationOptions())
    options = dataclasses.replace(OPTIONS, scale_rate=0.3)
    run = partial(finetune, lambda: mini_unet, start, mini_trajectories)
    uninterrupted = run(options)
    for table in ("scale", "zero_point"):
        moved = [
            getattr(uninterrupted.quantizers[name], table) != getattr(quantizer, table)
            for name, quantizer in start.quantizers.items()
        ]
        assert np.concatenate(moved, 1).any(1).all()
    interrupt(run, 5, options, state_path=tmp_path / "state.pt")
    seen: list[int] = []
    resumed = run(options, state_path=tmp_path / "state.pt", on_step=lambda p: seen.append(p.step))
    assert differences(resumed, uninterrupted) == []
    assert seen == [6, 7, 8]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"batch": 4},
                {"weight_rate": 1e-3},
                {"sensitive_steps": 6},
                {"temporal_steps": 2, "sensitive_steps": 6},
            )
        ),
    ],
)
def test_a_state_of_other_options_is_ignored(
    train: Train, tmp_path: Path, changes: dict[str, Any]
) -> None:
    state, options = tmp_path / "state.pt", dataclasses.replace(OPTIONS, **changes)
    interrupt(train, 4, state_path=state)
    assert steps_of(train, options, state_path=state)[0] == 1


def test_a_state_of_another_calibration_is_ignored(
    mini_unet: nn.Module,
    mini_checkpoint: Checkpoint,
    mini_trajectories: Trajectories,
    train: Train,
    tmp_path: Path,
) -> None:
    state = tmp_path / "state.pt"
    interrupt(train, 4, state_path=state)
    quantizer = mini_checkpoint.quantizers["conv_in"]
    quantizers = {
        **mini_checkpoint.quantizers,
        "conv_in": dataclasses.replace(quantizer, scale=quantizer.scale * np.float32(1.1)),
    }
    other = dataclasses.replace(mini_checkpoint, quantizers=quantizers)
    train_other = partial(finetune, lambda: mini_unet, other, mini_trajectories)
    assert steps_of(train_other, state_path=state)[0] == 1


def change_a_tensor(state: Path) -> None:
    """Change one bit of the largest tensor; a flip anywhere may hit the padding between tensors."""
    with zipfile.ZipFile(state) as archive:
        largest = archive.read(max(archive.infolist(), key=lambda part: part.file_size))
    content = bytearray(state.read_bytes())
    content[content.index(largest) + len(largest) // 2] ^= 1
    state.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [change_a_tensor, truncate, lambda path: path.write_bytes(b"")],
    ids=["edited", "truncated", "empty"],
)
def test_a_damaged_state_is_ignored(
    train: Train,
    uninterrupted: Checkpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], Any],
) -> None:
    state = tmp_path / "state.pt"
    interrupt(train, 4, state_path=state)
    damage(state)
    assert differences(train(OPTIONS, state_path=state), uninterrupted) == []
    assert [(x.levelname, str(state) in x.getMessage()) for x in caplog.records] == [
        ("WARNING", True)
    ]


def test_every_changed_part_of_a_state_is_noticed(train: Train, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    interrupt(train, 4, state_path=state)
    key = torch.load(state, weights_only=True)["key"]
    expected, content = TrainingState.load(state, key), state.read_bytes()
    assert expected is not None
    for position in range(50, len(content), len(content) // 40):
        damaged = bytearray(content)
        damaged[position] ^= 16
        state.write_bytes(damaged)
        try:
            found = TrainingState.load(state, key)
        except InputError:
            continue
        # What is left is padding between the file's parts.
        assert found is not None
        assert all(torch.equal(found.model[name], value) for name, value in expected.model.items())


@pytest.mark.parametrize(
    "content",
    [{}, [1], {"key": "a", "step": 1, "model": {}, "optimizer": {}}, {"key": "a", "other": 1}],
)
def test_a_state_that_is_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "state.pt")
    with refused(tmp_path / "state.pt"):
        TrainingState.load(tmp_path / "state.pt", "another key")


def test_there_may_be_no_state(tmp_path: Path) -> None:
    assert TrainingState.load(tmp_path / "state.pt", "key") is None


def test_only_the_layer_sets_weights_change(
    mini_checkpoint: Checkpoint, uninterrupted: Checkpoint
) -> None:
    sets = LAYER_SETS[FAMILY]
    temporal, sensitive = (
        set(select_layers(mini_checkpoint.layers, patterns))
        for patterns in (sets.temporal, sets.sensitive)
    )
    changed = changed_layers(mini_checkpoint, uninterrupted)
    assert changed <= temporal | sensitive
    assert changed & temporal
    assert changed & sensitive


def test_the_first_stage_changes_the_temporal_layers_and_their_quantizers_alone(
    train: Train, mini_checkpoint: Checkpoint
) -> None:
    temporal = set(select_layers(mini_checkpoint.layers, LAYER_SETS[FAMILY].temporal))
    tuned = train(dataclasses.replace(OPTIONS, sensitive_steps=0))
    changed = changed_layers(mini_checkpoint, tuned)
    assert changed
    assert changed <= temporal
    quantizers = {
        name.rsplit(" ", 1)[0]
        for name in differences(mini_checkpoint, tuned)
        if name.endswith((" scale", " low", " high"))
    }
    quantizers -= {f"{layer} weight" for layer in mini_checkpoint.layers}
    assert quantizers == {mini_checkpoint.quantizer_of(layer).name for layer in temporal}


def test_scales_change_in_every_bucket_and_stay_positive(
    mini_checkpoint: Checkpoint, uninterrupted: Checkpoint
) -> None:
    moved = np.zeros(3, bool)
    for name, quantizer in uninterrupted.quantizers.items():
        assert (quantizer.scale > 0).all()
        moved |= quantizer.scale != mini_checkpoint.quantizers[name].scale
    assert moved.all()


def test_clip_bounds_stay_those_of_their_bits(uninterrupted: Checkpoint) -> None:
    for quantizer in uninterrupted.quantizers.values():
        assert ((quantizer.high - quantizer.low) == (254 if quantizer.bits == 8 else 15)).all()
        assert (quantizer.low <= 0).all()
        assert (quantizer.high >= 0).all()


def test_neither_the_float_model_nor_the_calibrated_checkpoint_changes(
    mini_unet: nn.Module, mini_checkpoint: Checkpoint, mini_trajectories: Trajectories
) -> None:
    before = {name: value.clone() for name, value in mini_unet.state_dict().items()}
    codes = {name: layer.weight_codes.copy() for name, layer in mini_checkpoint.layers.items()}
    finetune(lambda: mini_unet, mini_checkpoint, mini_trajectories, OPTIONS)
    assert all(torch.equal(value, before[name]) for name, value in mini_unet.state_dict().items())
    assert all(
        np.array_equal(layer.weight_codes, codes[name])
        for name, layer in mini_checkpoint.layers.items()
    )


def test_finetuning_brings_the_quantized_model_closer_to_the_float_one(
    train: Train, mini_checkpoint: Checkpoint, mini_trajectories: Trajectories
) -> None:
    options = FinetuneOptions(
        FAMILY, temporal_steps=5, sensitive_steps=45, batch=12, weight_rate=3e-3, scale_rate=1e-3
    )
    losses: list[float] = []
    tuned = train(options, on_step=lambda progress: losses.append(progress.loss))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert log_error(tuned, mini_trajectories) < log_error(mini_checkpoint, mini_trajectories) - 0.1


def test_without_steps_the_checkpoint_is_the_calibrated_one(
    train: Train, mini_checkpoint: Checkpoint
) -> None:
    kept = train(dataclasses.replace(OPTIONS, temporal_steps=0, sensitive_steps=0))
    assert differences(kept, mini_checkpoint) == []


def test_the_checkpoint_records_how_it_came_to_be(uninterrupted: Checkpoint) -> None:
    assert (uninterrupted.provenance["method"], uninterrupted.provenance["start"]) == (
        "quest",
        "ptq",
    )
    assert uninterrupted.provenance["temporal_steps"] == 3


def test_progress_tells_both_stages_step_by_step(train: Train) -> None:
    seen: list[Step] = []
    train(dataclasses.replace(OPTIONS, temporal_steps=1, sensitive_steps=2), on_step=seen.append)
    assert [(p.step, p.steps) for p in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[0].stage != seen[1].stage == seen[2].stage
    assert all(np.isfinite(p.loss) for p in seen)
    assert {p.buckets for p in seen} == {(0, 2)}


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"family": "video"}, "'video'"),
        ({"batch": 0}, "finetuning batch step"),
        ({"temporal_steps": -1}, "finetuning batch step"),
        ({"sensitive_steps": -1}, "finetuning batch step"),
        ({"stages": ()}, "stages temporal sensitive"),
        ({"stages": ("temporal", "temporal")}, "stages temporal"),
        ({"stages": ("spatial",)}, "stages 'spatial'"),
        ({"output_loss": 0.0, "block_loss": 0.0}, "loss"),
        ({"block_loss": -1.0}, "loss"),
        ({"guidance_loss": -1.0}, "loss"),
        ({"guidance_loss": float("inf")}, "loss"),
        ({"output_loss": float("nan")}, "loss"),
        ({"precision": "fp8"}, "'fp8' float32 bf16"),
    ],
)
def test_options_that_cannot_work_are_input_errors(changes: dict[str, Any], facts: str) -> None:
    with refused(*facts.split()):
        FinetuneOptions(**{"family": FAMILY, **changes})


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("gain", [0.5, 1.0, 1.5])
def test_the_guidance_error_is_of_the_length_of_the_differences_alone(
    parts: int, gain: float
) -> None:
    target = torch.randn(4, parts, 3, 5, 5)
    common = torch.randn(4, 1, 3, 5, 5)
    error = guidance_error(
        (common + gain * target).flatten(0, 1), target.flatten(0, 1), parts
    ).item()
    assert error == pytest.approx((gain - 1) ** 2, abs=1e-5)


def test_rows_that_guidance_does_not_tell_apart_have_no_guidance_error() -> None:
    target = torch.randn(3, 1, 2, 4, 4).expand(3, 2, 2, 4, 4).flatten(0, 1)
    output = torch.randn(6, 2, 4, 4, requires_grad=True)
    error = guidance_error(output, target, 2)
    error.backward()
    assert error.item() == 0
    assert output.grad is not None
    assert not output.grad.any()


def test_a_batch_of_guided_samplings_holds_their_parts_at_the_same_step(
    mini_trajectories: Trajectories,
) -> None:
    guided = dataclasses.replace(mini_trajectories, parts=2)
    options = dataclasses.replace(OPTIONS, guidance_loss=1.0)
    with Processes("cpu", options.batch) as processes:
        batches = _Batches(guided, options, processes)
        seen = []
        for step in range(20):
            steps, rows = (x.unflatten(0, (-1, 2)) for x in batches._plan(step))
            assert (steps[:, 0] == steps[:, 1]).all()
            assert (rows[:, 0] % 2 == 0).all()
            assert (rows[:, 1] == rows[:, 0] + 1).all()
            seen += rows.flatten().tolist()
        assert set(seen) == set(range(guided.sample.shape[1]))
        with refused("--batch", "2", "5"):
            _Batches(guided, dataclasses.replace(options, batch=5), processes)


def test_the_guidance_loss_shapes_the_result_where_samplings_are_guided_alone(
    mini_unet: nn.Module,
    mini_checkpoint: Checkpoint,
    mini_trajectories: Trajectories,
    uninterrupted: Checkpoint,
) -> None:
    options = dataclasses.replace(OPTIONS, guidance_loss=10.0)
    guided = dataclasses.replace(mini_trajectories, parts=2)
    unguided, with_loss = (
        finetune(lambda: mini_unet, mini_checkpoint, recorded, options)
        for recorded in (mini_trajectories, guided)
    )
    assert not differences(unguided, uninterrupted)
    assert differences(with_loss, uninterrupted)


def test_one_stage_alone_runs_its_own_steps_on_its_own_layers(
    train: Train, mini_checkpoint: Checkpoint
) -> None:
    seen: list[Step] = []
    tuned = train(dataclasses.replace(OPTIONS, stages=("sensitive",)), on_step=seen.append)
    assert [(p.stage, p.step, p.steps) for p in seen] == [
        ("sensitive", step, 5) for step in range(1, 6)
    ]
    assert changed_layers(mini_checkpoint, tuned) <= set(
        select_layers(mini_checkpoint.layers, LAYER_SETS[FAMILY].sensitive)
    )
    alone = train(dataclasses.replace(OPTIONS, stages=("temporal",)))
    assert differences(alone, train(dataclasses.replace(OPTIONS, sensitive_steps=0))) == []


def test_reversed_stages_run_in_that_order_and_resume_like_any_other(
    train: Train, uninterrupted: Checkpoint, tmp_path: Path
) -> None:
    options, seen = dataclasses.replace(OPTIONS, stages=("sensitive", "temporal")), list[Step]()
    reversed_ = train(options, on_step=seen.append)
    assert [p.stage for p in seen] == ["sensitive"] * 5 + ["temporal"] * 3
    assert differences(reversed_, uninterrupted) != []
    for step in (5, 7):
        interrupt(train, step, options, state_path=tmp_path / "state.pt")
    assert differences(train(options, state_path=tmp_path / "state.pt"), reversed_) == []


def test_given_patterns_replace_the_familys(train: Train, mini_checkpoint: Checkpoint) -> None:
    options = dataclasses.replace(
        OPTIONS, temporal_layers=("time_embedding.*",), sensitive_layers=("conv_in", "*.conv1")
    )
    changed = changed_layers(mini_checkpoint, train(options))
    expected = set(
        select_layers(mini_checkpoint.layers, ("time_embedding.*", "conv_in", "*.conv1"))
    )
    assert changed <= expected
    assert {name.partition(".")[0] for name in changed} >= {"time_embedding", "conv_in"}


def test_all_layers_may_be_trained(train: Train, mini_checkpoint: Checkpoint) -> None:
    tuned = train(dataclasses.replace(OPTIONS, sensitive_layers=("*",), sensitive_steps=10))
    assert len(changed_layers(mini_checkpoint, tuned)) > 0.9 * len(mini_checkpoint.layers)


def test_the_losses_count_as_much_as_they_are_said_to(train: Train) -> None:
    def first_loss(output: float, block: float) -> float:
        losses: list[float] = []
        options = dataclasses.replace(
            OPTIONS, output_loss=output, block_loss=block, temporal_steps=1, sensitive_steps=0
        )
        train(options, on_step=lambda progress: losses.append(progress.loss))
        return losses[0]

    output, block = first_loss(1.0, 0.0), first_loss(0.0, 1.0)
    assert output != pytest.approx(block, rel=1e-2)
    assert first_loss(0.5, 3.0) == pytest.approx(0.5 * output + 3.0 * block, rel=1e-5)


@pytest.mark.parametrize("attention_bits", [None, 8])
def test_checkpointing_gives_the_gradients_of_a_plain_backward_pass(
    mini_unet: nn.Module, mini_trajectories: Trajectories, attention_bits: int | None
) -> None:
    scheme = Scheme.parse(
        "w4a4",
        buckets=3,
        attention_bits=attention_bits,
        softmax_bits=attention_bits,
        split_shortcuts=True,
    )
    checkpoint = calibrate("mini", mini_unet, mini_trajectories, scheme, CalibrationOptions())
    steps, rows = torch.arange(6), torch.arange(6) % 4
    inputs, target = mini_trajectories.inputs(steps, rows), mini_trajectories.output[steps, rows]
    with BlockOutputs(mini_unet) as blocks:
        mini_unet(**inputs)
        block_targets = blocks.take()
    found = []
    for checkpointing in (False, True):
        student = QuantizedModel.from_checkpoint(checkpoint, mini_unet).eval().requires_grad_(True)
        if checkpointing:
            enable_gradient_checkpointing(student.model)
        loss = _backward(
            student, inputs, target, block_targets, dataclasses.replace(OPTIONS, block_loss=1.0)
        )
        found.append((loss, {name: p.grad for name, p in student.named_parameters()}))
        with refused("QuantizedModel", error=RuntimeError):
            student.bucket_state.get()
    (loss, plain), (again, checkpointed) = found
    assert again == loss
    assert len([grad for grad in plain.values() if grad is not None]) > 100
    for name, grad in plain.items():
        if grad is None:
            assert checkpointed[name] is None
        else:
            assert torch.allclose(
                checkpointed[name], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max())
            ), name


def test_checkpointed_attention_holds_the_scores_of_one_head_at_a_time(
    mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    scheme = Scheme.parse("w4a4", buckets=3, attention_bits=8, softmax_bits=8)
    checkpoint = calibrate("mini", mini_unet, mini_trajectories, scheme, CalibrationOptions())
    student = QuantizedModel.from_checkpoint(checkpoint, mini_unet).eval().requires_grad_(True)
    enable_gradient_checkpointing(student.model)
    shapes: set[torch.Size] = set()
    for product in student.quantized_matmuls().values():
        product.register_forward_hook(lambda module, args, output: shapes.add(args[0].shape[:2]))
    student(**next(mini_trajectories.batches(4)))
    assert shapes == {(4, 1)}


def test_checkpointing_runs_the_blocks_again_and_ends_at_the_same_result(
    train: Train, uninterrupted: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = ResnetBlock2D.forward
    monkeypatch.setattr(
        ResnetBlock2D,
        "forward",
        lambda *args, **kwargs: calls.append(torch.is_grad_enabled()) or forward(*args, **kwargs),
    )
    tuned = train(OPTIONS, gradient_checkpointing=True)
    blocks = 3
    assert sum(calls) == 2 * blocks * OPTIONS.steps
    tables = [
        (a, b)
        for (name, a), (_, b) in zip(learned(tuned), learned(uninterrupted), strict=True)
        if name.endswith(" scale")
    ]
    assert all(np.allclose(a, b, rtol=1e-4) for a, b in tables)


def test_the_float_layers_compute_in_bf16_and_the_quantizers_in_float32(
    train: Train, uninterrupted: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[torch.dtype, torch.dtype]] = set()
    quantize = ActivationQuantizer.forward

    def record(quantizer: ActivationQuantizer, x: torch.Tensor) -> torch.Tensor:
        quantized = quantize(quantizer, x)
        seen.add((x.dtype, quantized.dtype))
        return quantized

    monkeypatch.setattr(ActivationQuantizer, "forward", record)
    losses: list[float] = []
    tuned = train(
        dataclasses.replace(OPTIONS, precision="bf16"),
        on_step=lambda progress: losses.append(progress.loss),
    )
    assert {x for x, _ in seen} == {torch.float32, torch.bfloat16}
    assert {quantized for _, quantized in seen} == {torch.float32}
    plain: list[float] = []
    train(OPTIONS, on_step=lambda progress: plain.append(progress.loss))
    assert losses != plain
    assert losses[0] == pytest.approx(plain[0], abs=0.3)
    assert all(quantizer.scale.dtype == np.float32 for quantizer in tuned.quantizers.values())


def test_layers_that_no_stage_trains_are_rounded_once_and_hold_no_gradient(
    train: Train, mini_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded: list[torch.Tensor] = []
    quantize = layers_module.fake_quantize_weight
    monkeypatch.setattr(
        layers_module,
        "fake_quantize_weight",
        lambda weight, *rest: rounded.append(weight) or quantize(weight, *rest),
    )
    train(OPTIONS)
    sets = LAYER_SETS[FAMILY]
    trained = len(select_layers(mini_checkpoint.layers, sets.temporal + sets.sensitive))
    assert len(rounded) == len(mini_checkpoint.layers) - trained + trained * OPTIONS.steps


def test_a_frozen_layer_computes_and_stores_what_it_did_before(
    mini_unet: nn.Module, mini_checkpoint: Checkpoint, mini_trajectories: Trajectories
) -> None:
    student = QuantizedModel.from_checkpoint(mini_checkpoint, mini_unet).eval()
    inputs = next(mini_trajectories.batches(4))
    with torch.no_grad():
        before = student(**inputs)
        for layer in student.quantized_layers().values():
            layer.freeze()
        assert torch.equal(student(**inputs), before)
    assert differences(student.to_checkpoint({}), mini_checkpoint) == []


class Teacher:
    """Loads a fresh copy of the float model at each call, and tells how many of them are in
    memory.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.loaded: list[weakref.ref[nn.Module]] = []

    def __call__(self) -> nn.Module:
        unet = copy.deepcopy(self.unet)
        self.loaded.append(weakref.ref(unet))
        return unet

    @property
    def in_memory(self) -> int:
        return sum(reference() is not None for reference in self.loaded)


@pytest.fixture(scope="module")
def train_by(mini_checkpoint: Checkpoint, mini_trajectories: Trajectories) -> Train:
    """As ``train``, with a teacher of one's own."""
    return lambda teacher, *options, **more: finetune(
        teacher, mini_checkpoint, mini_trajectories, *options, **more
    )


def test_the_float_model_is_gone_while_the_student_trains(
    mini_unet: nn.Module, train_by: Train
) -> None:
    teacher, held = Teacher(mini_unet), list[int]()
    train_by(teacher, OPTIONS, on_step=lambda progress: held.append(teacher.in_memory))
    assert held == [0] * 8
    assert len(teacher.loaded) == 2


def test_a_cache_that_holds_one_step_gives_the_same_result_with_more_loads(
    mini_unet: nn.Module, train_by: Train, uninterrupted: Checkpoint
) -> None:
    teacher = Teacher(mini_unet)
    tuned = train_by(teacher, OPTIONS, target_cache=0)
    assert differences(tuned, uninterrupted) == []
    assert len(teacher.loaded) == 1 + 8


def test_a_loss_without_blocks_needs_no_targets(mini_unet: nn.Module, train_by: Train) -> None:
    teacher = Teacher(mini_unet)
    train_by(teacher, dataclasses.replace(OPTIONS, block_loss=0.0))
    assert len(teacher.loaded) == 1


def test_an_interrupted_runs_targets_are_used_again_and_removed_at_the_end(
    mini_unet: nn.Module,
    train: Train,
    train_by: Train,
    uninterrupted: Checkpoint,
    tmp_path: Path,
) -> None:
    paths = {"state_path": tmp_path / "state.pt", "targets_path": tmp_path / "targets.bin"}
    interrupt(train, 4, **paths)
    again = Teacher(mini_unet)
    assert differences(train_by(again, OPTIONS, save_every=1, **paths), uninterrupted) == []
    assert len(again.loaded) == 1
    assert not paths["targets_path"].exists()


def test_targets_that_an_interrupted_run_of_more_processes_left_are_removed_once_every_process_is_done(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, other = tmp_path / "targets.bin.1", tmp_path / "other.bin.1"
    for path in (left, other):
        path.touch()
    leave, at_exit = Processes.__exit__, list[bool]()
    monkeypatch.setattr(
        Processes, "__exit__", lambda *arguments: at_exit.append(left.exists()) or leave(*arguments)
    )
    train(OPTIONS, targets_path=tmp_path / "targets.bin")
    assert at_exit == [True]  # where it waits for the others, who may still read theirs
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize(
    "what",
    [
        "teacher",
        *(pytest.param(what, marks=pytest.mark.slow) for what in ("trajectories", "seed", "batch")),
    ],
)
def test_targets_that_something_else_made_are_never_used(
    mini_unet: nn.Module,
    mini_checkpoint: Checkpoint,
    mini_trajectories: Trajectories,
    train: Train,
    tmp_path: Path,
    what: str,
) -> None:
    unet, trajectories, options, targets = (
        mini_unet,
        mini_trajectories,
        OPTIONS,
        tmp_path / "targets.bin",
    )
    if what == "teacher":
        unet = copy.deepcopy(mini_unet)
        unet.conv_out.bias.add_(1e-3)
    elif what == "trajectories":
        trajectories = dataclasses.replace(
            mini_trajectories, sample=mini_trajectories.sample + 1e-3
        )
    else:
        options = dataclasses.replace(OPTIONS, **{what: 4})
    expected = finetune(lambda: unet, mini_checkpoint, trajectories, options)
    interrupt(train, 1, targets_path=targets)
    assert targets.exists()
    teacher = Teacher(unet)
    tuned = finetune(teacher, mini_checkpoint, trajectories, options, targets_path=targets)
    assert differences(tuned, expected) == []
    assert len(teacher.loaded) == 2


@pytest.mark.parametrize("damage", [flip_byte, truncate], ids=["edited", "truncated"])
def test_damaged_targets_are_computed_again(
    train: Train, uninterrupted: Checkpoint, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    targets = tmp_path / "targets.bin"
    interrupt(train, 1, targets_path=targets)
    damage(targets)
    computed: list[int] = []

    def progress(phase: str, done: int, total: int, detail: str = "") -> None:
        if phase == TARGETS:
            computed.append(done)

    again = train(OPTIONS, targets_path=targets, progress=progress)
    assert differences(again, uninterrupted) == []
    assert computed == [4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("device", "facts"),
    [("tpu", "'tpu' cpu cuda"), ("cuda", "--device cuda cpu")],
)
def test_a_device_that_is_not_there_is_an_input_error(
    train: Train, monkeypatch: pytest.MonkeyPatch, device: str, facts: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused(*facts.split()):
        train(OPTIONS, device=device)
