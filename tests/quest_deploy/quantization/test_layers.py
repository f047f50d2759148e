from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quest_deploy.artifacts.checkpoint import ActivationQuantizerData, PerChannelQuantizerData
from quest_deploy.artifacts.scheme import Symmetry, usual_symmetry
from quest_deploy.quantization.affine import WeightGrid, per_sample, weight_codes
from quest_deploy.quantization.layers import (
    ActivationQuantizer,
    BucketState,
    PerChannelActivationQuantizer,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedMatmul,
)
from quest_deploy.quantization.model import _quantizer
from tests.helpers import (
    float32,
    kinds_checkpoint,
    numpy_codes,
    numpy_matmul,
    numpy_per_channel_codes,
    numpy_quantizer,
    of_sample,
    refused,
    relative_error,
)

SCALE, ZERO_POINT = torch.tensor([0.11, 0.5, 0.23]), torch.tensor([8.0, 0.0, 15.0])


def new_quantizer(
    bits: int = 4, *, channel: torch.Tensor | None = None, axis: int = 1
) -> ActivationQuantizer:
    """Three buckets, of which a batch of four samples uses 2, 0, 2 and 1."""
    buckets = BucketState()
    buckets.current = torch.tensor([2, 0, 2, 1])
    vector = torch.ones(6) if channel is None else channel
    return ActivationQuantizer(bits, SCALE, ZERO_POINT, vector, axis, buckets, usual_symmetry(bits))


@given(zero_points=st.lists(st.floats(-40, 40, width=32), min_size=3, max_size=3))
def test_asymmetric_bounds_are_integers_15_apart_that_include_zero_whatever_was_learned(
    zero_points: list[float],
) -> None:
    quantizer = new_quantizer()
    with torch.no_grad():
        quantizer.zero_point.copy_(torch.tensor(zero_points))
    _, low, high = quantizer.tables()
    np.testing.assert_array_equal(
        low.detach().numpy(), -np.rint(np.clip(float32(*zero_points), 0, 15))
    )
    assert ((high - low) == 15).all()


def test_symmetric_codes_run_from_minus_127_to_127_and_their_zero_point_does_not_learn() -> None:
    quantizer = new_quantizer(8)
    _, low, high = quantizer.tables()
    assert (low == -127).all()
    assert (high == 127).all()
    assert not quantizer.zero_point.requires_grad


def test_scales_start_exactly_at_their_calibrated_values_and_stay_positive() -> None:
    quantizer = new_quantizer()
    torch.testing.assert_close(quantizer.tables()[0], SCALE, rtol=0, atol=0)
    with torch.no_grad():
        quantizer.log_shift.copy_(torch.tensor([-20.0, 1.0, 20.0]))
    scale = quantizer.tables()[0].detach()
    assert (scale > 0).all()
    torch.testing.assert_close(scale, SCALE * torch.tensor([-20.0, 1.0, 20.0]).exp())


@pytest.mark.parametrize(("shape", "axis"), [((4, 6), 1), ((4, 3, 6), 2), ((4, 6, 2, 2), 1)])
@pytest.mark.parametrize("bits", [4, 8])
def test_each_sample_is_quantized_with_its_own_buckets_scale_and_bounds(
    shape: tuple[int, ...], axis: int, bits: int
) -> None:
    channel = torch.linspace(0.5, 2, 6)
    quantizer, x = (
        new_quantizer(bits, channel=channel, axis=axis),
        torch.randn(shape, generator=torch.Generator().manual_seed(0)),
    )
    scale, low, high = (table.detach().numpy() for table in quantizer.tables())
    bucket = np.asarray([2, 0, 2, 1])
    codes = numpy_codes(x.numpy(), bucket, scale, low, high, channel.numpy(), axis)
    np.testing.assert_array_equal(
        quantizer(x).detach().numpy(), codes * of_sample(scale, bucket, x.dim())
    )
    np.testing.assert_array_equal(quantizer.codes(x).detach().numpy(), codes)


def test_scale_and_zero_point_of_used_buckets_alone_receive_gradients() -> None:
    buckets = BucketState()
    buckets.current = torch.tensor([0, 2])
    quantizer = ActivationQuantizer(
        4, SCALE, ZERO_POINT, torch.ones(6), 1, buckets, Symmetry.ASYMMETRIC
    )
    quantizer(torch.tensor([[-9.0, 9.0] * 3, [-8.0, 7.0] * 3])).square().sum().backward()
    for parameter in (quantizer.log_shift, quantizer.zero_point):
        assert parameter.grad is not None
        assert (parameter.grad != 0).tolist() == [True, False, True]


