from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from quest_deploy.errors import InputError
from quest_deploy.finetune.layer_sets import LAYER_SETS, select_layers
from quest_deploy.finetune.train import FinetuneOptions, Progress, TrainingState, finetune
from quest_deploy.quant.model import QuantizedModel
from tests.quest_deploy.support import flip_byte, truncate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import nn

    from quest_deploy.checkpoint import Checkpoint
    from quest_deploy.trajectories import Trajectories

FAMILY = "class-conditional"
OPTIONS = FinetuneOptions(FAMILY, temporal_steps=3, sensitive_steps=5, batch=6, weight_rate=1e-2, scale_rate=1e-2)
"""Few steps at high rates, so that codes change."""
Train = "Callable[..., Checkpoint]"


class StopError(Exception):
    """What interrupts a run."""


@pytest.fixture(scope="module")
def train(mini_unet: nn.Module, mini_checkpoint: Checkpoint, mini_trajectories: Trajectories) -> Train:
    return partial(finetune, mini_unet, mini_checkpoint, mini_trajectories)


@pytest.fixture(scope="module")
def uninterrupted(train: Train) -> Checkpoint:
    return train(OPTIONS)


def stop_after(step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.step == step:
            raise StopError

    return report


def learned(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    """Everything that finetuning may change, by name."""
    for layer in checkpoint.layers.values():
        yield f"{layer.name} codes", layer.weight_codes
        yield f"{layer.name} weight scale", layer.weight_scale
        if layer.bias is not None:
            yield f"{layer.name} bias", layer.bias
    for site in checkpoint.sites.values():
        for table in ("scale", "low", "high", "channel"):
            yield f"{site.name} {table}", getattr(site, table)


def differences(one: Checkpoint, other: Checkpoint) -> list[str]:
    return [name for (name, a), (_, b) in zip(learned(one), learned(other), strict=True) if not np.array_equal(a, b)]


def changed_layers(one: Checkpoint, other: Checkpoint) -> set[str]:
    return {name.rsplit(" ", 1)[0] for name in differences(one, other) if name.endswith((" codes", " bias"))}


def log_error(checkpoint: Checkpoint, trajectories: Trajectories) -> float:
    """The mean logarithm of the deployed model's relative squared error over all recorded steps."""
    model = QuantizedModel.from_checkpoint(checkpoint).eval()
    steps, samples = trajectories.sample.shape[:2]
    rows = torch.arange(steps * samples)
    with torch.no_grad():
        output = model(**trajectories.inputs(rows // samples, rows % samples)).flatten(1)
    target = trajectories.output.flatten(0, 1).flatten(1)
    return float(((output - target).square().sum(1) / target.square().sum(1)).log().mean())


@pytest.mark.parametrize("save_every", [1, 2])
@pytest.mark.parametrize("step", [1, 2, 3, 4, 7])
def test_an_interrupted_run_resumes_to_the_same_result_bit_for_bit(
    train: Train, uninterrupted: Checkpoint, tmp_path: Path, step: int, save_every: int
) -> None:
    state = tmp_path / "state.pt"
    with pytest.raises(StopError):
        train(OPTIONS, state_path=state, save_every=save_every, on_progress=stop_after(step))
    seen: list[int] = []
    resumed = train(OPTIONS, state_path=state, save_every=save_every, on_progress=lambda p: seen.append(p.step))
    assert seen == list(range(step // save_every * save_every + 1, 9))
    assert differences(resumed, uninterrupted) == []
    assert resumed.provenance == uninterrupted.provenance


def test_a_run_that_is_interrupted_twice_ends_the_same(train: Train, uninterrupted: Checkpoint, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    for step in (2, 6):
        with pytest.raises(StopError):
            train(OPTIONS, state_path=state, save_every=1, on_progress=stop_after(step))
    assert differences(train(OPTIONS, state_path=state), uninterrupted) == []


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"batch": 4}, {"weight_rate": 1e-3}, {"sensitive_steps": 6}, {"temporal_steps": 2, "sensitive_steps": 6}]
)
def test_a_state_of_other_options_is_ignored(train: Train, tmp_path: Path, changes: dict[str, Any]) -> None:
    state, options = tmp_path / "state.pt", dataclasses.replace(OPTIONS, **changes)
    with pytest.raises(StopError):
        train(OPTIONS, state_path=state, save_every=1, on_progress=stop_after(4))
    seen: list[int] = []
    train(options, state_path=state, on_progress=lambda p: seen.append(p.step))
    assert seen[0] == 1


def test_a_state_of_another_calibration_is_ignored(
    mini_unet: nn.Module, mini_checkpoint: Checkpoint, mini_trajectories: Trajectories, train: Train, tmp_path: Path
) -> None:
    state = tmp_path / "state.pt"
    with pytest.raises(StopError):
        train(OPTIONS, state_path=state, save_every=1, on_progress=stop_after(4))
    site = mini_checkpoint.sites["conv_in"]
    sites = {**mini_checkpoint.sites, "conv_in": dataclasses.replace(site, scale=site.scale * np.float32(1.1))}
    other = dataclasses.replace(mini_checkpoint, sites=sites)
    seen: list[int] = []
    finetune(mini_unet, other, mini_trajectories, OPTIONS, state_path=state, on_progress=lambda p: seen.append(p.step))
    assert seen[0] == 1


@pytest.mark.parametrize("damage", [flip_byte, truncate, lambda path: path.write_bytes(b"")], ids=["edited", "truncated", "empty"])
def test_a_damaged_state_is_ignored(train: Train, uninterrupted: Checkpoint, tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    state = tmp_path / "state.pt"
    with pytest.raises(StopError):
        train(OPTIONS, state_path=state, save_every=1, on_progress=stop_after(4))
    damage(state)
    assert differences(train(OPTIONS, state_path=state), uninterrupted) == []


@pytest.mark.parametrize("content", [{}, [1], {"key": "a", "step": 1, "model": {}, "optimizer": {}}, {"key": "a", "other": 1}])
def test_a_state_that_is_something_else_is_ignored(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "state.pt")
    assert TrainingState.load(tmp_path / "state.pt", "another key") is None


def test_there_may_be_no_state(tmp_path: Path) -> None:
    assert TrainingState.load(tmp_path / "state.pt", "key") is None


def test_only_the_layer_sets_weights_change(mini_checkpoint: Checkpoint, uninterrupted: Checkpoint) -> None:
    sets = LAYER_SETS[FAMILY]
    temporal, sensitive = (set(select_layers(mini_checkpoint.layers, patterns)) for patterns in (sets.temporal, sets.sensitive))
    changed = changed_layers(mini_checkpoint, uninterrupted)
    assert changed <= temporal | sensitive
    assert changed & temporal
    assert changed & sensitive


def test_the_first_stage_changes_the_temporal_layers_and_their_sites_alone(train: Train, mini_checkpoint: Checkpoint) -> None:
    temporal = set(select_layers(mini_checkpoint.layers, LAYER_SETS[FAMILY].temporal))
    tuned = train(dataclasses.replace(OPTIONS, sensitive_steps=0))
    changed = changed_layers(mini_checkpoint, tuned)
    assert changed
    assert changed <= temporal
    sites = {name.rsplit(" ", 1)[0] for name in differences(mini_checkpoint, tuned) if name.endswith((" scale", " low", " high"))}
    sites -= {f"{layer} weight" for layer in mini_checkpoint.layers}
    assert sites == {mini_checkpoint.site_of(layer).name for layer in temporal}


def test_scales_change_in_every_bucket_and_stay_positive(mini_checkpoint: Checkpoint, uninterrupted: Checkpoint) -> None:
    moved = np.zeros(3, bool)
    for name, site in uninterrupted.sites.items():
        assert (site.scale > 0).all()
        moved |= site.scale != mini_checkpoint.sites[name].scale
    assert moved.all()


def test_clip_bounds_stay_those_of_their_bits(uninterrupted: Checkpoint) -> None:
    for site in uninterrupted.sites.values():
        assert ((site.high - site.low) == (254 if site.bits == 8 else 15)).all()
        assert (site.low <= 0).all()
        assert (site.high >= 0).all()


def test_neither_the_float_model_nor_the_calibrated_checkpoint_changes(
    mini_unet: nn.Module, mini_checkpoint: Checkpoint, mini_trajectories: Trajectories
) -> None:
    before = {name: value.clone() for name, value in mini_unet.state_dict().items()}
    codes = {name: layer.weight_codes.copy() for name, layer in mini_checkpoint.layers.items()}
    finetune(mini_unet, mini_checkpoint, mini_trajectories, OPTIONS)
    assert all(torch.equal(value, before[name]) for name, value in mini_unet.state_dict().items())
    assert all(np.array_equal(layer.weight_codes, codes[name]) for name, layer in mini_checkpoint.layers.items())


def test_finetuning_brings_the_quantized_model_closer_to_the_float_one(
    train: Train, mini_checkpoint: Checkpoint, mini_trajectories: Trajectories
) -> None:
    options = FinetuneOptions(FAMILY, temporal_steps=5, sensitive_steps=45, batch=12, weight_rate=3e-3, scale_rate=1e-3)
    losses: list[float] = []
    tuned = train(options, on_progress=lambda progress: losses.append(progress.loss))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert log_error(tuned, mini_trajectories) < log_error(mini_checkpoint, mini_trajectories) - 0.1


def test_without_steps_the_checkpoint_is_the_calibrated_one(train: Train, mini_checkpoint: Checkpoint) -> None:
    assert differences(train(dataclasses.replace(OPTIONS, temporal_steps=0, sensitive_steps=0)), mini_checkpoint) == []


def test_the_checkpoint_records_how_it_came_to_be(uninterrupted: Checkpoint) -> None:
    assert (uninterrupted.provenance["method"], uninterrupted.provenance["start"]) == ("quest", "ptq")
    assert uninterrupted.provenance["temporal_steps"] == 3


def test_progress_tells_both_stages_step_by_step(train: Train) -> None:
    seen: list[Progress] = []
    train(dataclasses.replace(OPTIONS, temporal_steps=1, sensitive_steps=2), on_progress=seen.append)
    assert [(p.step, p.steps) for p in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[0].stage != seen[1].stage == seen[2].stage
    assert all(np.isfinite(p.loss) for p in seen)


@pytest.mark.parametrize("changes", [{"family": "video"}, {"batch": 0}, {"temporal_steps": -1}, {"sensitive_steps": -1}])
def test_options_that_cannot_work_are_input_errors(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"unknown model family 'video'|positive batch and step counts"):
        FinetuneOptions(**{"family": FAMILY, **changes})
