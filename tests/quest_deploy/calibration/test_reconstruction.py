from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quest_deploy.artifacts.checkpoint import (
    ActivationQuantizerData,
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from quest_deploy.artifacts.scheme import Granularity, Scheme
from quest_deploy.calibration import reconstruction as reconstruct_module
from quest_deploy.calibration.ptq import CalibrationOptions, RangeMethod, calibrate
from quest_deploy.calibration.reconstruction import (
    ReconstructOptions,
    _SoftRounding,
    reconstruct,
    units_of,
)
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.quantization.layers import ActivationQuantizer
from quest_deploy.quantization.model import QuantizedModel
from tests.helpers import assert_holds, refused
from tests.quest_deploy.support import flip_byte, truncate

OPTIONS = ReconstructOptions(samples=32, rounding_steps=60, scale_steps=10, batch=8)
FEW = ReconstructOptions(samples=8, rounding_steps=3, scale_steps=2, batch=4, seed=3)


def schemes() -> dict[str, Scheme]:
    return {
        "folded, 3 buckets": Scheme.parse("w4a4", buckets=3),
        "everything quantized": Scheme.parse(
            "w4a4",
            buckets=2,
            granularity=Granularity.PER_TENSOR,
            attention_bits=8,
            softmax_bits=8,
            split_shortcuts=True,
        ),
        "free channels": Scheme.parse("w4a8", buckets=2, granularity=Granularity.PER_CHANNEL),
    }


@pytest.fixture(scope="module", params=schemes().values(), ids=schemes().keys())
def start(
    request: pytest.FixtureRequest, mini_unet: nn.Module, mini_trajectories: Trajectories
) -> Checkpoint:
    return calibrate(
        "mini", mini_unet, mini_trajectories, request.param, CalibrationOptions(RangeMethod.L24)
    )


@pytest.fixture(scope="module")
def learned(start: Checkpoint, mini_unet: nn.Module, mini_trajectories: Trajectories) -> Checkpoint:
    return reconstruct(mini_unet, start, mini_trajectories, OPTIONS)


def test_every_weight_is_rounded_to_the_code_below_or_above(
    start: Checkpoint, learned: Checkpoint, mini_unet: nn.Module
) -> None:
    student = QuantizedModel.from_checkpoint(start, mini_unet)
    moved = 0
    for name, layer in student.quantized_layers().items():
        ratio = (
            (layer.weight / layer.weight_scale.view(-1, *[1] * (layer.weight.dim() - 1)))
            .detach()
            .numpy()
        )
        low, high = layer.weight_low[0].item(), layer.weight_high[0].item()
        codes = learned.layers[name].weight_codes
        assert (codes >= np.clip(np.floor(ratio), low, high)).all()
        assert (codes <= np.clip(np.floor(ratio) + 1, low, high)).all()
        moved += int((codes != start.layers[name].weight_codes).sum())
        np.testing.assert_array_equal(
            learned.layers[name].weight_scale, start.layers[name].weight_scale
        )
    assert moved


def test_the_reconstructed_model_is_nearer_to_the_float_one(
    start: Checkpoint, learned: Checkpoint, mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    def error(checkpoint: Checkpoint) -> float:
        model = QuantizedModel.from_checkpoint(checkpoint).eval()
        batches = list(mini_trajectories.batches(8))
        with torch.no_grad():
            return float(
                sum(
                    (model(**x) - mini_unet(**x, return_dict=False)[0]).square().mean()
                    for x in batches
                )
            )

    assert error(learned) < error(start)


def test_scales_are_learned_and_nothing_else_changes(
    start: Checkpoint, learned: Checkpoint
) -> None:
    assert any(
        (learned.quantizers[name].scale != quantizer.scale).any()
        for name, quantizer in start.quantizers.items()
    )
    for name, quantizer in start.quantizers.items():
        if isinstance(quantizer, ActivationQuantizerData):
            np.testing.assert_array_equal(learned.quantizers[name].low, quantizer.low)  # type: ignore[union-attr]
            np.testing.assert_array_equal(learned.quantizers[name].channel, quantizer.channel)  # type: ignore[union-attr]
    for key, value in start.floats.items():
        np.testing.assert_array_equal(learned.floats[key], value)
    assert (learned.provenance["method"], learned.provenance["range"]) == ("qdiff", "l2.4")


def test_it_is_a_checkpoint_like_any_other(learned: Checkpoint, tmp_path: object) -> None:
    path = tmp_path / "learned.safetensors"  # type: ignore[operator]
    save_checkpoint(learned, path)
    again = load_checkpoint(path)
    for name, layer in learned.layers.items():
        np.testing.assert_array_equal(again.layers[name].weight_codes, layer.weight_codes)


def differences(one: Checkpoint, other: Checkpoint) -> list[str]:
    """What reconstruction may change, where it differs."""
    codes = [
        name
        for name, layer in one.layers.items()
        if (other.layers[name].weight_codes != layer.weight_codes).any()
    ]
    return codes + [
        name
        for name, quantizer in one.quantizers.items()
        if (other.quantizers[name].scale != quantizer.scale).any()
    ]


@pytest.fixture(scope="module")
def calibrated(mini_unet: nn.Module, mini_trajectories: Trajectories) -> Checkpoint:
    return calibrate(
        "mini",
        mini_unet,
        mini_trajectories,
        schemes()["everything quantized"],
        CalibrationOptions(RangeMethod.L24),
    )


Run = "Callable[..., Checkpoint]"


@pytest.fixture(scope="module")
def run(calibrated: Checkpoint, mini_unet: nn.Module, mini_trajectories: Trajectories) -> Run:
    """Reconstruct ``calibrated``, with few steps unless it is told otherwise; tells which units
    were learned.
    """

    def reconstruct_(
        options: ReconstructOptions = FEW,
        *,
        start: Checkpoint = calibrated,
        trajectories: Trajectories = mini_trajectories,
        learned: list[str] | None = None,
        stop_after: int = 0,
        **others: Any,
    ) -> Checkpoint:
        def report(phase: str, done: int, total: int, unit: str) -> None:
            if learned is not None:
                learned.append(unit)
            if done == stop_after:
                raise KeyboardInterrupt

        return reconstruct(mini_unet, start, trajectories, options, report, **others)

    return reconstruct_


@pytest.fixture(scope="module")
def uninterrupted(run: Run) -> Checkpoint:
    return run()


def test_the_same_seed_gives_the_same_checkpoint_and_another_seed_another(
    run: Run, uninterrupted: Checkpoint
) -> None:
    assert differences(run(), uninterrupted) == []
    assert differences(run(dataclasses.replace(FEW, seed=4)), uninterrupted) != []


def test_every_layer_is_in_one_unit(start: Checkpoint, mini_unet: nn.Module) -> None:
    units = units_of(QuantizedModel.from_checkpoint(start, mini_unet))
    assert sorted(layer for unit in units.values() for layer in unit) == sorted(start.layers)
    kinds = {
        type(mini_unet.get_submodule(name)).__name__
        for name, unit in units.items()
        if len(unit) > 1
    }
    assert kinds == {"ResnetBlock2D", "BasicTransformerBlock"}
    assert all(unit == (name,) for name, unit in units.items() if name in start.layers)


def test_units_are_learned_in_the_order_in_which_the_float_model_runs_them(
    run: Run, mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    learned: list[str] = []
    run(dataclasses.replace(FEW, samples=1, rounding_steps=0, scale_steps=0), learned=learned)
    executed: list[str] = []
    hooks = [
        mini_unet.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: executed.append(name)
        )
        for name in reversed(learned)
    ]
    mini_unet(**next(mini_trajectories.batches(1)))
    for hook in hooks:
        hook.remove()
    assert learned == executed


def call_of(
    model: nn.Module, module: nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[Any, dict[str, Any], Any]:
    """What ``module`` was called with and gave while ``model`` ran."""
    calls: list[tuple[Any, dict[str, Any], Any]] = []
    hook = module.register_forward_hook(lambda module, *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    (call,) = calls
    return call


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_unit_learns_from_the_quantized_models_inputs_and_the_float_models_outputs(
    run: Run, calibrated: Checkpoint, mini_unet: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_calibrated = QuantizedModel.from_checkpoint(calibrated, mini_unet).eval()
    as_in_float, as_before = set(), set()
    record = reconstruct_module._record

    def check(
        unet: nn.Module,
        student: QuantizedModel,
        unit: str,
        trajectories: Trajectories,
        rows: Any,
        batch: int,
    ) -> Any:
        data = record(unet, student, unit, trajectories, rows, batch)
        for part in torch.arange(len(rows[0])).split(
            batch
        ):  # of other batches, floats would differ in their last bits
            inputs, found = trajectories.inputs(rows[0][part], rows[1][part]), data.take(part)
            args, kwargs, _ = call_of(student, student.model.get_submodule(unit), inputs)
            assert len(found.args) == len(args)
            assert all(same(*pair) for pair in zip(found.args, args, strict=True))
            assert found.kwargs.keys() == kwargs.keys()
            assert all(same(found.kwargs[name], value) for name, value in kwargs.items())
            assert torch.equal(found.timesteps, inputs["timestep"])
            float_args, _, target = call_of(unet, unet.get_submodule(unit), inputs)
            assert torch.equal(found.targets, target)
            if torch.equal(found.args[0], float_args[0]):
                as_in_float.add(unit)
            if torch.equal(
                found.args[0],
                call_of(as_calibrated, as_calibrated.model.get_submodule(unit), inputs)[0][0],
            ):
                as_before.add(unit)
        return data

    monkeypatch.setattr(reconstruct_module, "_record", check)
    run()
    assert as_in_float == as_before == {"conv_in", "time_embedding.linear_1"}


def test_activations_are_in_float_while_the_rounding_is_learned_and_quantized_while_their_scales_are(
    run: Run, calibrated: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied: dict[str, set[str]] = {"_learn_rounding": set(), "_learn_scales": set()}
    for phase, names in applied.items():
        learn = getattr(reconstruct_module, phase)

        def watched(
            student: QuantizedModel, *rest: Any, learn: Any = learn, names: set[str] = names
        ) -> None:
            by_id = {
                id(quantizer): name for name, quantizer in student.activation_quantizers().items()
            }
            quantize = ActivationQuantizer.forward
            with monkeypatch.context() as patch:
                patch.setattr(
                    ActivationQuantizer,
                    "forward",
                    lambda site, x: names.add(by_id[id(site)]) or quantize(site, x),
                )
                learn(student, *rest)

        monkeypatch.setattr(reconstruct_module, phase, watched)
    run()
    assert applied == {"_learn_rounding": set(), "_learn_scales": set(calibrated.quantizers)}


def test_an_interrupted_run_resumes_unit_by_unit_to_the_same_result(
    run: Run, uninterrupted: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learned: list[str] = []
    caplog.set_level(logging.INFO)
    state = {"state_path": tmp_path / "state", "learned": learned}
    for done in (1, 2, 7):
        with pytest.raises(KeyboardInterrupt):
            run(**state, stop_after=done)
    resumed = run(**state)
    everything: list[str] = []
    again = run(**{**state, "learned": everything})
    units = len(learned)
    assert units == len(set(learned))
    assert everything == []
    assert [re.findall(r"\d+", said) for said in caplog.messages] == [
        [str(done), str(units)] for done in (1, 2, 7, units)
    ]
    for checkpoint in (resumed, again):
        assert differences(checkpoint, uninterrupted) == []
        assert checkpoint.provenance == uninterrupted.provenance


def test_a_run_that_is_interrupted_within_a_unit_learns_it_from_its_beginning(
    run: Run, uninterrupted: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(state_path=tmp_path, stop_after=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reconstruct_module, "_learn_scales", interrupt)
        run(state_path=tmp_path)
    assert differences(run(state_path=tmp_path), uninterrupted) == []


@pytest.mark.parametrize("what", ["options", "trajectories", "scales", "codes"])
def test_a_state_of_another_run_is_ignored(
    run: Run,
    calibrated: Checkpoint,
    mini_trajectories: Trajectories,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(state_path=tmp_path, stop_after=2)
    quantizer, layer = calibrated.quantizers["conv_in"], calibrated.layers["conv_in"]
    other_quantizer = dataclasses.replace(quantizer, scale=quantizer.scale * np.float32(1.1))
    other_layer = dataclasses.replace(
        layer, codes=np.clip(layer.weight_codes + 1, -127, 127).astype(np.int8)
    )
    changes: dict[str, dict[str, Any]] = {
        "options": {"options": dataclasses.replace(FEW, seed=4)},
        "trajectories": {
            "trajectories": dataclasses.replace(
                mini_trajectories, sample=mini_trajectories.sample + 1e-3
            )
        },
        "scales": {
            "start": dataclasses.replace(
                calibrated, quantizers={**calibrated.quantizers, "conv_in": other_quantizer}
            )
        },
        "codes": {
            "start": dataclasses.replace(
                calibrated, layers={**calibrated.layers, "conv_in": other_layer}
            )
        },
    }
    learned: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(**changes[what], state_path=tmp_path, learned=learned, stop_after=1)
    assert len(learned) == 1
    (said,) = caplog.records
    assert (said.levelname, str(tmp_path / "unit-0.pt") in said.getMessage()) == ("WARNING", True)


@pytest.mark.parametrize(
    "damage",
    [flip_byte, truncate, lambda path: path.write_bytes(b"")],
    ids=["edited", "truncated", "empty"],
)
def test_a_damaged_unit_is_learned_again(
    run: Run,
    uninterrupted: Checkpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], Any],
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(state_path=tmp_path, stop_after=3)
    damage(tmp_path / "unit-1.pt")
    caplog.set_level(logging.INFO)
    assert differences(run(state_path=tmp_path), uninterrupted) == []
    units = len(list(tmp_path.iterdir()))
    ignored, resumed = caplog.records
    assert (ignored.levelname, str(tmp_path / "unit-1.pt") in ignored.getMessage()) == (
        "WARNING",
        True,
    )
    assert_holds(resumed.getMessage(), f"unit 1 of {units}")


def test_no_steps_leave_the_codes_and_scales_alone(
    start: Checkpoint, mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    same = reconstruct(
        mini_unet,
        start,
        mini_trajectories,
        ReconstructOptions(samples=4, rounding_steps=0, scale_steps=0, batch=4),
    )
    for name, layer in start.layers.items():
        np.testing.assert_array_equal(same.layers[name].weight_codes, layer.weight_codes)
    for name, quantizer in start.quantizers.items():
        np.testing.assert_array_equal(same.quantizers[name].scale, quantizer.scale)


def test_soft_rounding_starts_at_the_float_weight_inside_the_range(
    start: Checkpoint, mini_unet: nn.Module
) -> None:
    layer = next(iter(QuantizedModel.from_checkpoint(start, mini_unet).quantized_layers().values()))
    soft = _SoftRounding(layer)
    weight = torch.clamp(soft.floor + soft.share_up(), soft.low, soft.high) * soft.scale
    inside = (layer.weight / soft.scale >= soft.low) & (layer.weight / soft.scale <= soft.high)
    torch.testing.assert_close(weight[inside], layer.weight[inside], rtol=1e-4, atol=1e-6)


def test_undecided_weights_cost_and_decided_ones_do_not(
    start: Checkpoint, mini_unet: nn.Module
) -> None:
    soft = _SoftRounding(
        next(iter(QuantizedModel.from_checkpoint(start, mini_unet).quantized_layers().values()))
    )
    with torch.no_grad():
        soft.alpha.fill_(0.0)
        assert soft.undecided(2.0).item() == pytest.approx(soft.alpha.numel())
        soft.alpha.fill_(9.0)
        assert soft.undecided(20.0).item() == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"batch": 0}, {"rounding_steps": -1}, {"scale_steps": -1}]
)
def test_impossible_options_are_refused(wrong: dict[str, int]) -> None:
    with refused("reconstruction"):
        ReconstructOptions(**wrong)  # type: ignore[arg-type]