def test_ones_along_the_tokens_of_a_product_take_any_number_of_tokens() -> None:
    quantizer, fitting = (new_quantizer(channel=torch.ones(tokens), axis=2) for tokens in (6, 4))
    x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    for method in ("forward", "codes", "ratio", "unquantized"):
        assert torch.equal(getattr(quantizer, method)(x), getattr(fitting, method)(x)), method
    ties = torch.ones_like(x, dtype=torch.bool)
    assert torch.equal(quantizer.untied(x, ties), fitting.untied(x, ties))


def test_a_quantizer_called_outside_its_model_says_so() -> None:
    with refused("QuantizedModel", error=RuntimeError):
        ActivationQuantizer(
            4, SCALE, ZERO_POINT, torch.ones(6), 1, BucketState(), Symmetry.ASYMMETRIC
        )(torch.zeros(4, 6))


def quantized(
    layer: nn.Conv2d | nn.Linear, quantizer: ActivationQuantizer, scale: torch.Tensor, bits: int
) -> QuantizedLayer:
    kind = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
    return kind(layer, layer.weight.detach(), WeightGrid.symmetric(scale, bits), quantizer)  # type: ignore[arg-type]


LAYERS = {
    "linear": lambda: (nn.Linear(6, 5), (4, 3, 6), 2),
    "linear without bias": lambda: (nn.Linear(6, 5, bias=False), (4, 6), 1),
    "conv": lambda: (nn.Conv2d(6, 5, 3, padding=1), (4, 6, 5, 5), 1),
    "strided conv": lambda: (
        nn.Conv2d(6, 5, (3, 2), stride=(2, 1), padding=(0, 1)),
        (4, 6, 5, 5),
        1,
    ),
    "grouped dilated conv": lambda: (
        nn.Conv2d(6, 4, 2, groups=2, dilation=2, bias=False),
        (4, 6, 5, 5),
        1,
    ),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_layer_is_scale_times_the_layer_on_codes_plus_bias(
    make: object, bits: int
) -> None:
    torch.manual_seed(0)
    layer, shape, axis = make()  # type: ignore[operator]
    x, quantizer = torch.randn(shape), new_quantizer(axis=axis)
    scale = torch.rand(layer.weight.shape[0]) * 0.05 + 0.01
    result = quantized(layer, quantizer, scale, bits)(x).detach()
    # In float64 on integer codes, with the scale applied after the product and the bias last, as
    # the deployed graph does it.
    integer = layer.double()
    bias = (
        0.0
        if layer.bias is None
        else layer.bias.detach().view(-1, *[1] * (x.dim() - 2) if x.dim() == 4 else ())
    )
    codes = weight_codes(layer.weight.detach().float(), WeightGrid.symmetric(scale, bits)).double()
    integer.weight.data = codes * scale.double().view(-1, *[1] * (codes.dim() - 1))
    integer.bias = None
    product = integer(quantizer.codes(x).detach().double()).detach()
    expected = product * per_sample(SCALE[[2, 0, 2, 1]].double(), product) + bias
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_does_not_own_its_quantizer() -> None:
    layer = quantized(nn.Linear(6, 5), new_quantizer(), torch.ones(5), 4)
    assert set(layer.state_dict()) == {
        "weight",
        "bias",
        "weight_scale",
        "weight_low",
        "weight_high",
    }
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}


def test_a_layer_copies_the_weights_it_was_made_from() -> None:
    linear = nn.Linear(6, 5)
    layer = quantized(linear, new_quantizer(), torch.ones(5), 4)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        linear.weight.zero_()
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=0)


KIND_SHAPES = {
    "padded": (4, 2, 6, 6),
    "free_conv": (4, 4, 3, 3),
    "plain": (4, 3, 5),
    "by_channel": (4, 3, 5),
    "by_token": (4, 3, 5),
    "attn.q": (4, 2, 3, 4),
    "attn.k": (4, 2, 4, 3),
    "attn.softmax": (4, 2, 3, 3),
    "attn.v": (4, 2, 3, 4),
}
KIND_BUCKET = np.asarray([2, 0, 2, 1])


def values_of(name: str) -> torch.Tensor:
    x = torch.randn(KIND_SHAPES[name], generator=torch.Generator().manual_seed(len(name))) * 2
    return x.softmax(-1) if name.endswith("softmax") else x


def buckets_of_kinds() -> BucketState:
    buckets = BucketState()
    buckets.current = torch.from_numpy(KIND_BUCKET)
    return buckets


