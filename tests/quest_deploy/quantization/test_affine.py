from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quest_deploy.artifacts.scheme import weight_range
from quest_deploy.quantization.affine import (
    WeightGrid,
    activation_codes,
    fake_quantize_activation,
    fake_quantize_weight,
    per_channel,
    per_sample,
    round_ste,
    weight_codes,
)
from tests.helpers import along, numpy_codes

seeds = st.integers(0, 2**32 - 1)
shapes = st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple)


def random(shape: tuple[int, ...], seed: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of which about half lie exactly on multiples of 1/4, so that steps that are powers of
    two meet ties.
    """
    rng = np.random.default_rng(seed)
    values, snap = rng.standard_normal(shape) * 6, rng.random(shape) < 0.5
    return torch.from_numpy(np.where(snap, np.rint(values * 4) / 4, values)).to(dtype)


def steps(count: int, seed: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Positive steps, some of them powers of two."""
    rng = np.random.default_rng(seed + 1)
    values = np.where(
        rng.random(count) < 0.5, 2.0 ** rng.integers(-2, 2, count), rng.uniform(0.05, 2, count)
    )
    return torch.from_numpy(values).to(dtype)


def bounds(count: int, seed: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    low = -torch.from_numpy(np.random.default_rng(seed + 2).integers(0, 16, count)).to(dtype)
    return low, low + 15


@given(shape=shapes, seed=seeds)
def test_activation_codes_equal_numpys_ties_to_even_included(
    shape: tuple[int, ...], seed: int
) -> None:
    x, scale, (low, high) = random(shape, seed), steps(shape[0], seed), bounds(shape[0], seed)
    found = activation_codes(x, per_sample(scale, x), per_sample(low, x), per_sample(high, x))
    assert found.dtype == torch.float32
    rows, ones = np.arange(shape[0]), np.ones(shape[1], np.float32)
    expected = numpy_codes(x.numpy(), rows, scale.numpy(), low.numpy(), high.numpy(), ones, 1)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_codes_come_from_a_division_and_not_from_a_reciprocal() -> None:
    step = np.random.default_rng(0).uniform(0.01, 1, 100_000).astype(np.float32)
    x = (np.random.default_rng(1).integers(-8, 8, 100_000) + np.float32(0.5)) * step
    assert (np.rint(x / step) != np.rint(x * (np.float32(1) / step))).any()
    found = activation_codes(
        torch.from_numpy(x), torch.from_numpy(step), torch.tensor(-127.0), torch.tensor(127.0)
    )
    np.testing.assert_array_equal(found.numpy(), np.rint(x / step))


@pytest.mark.parametrize("bits", [4, 7, 8])
@given(shape=shapes, seed=seeds, spread=st.sampled_from([0.1, 1.0, 100.0]))
def test_weight_codes_equal_numpys_and_lie_in_the_formats_range(
    bits: int, shape: tuple[int, ...], seed: int, spread: float
) -> None:
    weight, scale = random(shape, seed) * spread, steps(shape[0], seed)
    codes = weight_codes(weight, WeightGrid.symmetric(scale, bits))
    low, high = weight_range(bits)
    assert codes.dtype == torch.int16
    expected = np.clip(np.rint(weight.numpy() / along(scale.numpy(), 0, len(shape))), low, high)
    np.testing.assert_array_equal(codes.numpy(), expected)
    assert codes.min() >= low
    assert codes.max() <= high


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("bits", [4, 7, 8])
@given(shape=shapes, seed=seeds)
def test_a_fake_quantized_weight_is_exactly_its_codes_times_its_scale(
    bits: int, shape: tuple[int, ...], seed: int, *, learns: bool
) -> None:
    weight, scale = random(shape, seed), steps(shape[0], seed)
    expected = weight_codes(weight, WeightGrid.symmetric(scale, bits)).float() * per_sample(
        scale, weight
    )
    before = weight.clone()
    with torch.set_grad_enabled(learns):
        found = fake_quantize_weight(weight, WeightGrid.symmetric(scale, bits))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(weight, before)


@given(shape=shapes, seed=seeds)
def test_weights_learn_as_if_unrounded_and_clipped_ones_do_not(
    shape: tuple[int, ...], seed: int
) -> None:
    weight, scale = (
        random(shape, seed, dtype=torch.float64).requires_grad_(),
        steps(shape[0], seed, dtype=torch.float64),
    )
    upstream = random(shape, seed + 3, dtype=torch.float64)
    fake_quantize_weight(weight, WeightGrid.symmetric(scale, 4)).backward(upstream)
    codes = torch.round(weight.detach() / per_sample(scale, weight))
    assert weight.grad is not None
    torch.testing.assert_close(
        weight.grad, torch.where((codes < -8) | (codes > 7), 0.0, upstream), rtol=0, atol=0
    )


def plain_fake_quantize(
    x: Tensor, scale: Tensor, low: Tensor, high: Tensor, channel: Tensor | None, axis: int
) -> Tensor:
    """fake_quantize_activation, composed of autograd's own operations."""
    step = scale.view(-1, *[1] * (x.dim() - 1))
    divisor = (
        step
        if channel is None
        else step * channel.view([-1 if i == axis else 1 for i in range(x.dim())])
    )
    ratio = x / divisor
    rounded = ratio + (torch.round(ratio) - ratio).detach()
    lows, highs = (bound.view(step.shape).expand_as(x) for bound in (low, high))
    clipped = torch.where(rounded < lows, lows, torch.where(rounded > highs, highs, rounded))
    return clipped * step


@given(shape=shapes, seed=seeds, data=st.data())
def test_fake_quantization_and_its_gradients_equal_plain_autograds(
    shape: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    axis, with_channel = data.draw(st.integers(1, len(shape) - 1)), data.draw(st.booleans())
    double = torch.float64
    channel = steps(shape[axis], seed + 9, dtype=double) if with_channel else None
    low, high = bounds(shape[0], seed, dtype=double)
    operands = [random(shape, seed, dtype=double), steps(shape[0], seed, dtype=double), low, high]
    upstream = random(shape, seed + 5, dtype=double)
    results = []
    for function in (fake_quantize_activation, plain_fake_quantize):
        leaves = [operand.clone().requires_grad_() for operand in operands]
        output = function(*leaves, channel, axis)
        results.append((output.detach(), *torch.autograd.grad(output, leaves, upstream)))
    for name, ours, theirs in zip(("output", "x", "scale", "low", "high"), *results, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("training", [True, False])
@given(shape=shapes, seed=seeds)
def test_fake_quantized_activations_are_exactly_their_codes_times_their_samples_scale(
    training: bool, shape: tuple[int, ...], seed: int
) -> None:
    x, scale, (low, high), axis = (
        random(shape, seed),
        steps(shape[0], seed),
        bounds(shape[0], seed),
        len(shape) - 1,
    )
    channel = steps(shape[axis], seed + 9)
    codes = numpy_codes(
        x.numpy(),
        np.arange(shape[0]),
        scale.numpy(),
        low.numpy(),
        high.numpy(),
        channel.numpy(),
        axis,
    )
    with torch.set_grad_enabled(training):
        found = fake_quantize_activation(x, scale, low, high, channel, axis)
    np.testing.assert_array_equal(found.numpy(), codes * along(scale.numpy(), 0, len(shape)))
    assert torch.equal(x, random(shape, seed))


@given(seed=seeds)
def test_round_ste_rounds_exactly_and_passes_the_gradient(seed: int) -> None:
    x = random((64,), seed).requires_grad_()
    rounded = round_ste(x)
    np.testing.assert_array_equal(rounded.detach().numpy(), np.rint(x.detach().numpy()))
    (gradient,) = torch.autograd.grad(rounded.sum(), x)
    assert (gradient == 1).all()


@given(shape=shapes, data=st.data())
def test_tables_broadcast_over_samples_and_along_the_channel_axis(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    axis, like = data.draw(st.integers(1, len(shape) - 1)), torch.zeros(shape)
    samples, channels = torch.arange(shape[0]), torch.arange(shape[axis])
    for index in np.ndindex(shape):
        assert (like + per_sample(samples, like))[index] == index[0]
        assert (like + per_channel(channels, like, axis))[index] == index[axis]
