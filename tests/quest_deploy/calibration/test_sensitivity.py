from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quest_deploy.artifacts.checkpoint import ActivationQuantizerData, Checkpoint
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.calibration.ptq import CalibrationOptions, calibrate
from quest_deploy.calibration.sensitivity import (
    LayerSensitivity,
    Sensitivity,
    error_shares,
    measure_sensitivity,
    select_sensitive,
)
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.errors import QuestDeployError
from quest_deploy.quantization.layer_kinds import OTHER, PRODUCTS, group_of
from quest_deploy.quantization.prepare import prepare
from tests.helpers import numpy_layer, of_sample, refused
from tests.quest_deploy.support import strict_json


@pytest.fixture(scope="module")
def measured(
    mini_unet: nn.Module, mini_checkpoint: Checkpoint, mini_trajectories: Trajectories
) -> Sensitivity:
    return measure_sensitivity(mini_unet, mini_checkpoint, mini_trajectories, samples=4, batch=7)


def report(**errors: float) -> dict[str, Any]:
    """A report of the layers and errors given; a double underscore stands for a dot."""
    layers = tuple(
        LayerSensitivity(name.replace("__", "."), e, e, (e,), (e,)) for name, e in errors.items()
    )
    return Sensitivity("mini", "w4a4", 1, layers).to_json()


def replaced_output(
    unet: nn.Module, checkpoint: Checkpoint, layer: str, inputs: dict[str, torch.Tensor]
) -> np.ndarray:
    """The float model's output where ``layer`` alone answers as the numpy reference of a quantized
    layer.
    """
    edges = np.asarray(checkpoint.scheme.bucket_edges)
    bucket = (inputs["timestep"].numpy()[:, None] >= edges).sum(1)

    def answer(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(numpy_layer(checkpoint, layer, args[0].numpy(), bucket)).float()

    handle = unet.get_submodule(layer).register_forward_hook(answer)
    try:
        return unet(**inputs, return_dict=False)[0].numpy()
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "layer",
    [
        "conv_in",
        "down_blocks.0.resnets.0.time_emb_proj",
        "up_blocks.0.resnets.1.conv_shortcut",
        "conv_out",
    ],
)
def test_a_layers_figure_is_the_error_of_the_float_model_with_that_layer_quantized(
    measured: Sensitivity,
    mini_unet: nn.Module,
    mini_checkpoint: Checkpoint,
    mini_trajectories: Trajectories,
    layer: str,
) -> None:
    errors: list[list[float]] = [[], [], []]
    powers: list[list[float]] = [[], [], []]
    for step, timestep in enumerate(mini_trajectories.timestep.tolist()):
        inputs = mini_trajectories.inputs(torch.full((4,), step), torch.arange(4))
        plain = mini_unet(**inputs, return_dict=False)[0].numpy()
        bucket = mini_checkpoint.scheme.bucket_of(timestep)
        errors[bucket].append(
            float(
                np.square(replaced_output(mini_unet, mini_checkpoint, layer, inputs) - plain).mean()
            )
        )
        powers[bucket].append(float(np.square(plain).mean()))
    expected = [np.mean(e) for e in errors]
    relative = [np.mean(e) / np.mean(p) for e, p in zip(errors, powers, strict=True)]
    (found,) = (x for x in measured.layers if x.layer == layer)
    assert found.bucket_mse == pytest.approx(expected, rel=1e-3)
    assert found.bucket_relative_mse == pytest.approx(relative, rel=1e-3)
    assert found.mse == pytest.approx(np.mean(expected), rel=1e-3)
    assert found.relative_mse == pytest.approx(np.mean(relative), rel=1e-3)


@pytest.fixture(scope="module")
def full(mini_unet: nn.Module, mini_trajectories: Trajectories) -> tuple[Checkpoint, Sensitivity]:
    """All that can be quantized: attention's products, softmax, both halves of the shortcuts."""
    scheme = Scheme.parse("w4a4", buckets=3, attention_bits=4, softmax_bits=8, split_shortcuts=True)
    checkpoint = calibrate("mini", mini_unet, mini_trajectories, scheme, CalibrationOptions())
    return checkpoint, measure_sensitivity(
        mini_unet, checkpoint, mini_trajectories, samples=2, batch=12
    )