@pytest.mark.parametrize("name", KIND_SHAPES)
def test_a_quantizer_of_every_kind_gives_exactly_its_sites_codes_and_values(name: str) -> None:
    quantizer, x = kinds_checkpoint(3).quantizers[name], values_of(name)
    found = _quantizer(quantizer, buckets_of_kinds())
    assert isinstance(
        found,
        ActivationQuantizer
        if isinstance(quantizer, ActivationQuantizerData)
        else PerChannelActivationQuantizer,
    )
    expected = numpy_quantizer(quantizer, x.numpy(), KIND_BUCKET).astype(np.float32)
    np.testing.assert_array_equal(found(x).detach().numpy(), expected)
    codes = found.codes(x).detach()
    if isinstance(quantizer, PerChannelQuantizerData):
        np.testing.assert_array_equal(
            codes.numpy(), numpy_per_channel_codes(quantizer, x.numpy(), KIND_BUCKET)
        )
        return
    assert codes.dtype is torch.int8
    scale, offset = (
        of_sample(table, KIND_BUCKET, x.dim()) for table in (quantizer.scale, quantizer.offset)
    )
    np.testing.assert_array_equal((codes.numpy() - offset) * scale, expected)


@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(0, 8))
def test_free_quantization_keeps_the_published_order_of_float32_operations_at_any_zero_point(
    seed: int, exponent: int
) -> None:
    rng = np.random.default_rng(seed)
    scale = rng.uniform(1e-4, 0.5, (3, 5)) * rng.choice([-1, 1], (3, 5))
    zero_point = np.rint(rng.uniform(-2, 2, (3, 5)) * 10.0**exponent)
    quantizer = PerChannelQuantizerData(
        "x", 8, 1, ("x",), scale.astype(np.float32), zero_point.astype(np.float32), 0, 255
    )
    # Half of a code apart, and so near -zero_point that the codes lie inside their range: ties,
    # which another order breaks otherwise.
    halves = rng.integers(0, 510, (4, 5, 6)) / 2
    x = (
        (halves - quantizer.zero_point[KIND_BUCKET][..., None])
        * quantizer.scale[KIND_BUCKET][..., None]
    ).astype(np.float32)
    found = _quantizer(quantizer, buckets_of_kinds())(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_array_equal(
        found, numpy_quantizer(quantizer, x, KIND_BUCKET).astype(np.float32)
    )


def test_unsigned_codes_run_from_0_to_255_and_their_zero_point_does_not_learn() -> None:
    quantizer = ActivationQuantizer(
        8, SCALE, torch.zeros(3), torch.ones(6), 1, buckets_of_kinds(), Symmetry.UNSIGNED
    )
    _, low, high = quantizer.tables()
    assert (low == 0).all()
    assert (high == 255).all()
    assert not quantizer.zero_point.requires_grad


def test_a_free_symmetric_quantizer_keeps_its_zero_point_and_any_other_learns_it() -> None:
    quantizers = {
        name: _quantizer(quantizer, BucketState())
        for name, quantizer in kinds_checkpoint().quantizers.items()
    }
    assert quantizers["free_conv"].learns_zero_point
    zero = np.zeros((2, 5), np.float32)
    symmetric = PerChannelQuantizerData("x", 8, 1, ("x",), zero + 1, zero, -127, 127)
    assert not _quantizer(symmetric, BucketState()).zero_point.requires_grad


def test_free_scales_and_zero_points_of_used_buckets_alone_receive_gradients() -> None:
    quantizer = kinds_checkpoint(3).quantizers["by_channel"]
    buckets = BucketState()
    buckets.current = torch.tensor([0, 2])
    found = _quantizer(quantizer, buckets)
    found(
        torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0)) * 100
    ).square().sum().backward()
    for parameter in (found.log_shift, found.zero_point):
        assert parameter.grad is not None
        assert (parameter.grad != 0).any(1).tolist() == [True, False, True]


@pytest.mark.parametrize("name", ["attn.scores", "attn.mix", "half.mix"])
def test_a_quantized_product_multiplies_its_quantized_operands_and_a_float_one_as_it_is(
    name: str,
) -> None:
    checkpoint, buckets = kinds_checkpoint(3), buckets_of_kinds()
    first, second = checkpoint.matmuls[name].sites
    operands = ("attn.q", "attn.k") if name == "attn.scores" else ("attn.softmax", "attn.v")
    a, b = (values_of(operand) for operand in operands)
    quantizers = tuple(
        None if quantizer is None else _quantizer(checkpoint.quantizers[quantizer], buckets)
        for quantizer in (first, second)
    )
    found = QuantizedMatmul((quantizers[0], quantizers[1]))
    assert (
        relative_error(
            found(a, b).detach().numpy(),
            numpy_matmul(checkpoint, name, a.numpy(), b.numpy(), KIND_BUCKET),
        )
        < 1e-6
    )
    assert not list(found.parameters())
