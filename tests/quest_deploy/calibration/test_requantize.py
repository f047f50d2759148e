"""Weights that changed, rounded again: against a search by brute force in numpy, and against what
was learned of the rounding before.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quest_deploy.artifacts.checkpoint import ActivationQuantizerData, Checkpoint
from quest_deploy.artifacts.scheme import Granularity, Scheme, weight_range
from quest_deploy.calibration.ptq import CalibrationOptions, RangeMethod, calibrate
from quest_deploy.calibration.requantize import requantize
from quest_deploy.calibration.trajectories import Trajectories
from tests.helpers import Array

POWERS = {RangeMethod.MSE: 2.0, RangeMethod.L24: 2.4, RangeMethod.MINMAX: 2.0}
WIDE = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
SHORTCUT = "up_blocks.0.resnets.0.conv_shortcut"


def calibrated(
    unet: nn.Module,
    trajectories: Trajectories,
    method: RangeMethod = RangeMethod.MSE,
    **scheme: Any,
) -> Checkpoint:
    made = Scheme.parse("w4a4", buckets=3, **scheme)
    return calibrate("mini", unet, trajectories, made, CalibrationOptions(method))


def changed(unet: nn.Module, layers: list[str], size: float = 0.5) -> nn.Module:
    """A copy in which the weights of ``layers`` have noise of ``size`` deviations on them."""
    copied, generator = copy.deepcopy(unet), torch.Generator().manual_seed(3)
    for name in layers:
        weight = copied.get_submodule(name).get_parameter("weight").detach()
        weight += size * weight.std() * torch.randn(weight.shape, generator=generator)
    return copied


def folded(checkpoint: Checkpoint, name: str, unet: nn.Module) -> Array:
    """The float weight times the smoothing scale, float64 [O, I, ...]."""
    weight = unet.get_submodule(name).get_parameter("weight").detach().double().numpy()
    quantizer = checkpoint.quantizer_of(name)
    if not isinstance(quantizer, ActivationQuantizerData):
        return np.asarray(weight)
    return np.asarray(weight * quantizer.channel.reshape(1, -1, *[1] * (weight.ndim - 2)))


def least_error(weight: Array, bits: int, method: RangeMethod) -> Array:
    """The error of each row at the best of all shrink factors."""
    low, high = weight_range(bits)
    flat = weight.reshape(len(weight), -1)
    full = np.maximum(flat.max(1) / high, flat.min(1) / low)[:, None]
    factors = [1.0] if method is RangeMethod.MINMAX else np.linspace(1.0, 0.2, 81)
    tried = [np.clip(np.rint(flat / (full * f)), low, high) * (full * f) for f in factors]
    errors = [(np.abs(each - flat) ** POWERS[method]).mean(1) for each in tried]
    return np.asarray(np.min(errors, 0))


@pytest.mark.parametrize("method", list(RangeMethod))
@pytest.mark.parametrize("granularity", [Granularity.FOLDED_CHANNEL, Granularity.PER_CHANNEL])
def test_what_changed_is_rounded_as_calibration_rounds_and_the_rest_keeps_its_codes(
    mini_unet: nn.Module,
    mini_trajectories: Trajectories,
    method: RangeMethod,
    granularity: Granularity,
) -> None:
    checkpoint = calibrated(mini_unet, mini_trajectories, method, granularity=granularity)
    chosen = list(checkpoint.layers)[::3]
    after = changed(mini_unet, chosen)
    made, count = requantize(checkpoint, copy.deepcopy(mini_unet), copy.deepcopy(after))
    assert count == len(chosen)
    assert made.quantizers == checkpoint.quantizers
    for name, layer in made.layers.items():
        if name not in chosen:
            assert layer is checkpoint.layers[name]
            continue
        weight = folded(checkpoint, name, after)
        error = np.abs(layer.dequantized_weight - weight) ** POWERS[method]
        expected = least_error(weight, layer.weight_bits, method)
        np.testing.assert_allclose(error.reshape(len(error), -1).mean(1), expected, rtol=1e-3)


def test_weights_that_are_not_quantized_take_the_change_too(
    mini_unet: nn.Module, mini_checkpoint: Checkpoint
) -> None:
    key = "conv_norm_out.weight"
    finetuned = replace(
        mini_checkpoint, floats=mini_checkpoint.floats | {key: mini_checkpoint.floats[key] + 2}
    )
    after = changed(mini_unet, [])
    after.get_parameter(key).data += 0.5
    made, count = requantize(finetuned, copy.deepcopy(mini_unet), after)
    assert count == 1
    np.testing.assert_allclose(made.floats[key], mini_checkpoint.floats[key] + 2.5, rtol=1e-6)
    assert made.layers == mini_checkpoint.layers
    assert all(made.floats[x] is finetuned.floats[x] for x in made.floats if x != key)


def test_a_change_of_a_fifth_of_a_step_counts_on_weights_that_finetuning_moved(
    mini_unet: nn.Module, mini_checkpoint: Checkpoint
) -> None:
    layer = mini_checkpoint.layers[WIDE]
    low, high = weight_range(layer.weight_bits)
    moves = np.random.default_rng(0).integers(-2, 3, layer.weight_codes.shape)
    codes = np.clip(layer.weight_codes + moves, low, high).astype(np.int8)
    moved = replace(layer, codes=codes)
    finetuned = replace(mini_checkpoint, layers=mini_checkpoint.layers | {WIDE: moved})

    step = layer.weight_scale[:, None]
    quantizer = mini_checkpoint.quantizer_of(WIDE)
    assert isinstance(quantizer, ActivationQuantizerData)
    after = changed(mini_unet, [])
    weight = after.get_submodule(WIDE).get_parameter("weight").detach()
    weight += torch.from_numpy(0.2 * step / quantizer.channel)
    made, _ = requantize(finetuned, copy.deepcopy(mini_unet), after)

    inside = (codes > low + 1) & (codes < high - 1)
    change = (made.layers[WIDE].dequantized_weight - moved.dequantized_weight) / step
    assert 0.12 < change[inside].mean() < 0.28
    of_float = (moved.dequantized_weight - folded(mini_checkpoint, WIDE, mini_unet)) / step
    assert np.abs(change[inside]).mean() < 0.6 < np.abs(of_float[inside]).mean()


def test_each_half_of_a_split_shortcut_changes_by_itself(
    mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    checkpoint = calibrated(
        mini_unet, mini_trajectories, split_shortcuts=True, attention_bits=8, softmax_bits=8
    )
    after = changed(mini_unet, [])
    channels = checkpoint.architecture.split_shortcuts[SHORTCUT]
    after.get_submodule(SHORTCUT).get_parameter("weight").data[:, channels:] *= -1
    made, count = requantize(checkpoint, copy.deepcopy(mini_unet), after)
    others = {name for name in made.layers if made.layers[name] is not checkpoint.layers[name]}
    assert (count, others) == (1, {f"{SHORTCUT}.second"})