def test_products_and_halves_of_shortcuts_are_measured_where_they_run(
    full: tuple[Checkpoint, Sensitivity],
) -> None:
    checkpoint, measured = full
    names = [x.layer for x in measured.layers]
    assert sorted(names) == sorted([*checkpoint.layers, *checkpoint.matmuls])
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    start = names.index(f"{attention}.to_q")
    parts = ("to_q", "to_k", "to_v", "scores", "mix", "to_out.0")
    assert names[start : start + 6] == [f"{attention}.{part}" for part in parts]
    shortcut = "up_blocks.0.resnets.0.conv_shortcut"
    assert names.index(f"{shortcut}.second") == names.index(f"{shortcut}.first") + 1
    assert all(x.mse > 0 for x in measured.layers)
    assert {x.group for x in measured.layers if x.layer in checkpoint.matmuls} == {PRODUCTS}


def test_a_products_figure_is_the_error_of_quantizing_its_operands(
    full: tuple[Checkpoint, Sensitivity], mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    checkpoint, measured = full
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.mix"
    tables = [checkpoint.quantizers[quantizer] for quantizer in checkpoint.matmuls[name].sites]
    model = prepare(copy.deepcopy(mini_unet), {}, checkpoint.architecture.attention)
    inputs = next(mini_trajectories.first(2).batches(2))
    bucket = np.full(2, checkpoint.scheme.bucket_of(float(inputs["timestep"][0])))

    def operand(quantizer: ActivationQuantizerData, x: torch.Tensor) -> torch.Tensor:
        codes = np.rint(x.numpy() / of_sample(quantizer.scale, bucket, 4))
        return torch.from_numpy(
            codes.clip(*(of_sample(table, bucket, 4) for table in (quantizer.low, quantizer.high)))
            * quantizer.scale[bucket[0]]
        )

    model.get_submodule(name).register_forward_hook(
        lambda _, args, __: operand(tables[0], args[0]) @ operand(tables[1], args[1])
    )
    (found,) = (x for x in measured.layers if x.layer == name)
    errors = [
        (model(**step, return_dict=False)[0] - mini_unet(**step, return_dict=False)[0])
        .square()
        .mean()
        .item()
        for step in itertools.islice(
            mini_trajectories.first(2).batches(2), 2
        )  # the two steps of the last bucket
    ]
    assert found.bucket_mse[2] == pytest.approx(np.mean(errors), rel=1e-2)


def test_products_are_never_selected(full: tuple[Checkpoint, Sensitivity]) -> None:
    checkpoint, measured = full
    assert select_sensitive(report(attn__mix=100.0, conv_in=1.0)) == ("conv_in",)
    assert set(select_sensitive(measured.to_json())) <= checkpoint.layers.keys()


def test_every_layer_is_measured_in_execution_order(
    measured: Sensitivity, mini_checkpoint: Checkpoint
) -> None:
    assert [x.layer for x in measured.layers] == list(mini_checkpoint.layers)
    assert (measured.model, measured.scheme, measured.samples) == ("mini", "w4a4", 4)
    assert all(x.mse > 0 for x in measured.layers)


def test_the_size_of_a_batch_changes_nothing(
    measured: Sensitivity,
    mini_unet: nn.Module,
    mini_checkpoint: Checkpoint,
    mini_trajectories: Trajectories,
) -> None:
    again = measure_sensitivity(
        mini_unet, mini_checkpoint, mini_trajectories, samples=4, batch=1000
    )
    for a, b in zip(measured.layers, again.layers, strict=True):
        # A float's last bit may move a code over a tie, once in a while.
        assert a.bucket_mse == pytest.approx(b.bucket_mse, rel=0.05)


def test_the_float_model_is_left_as_it_was(
    mini_unet: nn.Module, mini_checkpoint: Checkpoint, mini_trajectories: Trajectories
) -> None:
    modules, state = dict(mini_unet.named_modules()), copy.deepcopy(mini_unet.state_dict())
    measure_sensitivity(mini_unet, mini_checkpoint, mini_trajectories, samples=1, batch=3)
    assert dict(mini_unet.named_modules()) == modules
    assert all(torch.equal(value, mini_unet.state_dict()[key]) for key, value in state.items())


def test_a_ruined_layer_is_the_only_one_whose_figure_grows(
    measured: Sensitivity,
    mini_unet: nn.Module,
    mini_checkpoint: Checkpoint,
    mini_trajectories: Trajectories,
) -> None:
    ruined = "up_blocks.0.resnets.0.conv2"
    layer = mini_checkpoint.layers[ruined]
    changed = dataclasses.replace(layer, codes=np.zeros_like(layer.weight_codes))
    checkpoint = dataclasses.replace(
        mini_checkpoint, layers=mini_checkpoint.layers | {ruined: changed}
    )
    worse = measure_sensitivity(mini_unet, checkpoint, mini_trajectories, samples=4, batch=7)
    for before, after in zip(measured.layers, worse.layers, strict=True):
        assert (after.mse > 3 * before.mse) if after.layer == ruined else (after == before)


def test_a_bucket_never_visited_has_no_figure_and_does_not_count(
    measured: Sensitivity,
    mini_unet: nn.Module,
    mini_checkpoint: Checkpoint,
    mini_trajectories: Trajectories,
) -> None:
    late = dataclasses.replace(
        mini_trajectories,
        sample=mini_trajectories.sample[2:],
        timestep=mini_trajectories.timestep[2:],
        output=mini_trajectories.output[2:],
    )
    part = measure_sensitivity(mini_unet, mini_checkpoint, late, samples=4, batch=8)
    for x, whole in zip(part.layers, measured.layers, strict=True):
        assert x.bucket_mse[2] is None
        assert x.bucket_relative_mse[2] is None
        assert x.bucket_mse[:2] == pytest.approx(whole.bucket_mse[:2], rel=0.05)
        assert x.mse == pytest.approx((x.bucket_mse[0] + x.bucket_mse[1]) / 2)


def test_progress_counts_the_layers(
    mini_unet: nn.Module, mini_checkpoint: Checkpoint, mini_trajectories: Trajectories
) -> None:
    calls: list[tuple[str, int, int]] = []
    measure_sensitivity(
        mini_unet,
        mini_checkpoint,
        mini_trajectories,
        1,
        6,
        lambda *progress: calls.append(progress),
    )
    count = len(mini_checkpoint.layers)
    assert calls == [("layers", i + 1, count) for i in range(count)]


@pytest.mark.parametrize(("samples", "batch"), [(0, 1), (1, 0)])
def test_nothing_to_run_is_an_input_error(
    mini_unet: nn.Module,
    mini_checkpoint: Checkpoint,
    mini_trajectories: Trajectories,
    samples: int,
    batch: int,
) -> None:
    with refused(samples, batch):
        measure_sensitivity(mini_unet, mini_checkpoint, mini_trajectories, samples, batch)


def test_an_output_that_is_not_finite_is_an_error(
    mini_unet: nn.Module, mini_checkpoint: Checkpoint, mini_trajectories: Trajectories
) -> None:
    broken = dataclasses.replace(
        mini_trajectories, sample=torch.full_like(mini_trajectories.sample, torch.nan)
    )
    with refused("output", error=QuestDeployError):
        measure_sensitivity(mini_unet, mini_checkpoint, broken, 1, 6)


def test_a_report_reads_back_as_it_was_written(measured: Sensitivity) -> None:
    assert Sensitivity.from_json(strict_json(json.dumps(measured.to_json()))) == measured


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r.update(version=2),
        lambda r: r.update(format="another"),
        lambda r: r.pop("layers"),
        lambda r: r.update(layers={"a": 1}),
        lambda r: r["layers"][0].pop("mse"),
        lambda r: r["layers"][0].update(mse="0.5"),
        lambda r: r["layers"][0].update(mse=-1.0),
        lambda r: r["layers"][0].update(mse=math.nan),
        lambda r: r["layers"][0].update(bucket_mse=3),
        lambda r: r["layers"][0].update(bucket_mse=[True]),
        lambda r: r.update(samples=None),
    ],
)
def test_a_damaged_report_is_an_input_error_that_names_the_command(
    damage: Callable[[dict[str, Any]], Any],
) -> None:
    damaged = report(conv_in=0.5)
    damage(damaged)
    with refused("quest-deploy sensitivity"):
        select_sensitive(damaged)


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_a_report_that_is_no_object_is_an_input_error(value: Any) -> None:
    with refused("quest-deploy sensitivity"):
        Sensitivity.from_json(value)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8))
