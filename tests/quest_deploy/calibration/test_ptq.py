from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quest_deploy.artifacts.checkpoint import (
    ActivationQuantizerData,
    Checkpoint,
    PerChannelQuantizerData,
)
from quest_deploy.artifacts.scheme import (
    SUPPORTED_BITS,
    Granularity,
    Scheme,
    Symmetry,
    weight_range,
)
from quest_deploy.calibration.ptq import (
    CalibrationOptions,
    RangeMethod,
    _activation_ranges,
    _Reservoir,
    _weight_scale,
    calibrate,
)
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.quantization.model import fold_smoothing_scale
from quest_deploy.quantization.prepare import Product, prepare
from tests.helpers import Array, refused

BUCKETS = 2


class Net(nn.Module):
    """A conv, a pair of linears that share their input, a grouped conv; called like a UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"_class_name": "Net", "channels": (4, 8)}
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.norm(self.stem(sample * (1 + timestep.view(-1, 1, 1, 1) / 250)))
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        x = x + (self.a(tokens) * self.b(tokens)).transpose(1, 2).view_as(x)
        output: Tensor = self.head(torch.relu(self.grouped(x)))
        return output


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def recorded() -> Trajectories:
    sample = torch.randn(4, 2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    return Trajectories(sample, torch.tensor([900.0, 600.0, 400.0, 0.0]), sample.clone(), {})


def quantize(
    net: nn.Module,
    recorded: Trajectories,
    *,
    bits: str = "w4a4",
    granularity: Granularity = Granularity.PER_TENSOR,
    **options: object,
) -> Checkpoint:
    scheme = Scheme.parse(bits, buckets=BUCKETS, granularity=granularity)
    return calibrate("net", net, recorded, scheme, CalibrationOptions(**options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def minmax(net: nn.Module, recorded: Trajectories) -> Checkpoint:
    return quantize(net, recorded, method=RangeMethod.MINMAX)


@pytest.fixture(scope="module")
def mse(net: nn.Module, recorded: Trajectories) -> Checkpoint:
    return quantize(net, recorded, method=RangeMethod.MSE)


@pytest.fixture(scope="module")
def folded(net: nn.Module, recorded: Trajectories) -> Checkpoint:
    return quantize(net, recorded, granularity=Granularity.FOLDED_CHANNEL)


def inputs_of(
    net: nn.Module, recorded: Trajectories, checkpoint: Checkpoint
) -> Iterator[tuple[str, int, Array]]:
    """Every value that each quantizer sees in each bucket, seen without the calibration's own
    recorder.
    """
    for name in checkpoint.quantizers:
        seen: dict[int, list[Array]] = {}

        def keep(
            module: nn.Module,
            args: tuple[Tensor, ...],
            timestep: list[Tensor],
            seen: dict[int, list[Array]] = seen,
        ) -> None:
            for row, t in zip(args[0], timestep[0], strict=True):
                seen.setdefault(checkpoint.scheme.bucket_of(float(t)), []).append(
                    row.detach().numpy()
                )

        current: list[Tensor] = []
        handle = net.get_submodule(name).register_forward_pre_hook(
            lambda m, a, c=current, k=keep: k(m, a, c)
        )
        for batch in recorded.batches(8):
            current[:] = [batch["timestep"]]
            net(**batch)
        handle.remove()
        for bucket, rows in seen.items():
            yield name, bucket, np.stack(rows)


def test_minmax_ranges_are_those_of_all_values_that_a_quantizer_sees_in_a_bucket(
    net: nn.Module, recorded: Trajectories, minmax: Checkpoint
) -> None:
    visited = 0
    for name, bucket, values in inputs_of(net, recorded, minmax):
        quantizer, low, high = minmax.quantizers[name], min(values.min(), 0), max(values.max(), 0)
        expected = np.abs(values).max() / 127 if quantizer.bits == 8 else (high - low) / 15
        assert quantizer.scale[bucket] == pytest.approx(expected, rel=1e-6), name
        if quantizer.bits == 4:
            assert quantizer.low[bucket] == np.clip(np.rint(low / np.float32(expected)), -15, 0)
        visited += 1
    assert visited == BUCKETS * len(minmax.quantizers)


def test_the_extremes_survive_when_a_quantizer_sees_more_values_than_are_kept(
    net: nn.Module, recorded: Trajectories, minmax: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quest_deploy.calibration.ptq.VALUES_PER_QUANTIZER", 1)
    monkeypatch.setattr("quest_deploy.calibration.ptq.FEWEST_VALUES", 16)
    few = quantize(net, recorded, method=RangeMethod.MINMAX)
    for name, quantizer in minmax.quantizers.items():
        np.testing.assert_array_equal(few.quantizers[name].scale, quantizer.scale, err_msg=name)


def test_minmax_keeps_no_values_since_it_searches_for_no_range(
    net: nn.Module, recorded: Trajectories, minmax: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(_Reservoir, "add")
    again = quantize(net, recorded, method=RangeMethod.MINMAX)
    for name, quantizer in minmax.quantizers.items():
        np.testing.assert_array_equal(again.quantizers[name].scale, quantizer.scale, err_msg=name)


def activation_error(quantizer_values: Array, scale: Array, low: Array, high: Array) -> float:
    return float(
        np.square(
            np.clip(np.rint(quantizer_values / scale), low, high) * scale - quantizer_values
        ).mean()
    )


def test_mse_ranges_have_the_least_error_of_all_shrunken_minmax_ranges(
    net: nn.Module, recorded: Trajectories, minmax: Checkpoint, mse: Checkpoint
) -> None:
    improved = 0
    for name, bucket, values in inputs_of(net, recorded, mse):
        quantizer, full = mse.quantizers[name], minmax.quantizers[name]
        found = activation_error(
            values, quantizer.scale[bucket], quantizer.low[bucket], quantizer.high[bucket]
        )
        for factor in np.linspace(1, 0.2, 81):
            scale = full.scale[bucket] * np.float32(factor)
            assert found <= activation_error(values, scale, full.low[bucket], full.high[bucket]) * (
                1 + 1e-3
            ), (name, factor)
        improved += found < activation_error(
            values, full.scale[bucket], full.low[bucket], full.high[bucket]
        )
    assert improved


@pytest.mark.parametrize("name", ["stem", "a", "b", "grouped", "head"])
def test_mse_weight_scales_are_no_worse_than_minmax_in_any_output_channel(
    net: nn.Module, minmax: Checkpoint, mse: Checkpoint, name: str
) -> None:
    weight = net.get_parameter(f"{name}.weight").detach().numpy()

    def errors(checkpoint: Checkpoint) -> Array:
        return (
            np.square(checkpoint.layers[name].dequantized_weight - weight)
            .reshape(len(weight), -1)
            .mean(1)
        )

    assert (errors(mse) <= errors(minmax) * (1 + 1e-5)).all()


def test_minmax_weight_scales_clip_nothing_and_use_the_whole_range(
    net: nn.Module, minmax: Checkpoint
) -> None:
    for name, layer in minmax.layers.items():
        weight = net.get_parameter(f"{name}.weight").detach().numpy()
        low, high = weight_range(layer.weight_bits)
        half_step = layer.weight_scale.reshape(-1, *[1] * (weight.ndim - 1)) / 2
        assert (np.abs(layer.dequantized_weight - weight) <= half_step * (1 + 1e-4)).all()
        flat = layer.weight_codes.reshape(len(weight), -1)
        assert ((flat.min(1) == low) | (flat.max(1) == high)).all()


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_bits_codes_and_bounds_are_those_of_the_scheme(
    net: nn.Module, recorded: Trajectories, bits: str
) -> None:
    checkpoint = quantize(net, recorded, bits=bits)
    scheme, ends = checkpoint.scheme, {"stem", "head"}
    for name, layer in checkpoint.layers.items():
        assert layer.weight_bits == (8 if name in ends else scheme.weight_bits)
        low, high = weight_range(layer.weight_bits)
        assert low <= layer.weight_codes.min() <= layer.weight_codes.max() <= high
    for name, quantizer in checkpoint.quantizers.items():
        assert quantizer.bits == (8 if name in ends else scheme.activation_bits)
        if quantizer.bits == 8:
            assert (quantizer.low == -127).all()
            assert (quantizer.high == 127).all()
        else:
            assert (
                (quantizer.low >= -15)
                & (quantizer.low <= 0)
                & (quantizer.low == np.rint(quantizer.low))
                & (quantizer.high - quantizer.low == 15)
            ).all()


def test_a_per_tensor_scheme_has_smoothing_scales_of_ones(mse: Checkpoint) -> None:
    assert all((quantizer.channel == 1).all() for quantizer in mse.quantizers.values())


def test_smoothing_scales_balance_activations_against_weights(
    net: nn.Module, recorded: Trajectories, folded: Checkpoint
) -> None:
    amax: dict[str, Array] = {}
    for name, _, values in inputs_of(net, recorded, folded):
        largest = (
            np.abs(np.moveaxis(values, folded.quantizers[name].axis, -1))
            .reshape(-1, len(folded.quantizers[name].channel))
            .max(0)
        )
        amax[name] = np.maximum(amax.get(name, largest), largest)
    for name in ("stem", "a", "head"):
        quantizer = folded.quantizers[name]
        readers = [
            net.get_parameter(f"{layer}.weight").detach().numpy() for layer in quantizer.layers
        ]
        weight = np.max([np.abs(w).reshape(*w.shape[:2], -1).max((0, 2)) for w in readers], axis=0)
        expected = np.sqrt(amax[name] / weight)
        np.testing.assert_allclose(
            quantizer.channel, expected / np.exp(np.log(expected).mean()), rtol=1e-4
        )
    assert all(
        np.log(quantizer.channel).mean() == pytest.approx(0, abs=1e-5)
        for quantizer in folded.quantizers.values()
    )


def test_weights_are_quantized_with_the_smoothing_scale_folded_in(
    net: nn.Module, folded: Checkpoint
) -> None:
    for name, layer in folded.layers.items():
        weight = fold_smoothing_scale(
            net.get_parameter(f"{name}.weight").detach(),
            torch.from_numpy(folded.quantizer_of(name).channel),
        ).numpy()
        low, high = weight_range(layer.weight_bits)
        codes = np.clip(
            np.rint(weight / layer.weight_scale.reshape(-1, *[1] * (weight.ndim - 1))), low, high
        )
        np.testing.assert_array_equal(layer.weight_codes, codes)


def test_bias_and_unquantized_parameters_are_kept_as_they_are(
    net: nn.Module, mse: Checkpoint
) -> None:
    assert mse.floats.keys() == {"norm.weight", "norm.bias"}
    np.testing.assert_array_equal(
        mse.floats["norm.weight"], net.get_parameter("norm.weight").detach().numpy()
    )
    assert mse.layers["b"].bias is None
    for name in ("stem", "a", "grouped", "head"):
        np.testing.assert_array_equal(
            mse.layers[name].bias, net.get_parameter(f"{name}.bias").detach().numpy()
        )


def test_the_same_seed_gives_the_same_checkpoint(
    net: nn.Module, recorded: Trajectories, mse: Checkpoint
) -> None:
    again = quantize(net, recorded, method=RangeMethod.MSE)
    for name, quantizer in mse.quantizers.items():
        for table in ("scale", "low", "high", "channel"):
            np.testing.assert_array_equal(
                getattr(quantizer, table), getattr(again.quantizers[name], table)
            )
    for name, layer in mse.layers.items():
        np.testing.assert_array_equal(layer.weight_codes, again.layers[name].weight_codes)


def test_a_bucket_that_was_never_visited_is_an_input_error_that_names_it(
    net: nn.Module, recorded: Trajectories
) -> None:
    late = dataclasses.replace(recorded, timestep=recorded.timestep / 4)
    with refused("buckets", [1]):
        quantize(net, late)


def test_calibration_leaves_the_float_model_as_it_was_and_reports_progress_to_the_end(
    recorded: Trajectories,
) -> None:
    torch.manual_seed(3)
    net = Net().eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    last: dict[str, tuple[int, int]] = {}
    calibrate(
        "net",
        net,
        recorded,
        Scheme.parse("w4a4", buckets=BUCKETS),
        CalibrationOptions(),
        lambda s, d, t: last.update({s: (d, t)}),
    )
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert set(last) == {"activation values", "activation scales", "weight scales"}
    assert all(done == total for done, total in last.values())


def test_a_reservoir_keeps_each_row_of_any_batch_equally_often() -> None:
    generator, sizes, kept, trials = torch.Generator().manual_seed(0), (3, 40, 1, 12), 8, 3000
    rows, counts = torch.arange(sum(sizes), dtype=torch.float32)[:, None], torch.zeros(sum(sizes))
    for _ in range(trials):
        reservoir = _Reservoir(kept)
        for batch in rows.split(sizes):
            reservoir.add(batch, generator)
        chosen = reservoir.rows[:, 0].long()
        assert len(chosen.unique()) == kept
        counts[chosen] += 1
    share = kept / len(rows)
    spread = (trials * share * (1 - share)) ** 0.5
    assert (counts - trials * share).abs().max() < 4.5 * spread
    # The rows of a batch together, since an early or a late batch would be favoured as a whole.
    for batch in counts.split(sizes):
        assert (batch.mean() - trials * share).abs() < 4.5 * spread / len(batch) ** 0.5


def test_a_reservoir_holds_every_row_until_it_is_full_and_knows_where_each_came_from() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, reservoir = torch.randn(50, 3, generator=generator), _Reservoir(20)
    batches = rows[:12], rows[12:20], rows[20:]
    for batch in batches[:2]:
        reservoir.add(batch, generator)
    assert sorted(reservoir.rows.tolist()) == sorted(rows[:20].tolist())
    reservoir.add(batches[2], generator)
    assert reservoir.rows.shape == (20, 3)
    for row, place in zip(reservoir.rows, reservoir.places.tolist(), strict=True):
        assert any(place < len(batch) and torch.equal(batch[place], row) for batch in batches)


@pytest.mark.parametrize("method", [RangeMethod.MSE, RangeMethod.L24])
def test_a_range_searched_on_a_sample_is_about_that_of_all_values(method: RangeMethod) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(400_000, 1, generator=generator).pow(3)
    extremes = torch.stack([values.amin(0), values.amax(0)])
    sample = values[torch.randperm(len(values), generator=generator)[:8000]]
    of_all, _ = _activation_ranges(values, extremes, 4, Symmetry.ASYMMETRIC, method)
    of_sample, _ = _activation_ranges(sample, extremes, 4, Symmetry.ASYMMETRIC, method)
    assert of_all[0] < 0.6 * (extremes[1] - extremes[0]) / 15
    torch.testing.assert_close(of_sample, of_all, rtol=0.2, atol=0)


def test_a_reservoir_keeps_the_same_rows_of_a_large_batch_as_of_its_parts() -> None:
    rows, parts = torch.arange(5000.0).view(50, 100, 1), []
    for batches in ([rows], rows.split(3)):
        reservoir, generator = _Reservoir(20), torch.Generator().manual_seed(0)
        for batch in batches:
            reservoir.add(batch, generator)
        parts.append(sorted(reservoir.rows.flatten().tolist()))
    assert parts[0] == parts[1]


def test_a_reservoir_takes_the_same_rows_of_values_that_lie_apart_in_memory() -> None:
    rows, found = torch.randn(7, 6, 5, generator=torch.Generator().manual_seed(0)), []
    for batch in (rows.transpose(0, 1), rows.transpose(0, 1).contiguous().view(42, 5)):
        reservoir = _Reservoir(10)
        reservoir.add(batch, torch.Generator().manual_seed(1))
        found.append(reservoir)
    assert torch.equal(found[0].rows, found[1].rows)
    assert torch.equal(found[0].places, found[1].places)


def heavy_tailed(columns: int) -> Tensor:
    return torch.randn(2000, columns, generator=torch.Generator().manual_seed(4)).pow(3)


@pytest.mark.parametrize("symmetry", [Symmetry.ASYMMETRIC, Symmetry.UNSIGNED, Symmetry.SYMMETRIC])
def test_each_search_is_the_best_of_all_methods_on_its_own_measure_of_activations(
    symmetry: Symmetry,
) -> None:
    bits = 8 if symmetry is Symmetry.SYMMETRIC else 4
    values = heavy_tailed(5).abs() if symmetry is Symmetry.UNSIGNED else heavy_tailed(5)
    extremes = torch.stack([values.amin(0), values.amax(0)])
    low, high = (-127, 127) if bits == 8 else (0, 15)
    errors: dict[tuple[RangeMethod, float], Array] = {}
    for method in RangeMethod:
        scale, zero_point = (
            table.double().numpy()
            for table in _activation_ranges(values, extremes, bits, symmetry, method)
        )
        codes = np.clip(np.rint(values.numpy() / scale), low - zero_point, high - zero_point)
        for power in (2, 2.4):
            errors[method, power] = (np.abs(codes * scale - values.numpy()) ** power).mean(0)
    for best, power in ((RangeMethod.MSE, 2), (RangeMethod.L24, 2.4)):
        for other in RangeMethod:
            assert (errors[best, power] <= errors[other, power] * (1 + 1e-4)).all()
        assert (errors[best, power] < errors[RangeMethod.MINMAX, power]).all() or bits == 8
    if bits == 4:
        assert (errors[RangeMethod.L24, 2.4] < errors[RangeMethod.MSE, 2.4]).any()


@pytest.mark.parametrize("bits", [4, 7, 8])
def test_each_search_is_the_best_of_all_methods_on_its_own_measure_of_weights(bits: int) -> None:
    weight, (low, high) = heavy_tailed(6).T.contiguous(), weight_range(bits)

    def error(method: RangeMethod, power: float) -> Array:
        scale = _weight_scale(weight, bits, method).double().numpy()[:, None]
        codes = np.clip(np.rint(weight.numpy() / scale), low, high)
        return (np.abs(codes * scale - weight.numpy()) ** power).mean(1)

    for best, power in ((RangeMethod.MSE, 2), (RangeMethod.L24, 2.4)):
        assert all(
            (error(best, power) <= error(other, power) * (1 + 1e-4)).all() for other in RangeMethod
        )


def test_free_minmax_ranges_are_those_of_each_channel_alone_in_each_bucket(
    net: nn.Module, recorded: Trajectories
) -> None:
    checkpoint = quantize(
        net, recorded, granularity=Granularity.PER_CHANNEL, method=RangeMethod.MINMAX
    )
    for name, bucket, values in inputs_of(net, recorded, checkpoint):
        quantizer = checkpoint.quantizers[name]
        assert isinstance(quantizer, PerChannelQuantizerData)
        columns = np.moveaxis(values, quantizer.axis, -1).reshape(-1, quantizer.scale.shape[1])
        low, high = np.minimum(columns.min(0), 0), np.maximum(columns.max(0), 0)
        if quantizer.bits == 8:
            assert (quantizer.code_low, quantizer.code_high) == (-127, 127)
            np.testing.assert_allclose(
                quantizer.scale[bucket], np.maximum(np.abs(columns).max(0) / 127, 1e-8), rtol=1e-6
            )
            assert not quantizer.zero_point.any()
        else:
            assert (quantizer.code_low, quantizer.code_high) == (0, 15)
            np.testing.assert_allclose(
                quantizer.scale[bucket], np.maximum((high - low) / 15, 1e-8), rtol=1e-6
            )
            assert (
                np.abs(quantizer.zero_point[bucket] + low / quantizer.scale[bucket]) <= 0.5 + 1e-4
            ).all()


def test_attention_operands_have_one_scale_a_bucket_and_the_softmaxs_codes_begin_at_zero(
    mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    scheme = Scheme.parse(
        "w4a4", buckets=3, granularity=Granularity.PER_CHANNEL, attention_bits=4, softmax_bits=8
    )
    checkpoint = calibrate(
        "mini", mini_unet, mini_trajectories, scheme, CalibrationOptions(RangeMethod.MINMAX)
    )
    seen: dict[tuple[str, int], list[Array]] = {}
    model, now = prepare(copy.deepcopy(mini_unet), {}, checkpoint.architecture.attention), []
    for name, module in model.named_modules():
        if isinstance(module, Product):
            attention = name.rpartition(".")[0]

            def keep(
                m: Product, args: tuple[Tensor, ...], output: Tensor, attention: str = attention
            ) -> None:
                for operand, x in zip(m.operands, args, strict=True):
                    for row, t in zip(x, now[0], strict=True):
                        seen.setdefault(
                            (f"{attention}.{operand}", scheme.bucket_of(float(t))), []
                        ).append(row.numpy())

            module.register_forward_hook(keep)
    for batch in mini_trajectories.batches(8):
        now[:] = [batch["timestep"]]
        model(**batch)
    operands = {quantizer for product in checkpoint.matmuls.values() for quantizer in product.sites}
    assert operands == {name for name, _ in seen}
    assert {
        name
        for name, quantizer in checkpoint.quantizers.items()
        if isinstance(quantizer, ActivationQuantizerData)
    } == operands
    for (name, bucket), rows in seen.items():
        quantizer, values = checkpoint.quantizers[name], np.stack(rows)
        assert isinstance(quantizer, ActivationQuantizerData)
        assert (quantizer.channel == 1).all()
        if name.endswith(".softmax"):
            assert (quantizer.bits, quantizer.symmetry) == (8, Symmetry.UNSIGNED)
            assert (quantizer.low == 0).all()
            assert (quantizer.high == 255).all()
            assert quantizer.scale[bucket] == pytest.approx(values.max() / 255, rel=1e-5)
        else:
            assert (quantizer.bits, quantizer.symmetry) == (4, Symmetry.ASYMMETRIC)
            assert quantizer.scale[bucket] == pytest.approx(
                (max(values.max(), 0) - min(values.min(), 0)) / 15, rel=1e-5
            )
