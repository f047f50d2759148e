"""Branches of low rank: taken out of weights, beside layers that are quantized, learned or changed by
a LoRA.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from quest_deploy.artifacts.checkpoint import Checkpoint, save_checkpoint
from quest_deploy.artifacts.scheme import Granularity, Scheme
from quest_deploy.calibration.low_rank import add_branches
from quest_deploy.calibration.ptq import CalibrationOptions, calibrate
from quest_deploy.calibration.reconstruction import ReconstructOptions, reconstruct, units_of
from quest_deploy.calibration.requantize import requantize
from quest_deploy.calibration.sensitivity import measure_sensitivity
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.finetuning.train import FinetuneOptions, finetune
from quest_deploy.quantization.layer_kinds import group_of, matches
from quest_deploy.quantization.model import QuantizedModel, prepared
from quest_deploy.quantization.prepare import LowRank
from tests.helpers import refused

CONV, LINEAR, ALONE = (
    "up_blocks.0.resnets.0.conv_shortcut",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
    "down_blocks.0.attentions.0.proj_in",
)
LAYERS = (CONV, LINEAR, ALONE)
SCHEME = Scheme.parse("w4a4", buckets=3, low_rank=2, low_rank_layers=LAYERS)


@pytest.fixture(scope="module")
def branched(mini_unet: nn.Module, mini_trajectories: Trajectories) -> Checkpoint:
    """``mini_unet`` with branches of rank 2 beside three layers."""
    return calibrate("mini", mini_unet, mini_trajectories, SCHEME, CalibrationOptions())


def output(unet: nn.Module, trajectories: Trajectories) -> Tensor:
    with torch.no_grad():
        found: Tensor = unet(**next(trajectories.batches(4)), return_dict=False)[0]
    return found


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


@given(
    outputs=st.integers(1, 6),
    inputs=st.integers(1, 6),
    kernel=st.sampled_from((None, 1, 3)),
    rank=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_a_branch_and_the_residual_are_the_layer_and_the_residual_has_what_singular_values_are_left(
    outputs: int, inputs: int, kernel: int | None, rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer: nn.Linear | nn.Conv2d
    if kernel is None:
        layer, x = nn.Linear(inputs, outputs), torch.randn(3, 5, inputs)
    else:
        layer = nn.Conv2d(inputs, outputs, kernel, stride=2, padding=1)
        x = torch.randn(3, inputs, 7, 6)
    channel = torch.rand(inputs) + 0.5
    model = OneLayer(copy.deepcopy(layer))
    scheme = Scheme.parse("w4a4", low_rank=rank, low_rank_layers=["lay*"])
    ranks = add_branches(model, {"layer": channel}, scheme)

    flat = (layer.weight * channel.view(-1, *[1] * (layer.weight.dim() - 2))).flatten(1)
    values = torch.linalg.svdvals(flat)
    assert ranks == {"layer": min(rank, len(values))}
    torch.testing.assert_close(model(x), layer(x), atol=1e-5, rtol=1e-5)
    assert isinstance(model.layer, LowRank)
    assert model.layer.down.dtype == model.layer.up.dtype == torch.float16
    assert model.layer.up.shape == (outputs, ranks["layer"])
    left = model.layer.residual.get_parameter("weight")
    left = (left * channel.view(-1, *[1] * (left.dim() - 2))).flatten(1)
    expected = torch.cat([values[rank:], torch.zeros(min(rank, len(values)))])
    torch.testing.assert_close(torch.linalg.svdvals(left), expected, atol=5e-3, rtol=0)


def test_a_pattern_without_a_layer_and_a_grouped_convolution_are_refused_by_name() -> None:
    scheme = dataclasses.replace(SCHEME, low_rank_layers=("nothing*",))
    with refused("nothing*"):
        add_branches(OneLayer(nn.Linear(2, 2)), {"layer": torch.ones(2)}, scheme)
    grouped = OneLayer(nn.Conv2d(4, 4, 1, groups=2))
    scheme = dataclasses.replace(SCHEME, low_rank_layers=("*",))
    with refused("grouped", "layer"):
        add_branches(grouped, {"layer": torch.ones(4)}, scheme)


def test_globs_match_what_is_left_of_a_layer_as_they_match_the_layer() -> None:
    assert matches("a.to_q.residual", "*.to_q")
    assert matches("a.to_q.residual", "*.residual")
    assert not matches("a.to_q.residual", "*.to")
    assert group_of("a.resnets.0.conv1.residual") == group_of("a.resnets.0.conv1") != "other"


def test_calibration_quantizes_what_is_left_and_the_float_model_computes_the_same(
    branched: Checkpoint, mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    assert branched.architecture.low_rank == dict.fromkeys(LAYERS, 2)
    assert set(LAYERS) == {x.removesuffix(".residual") for x in branched.layers if "resid" in x}
    model = prepared(copy.deepcopy(mini_unet), branched)
    expected = output(mini_unet, mini_trajectories)
    torch.testing.assert_close(output(model, mini_trajectories), expected, atol=1e-4, rtol=1e-3)
    for name in LAYERS:
        layer = branched.layers[f"{name}.residual"]
        left = model.get_submodule(layer.name).get_parameter("weight").numpy()
        channel = branched.quantizer_of(layer.name).channel  # type: ignore[union-attr]
        folded = left * channel.reshape(1, -1, *[1] * (left.ndim - 2))
        step = layer.weight_scale.reshape(-1, *[1] * (left.ndim - 1))
        assert np.abs(layer.dequantized_weight - folded).mean() < 0.5 * step.mean()


def test_the_quantized_model_is_the_same_from_its_checkpoint_alone_and_over_the_float_model(
    branched: Checkpoint, mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    inputs = next(mini_trajectories.batches(4))
    with torch.no_grad():
        alone = QuantizedModel.from_checkpoint(branched).eval()(**inputs)
        over = QuantizedModel.from_checkpoint(branched, mini_unet).eval()(**inputs)
    torch.testing.assert_close(alone, over)
    again = QuantizedModel.from_checkpoint(branched).to_checkpoint(branched.provenance)
    assert {k: v.dtype for k, v in again.floats.items()} == {
        k: v.dtype for k, v in branched.floats.items()
    }


def test_branches_bring_a_model_of_four_bits_nearer_to_the_float_one(
    branched: Checkpoint,
    mini_checkpoint: Checkpoint,
    mini_unet: nn.Module,
    mini_trajectories: Trajectories,
) -> None:
    scheme = dataclasses.replace(SCHEME, low_rank=8, low_rank_layers=("*",))
    all_layers = calibrate("mini", mini_unet, mini_trajectories, scheme, CalibrationOptions())
    inputs, expected = next(mini_trajectories.batches(24)), None
    errors = []
    for checkpoint in (all_layers, mini_checkpoint):
        with torch.no_grad():
            found = QuantizedModel.from_checkpoint(checkpoint).eval()(**inputs)
            expected = mini_unet(**inputs, return_dict=False)[0]
        errors.append(float((found - expected).square().mean()))
    assert errors[0] < 0.2 * errors[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"granularity": Granularity.PER_CHANNEL},
        {"granularity": Granularity.PER_TENSOR, "split_shortcuts": True},
        {"eight_bit_layers": ("*.ff.net.2",), "attention_bits": 8, "softmax_bits": 8},
    ],
    ids=str,
)
def test_branches_go_with_every_other_choice_of_a_scheme(
    changes: dict[str, Any], mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    scheme = dataclasses.replace(SCHEME, low_rank_layers=("*.conv_shortcut*", "*.ff.*"), **changes)
    made = calibrate("mini", mini_unet, mini_trajectories, scheme, CalibrationOptions())
    assert len(made.branches) == (6 if scheme.split_shortcuts else 4)
    bits = made.layers[f"{LINEAR}.residual"].weight_bits
    assert bits == (8 if scheme.eight_bit_layers else 4)
    inputs = next(mini_trajectories.batches(2))
    with torch.no_grad():
        assert torch.isfinite(QuantizedModel.from_checkpoint(made).eval()(**inputs)).all()


def test_calibration_gives_the_same_bytes_again(
    branched: Checkpoint, mini_unet: nn.Module, mini_trajectories: Trajectories, tmp_path: Path
) -> None:
    again = calibrate("mini", mini_unet, mini_trajectories, SCHEME, CalibrationOptions())
    for name, checkpoint in (("first", branched), ("again", again)):
        save_checkpoint(checkpoint, tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()


def test_finetuning_trains_what_is_left_and_leaves_branches_as_they_are(
    branched: Checkpoint, mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    steps = {"temporal_steps": 1, "sensitive_steps": 3, "batch": 4, "weight_rate": 0.05}
    options = FinetuneOptions("text-to-image", **steps)
    made = finetune(lambda: copy.deepcopy(mini_unet), branched, mini_trajectories, options)
    for name, factors in branched.branches.items():
        for found, expected in zip(made.branches[name], factors, strict=True):
            np.testing.assert_array_equal(found, expected)
    moved = {
        name
        for name, layer in made.layers.items()
        if (layer.weight_codes != branched.layers[name].weight_codes).any()
    }
    assert f"{LINEAR}.residual" in moved
    assert f"{CONV}.residual" not in moved


def test_a_layer_with_its_branch_is_reconstructed_as_one_where_it_is_in_no_block(
    branched: Checkpoint, mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    units = units_of(QuantizedModel.from_checkpoint(branched))
    assert units[ALONE] == (f"{ALONE}.residual",)
    assert f"{CONV}.residual" in units[CONV.removesuffix(".conv_shortcut")]
    options = ReconstructOptions(samples=8, rounding_steps=20, scale_steps=2, batch=4)
    made = reconstruct(mini_unet, branched, mini_trajectories, options)
    codes = [x.layers[f"{ALONE}.residual"].weight_codes for x in (branched, made)]
    assert (codes[0] != codes[1]).any()
    assert list(made.branches) == list(branched.branches)


def test_sensitivity_quantizes_what_is_left_of_a_layer(
    branched: Checkpoint, mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    found = measure_sensitivity(mini_unet, branched, mini_trajectories, samples=1, batch=6)
    errors = {layer.layer: layer.mse for layer in found.layers}
    assert set(errors) == set(branched.layers)
    assert all(error > 0 for error in errors.values())


def test_a_lora_changes_what_is_left_of_a_layer_and_not_its_branch(
    branched: Checkpoint, mini_unet: nn.Module
) -> None:
    after = copy.deepcopy(mini_unet)
    weight = after.get_submodule(LINEAR).get_parameter("weight").detach()
    change = 0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator())
    weight += change
    made, count = requantize(branched, copy.deepcopy(mini_unet), after)
    name = f"{LINEAR}.residual"
    others = {x for x in made.layers if made.layers[x] is not branched.layers[x]}
    assert (count, others, made.floats) == (1, {name}, branched.floats)
    channel = branched.quantizer_of(name).channel  # type: ignore[union-attr]
    found = made.layers[name].dequantized_weight - branched.layers[name].dequantized_weight
    expected = change.numpy() * channel
    assert np.corrcoef(found.flatten(), expected.flatten())[0, 1] > 0.9