def test_the_selected_layers_are_the_smallest_set_with_four_fifths_of_the_error(
    errors: list[int],
) -> None:
    given_errors = {f"layer{i}": float(e) for i, e in enumerate(errors)}
    chosen = select_sensitive(report(**given_errors))
    assert 5 * sum(given_errors[name] for name in chosen) >= 4 * sum(errors)
    for smaller in itertools.combinations(errors, max(len(chosen) - 1, 0)):
        assert len(chosen) == 0 or 5 * sum(smaller) < 4 * sum(errors)
    assert len(chosen) == 0 or min(given_errors[name] for name in chosen) >= max(
        (e for name, e in given_errors.items() if name not in chosen), default=0
    )


def test_every_layers_share_counts_the_time_embedding_projections_too() -> None:
    assert error_shares(report(block__time_emb_proj=1.0, conv_in=3.0)) == {
        "block.time_emb_proj": 0.25,
        "conv_in": 0.75,
    }
    assert error_shares(report(conv_in=0.0)) == {"conv_in": 0.0}


def test_the_time_embedding_projections_are_neither_selected_nor_counted() -> None:
    found = select_sensitive(
        report(a__time_emb_proj=100.0, conv_in=0.5, conv_out=8.0, b__time_emb_proj=5.0, mid=1.0)
    )
    assert found == ("conv_out",)


def test_selected_layers_come_in_execution_order_and_the_earlier_of_equals() -> None:
    assert select_sensitive(report(a=0.5, b=2.0, c=8.0, d=2.0)) == ("b", "c")


def test_every_visited_bucket_counts_the_same_however_large_its_errors() -> None:
    def layer(name: str, *errors: float | None) -> LayerSensitivity:
        return LayerSensitivity(name, 1.0, 1.0, errors, errors)

    layers = (
        layer("late", 100.0, 0.0, None),
        layer("early", 0.0, 0.01, None),
        layer("nowhere", 0.5, 0.0001, None),
    )
    assert select_sensitive(Sensitivity("emoji", "w4a4", 1, layers).to_json()) == ("late", "early")


@pytest.mark.parametrize(
    ("layer", "group"),
    [
        ("down_blocks.0.resnets.1.time_emb_proj", "time_emb_proj"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "attn1.to_q/k/v"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_v", "attn1.to_q/k/v"),
        ("down_blocks.0.attentions.0.to_k", "attn1.to_q/k/v"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0", "attn1.to_out"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_q", "attn2"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", "attn2"),
        ("up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj", "ff.net"),
        ("up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2", "ff.net"),
        ("up_blocks.1.resnets.2.conv1", "resnets.conv1"),
        ("up_blocks.1.resnets.2.conv2", "resnets.conv2"),
        ("up_blocks.1.resnets.2.conv_shortcut", "resnets.conv_shortcut"),
        ("up_blocks.1.attentions.2.proj_in", "proj_in/proj_out"),
        ("up_blocks.1.attentions.2.proj_out", "proj_in/proj_out"),
        ("down_blocks.1.downsamplers.0.conv", "samplers"),
        ("up_blocks.1.upsamplers.0.conv", "samplers"),
        ("conv_in", "conv_in/conv_out"),
        ("conv_out", "conv_in/conv_out"),
        ("time_embedding.linear_2", "time_embedding"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.scores", PRODUCTS),
        ("mid_block.attentions.0.mix", PRODUCTS),
        ("up_blocks.1.resnets.2.conv_shortcut.second", "resnets.conv_shortcut"),
        ("something.else", OTHER),
    ],
)
def test_a_layers_name_tells_its_kind(layer: str, group: str) -> None:
    assert group_of(layer) == group


def test_no_layer_of_a_unet_is_of_an_unknown_kind(small_checkpoint: Checkpoint) -> None:
    assert [name for name in small_checkpoint.layers if group_of(name) == OTHER] == []
