from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from quest_deploy.artifacts.checkpoint import Architecture, Checkpoint
from quest_deploy.artifacts.scheme import Scheme, weight_range
from quest_deploy.evaluation.memory import peak_memory, reset_peak_memory
from quest_deploy.quantization.affine import WeightGrid, per_channel, weight_codes
from quest_deploy.quantization.layers import ActivationQuantizer, BucketState
from quest_deploy.quantization.model import (
    CODE_MARGIN,
    QuantizedModel,
    _nearest_with_codes,
    build_float_model,
    conv_geometry,
    fold_smoothing_scale,
)
from tests.helpers import numpy_layer, refused, relative_error

Inputs = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(small_checkpoint: Checkpoint) -> QuantizedModel:
    return QuantizedModel.from_checkpoint(small_checkpoint).eval()


@pytest.fixture(scope="module")
def double(small_checkpoint: Checkpoint) -> QuantizedModel:
    """In float64, where runs that should agree do not differ by flipped ties."""
    return QuantizedModel.from_checkpoint(small_checkpoint).eval().double()


def test_a_deployed_models_weights_stay_the_same_where_they_are_frozen(
    small_checkpoint: Checkpoint,
) -> None:
    for layer in QuantizedModel.from_checkpoint(small_checkpoint).quantized_layers().values():
        before = layer.weight.clone()
        layer.freeze()
        assert torch.equal(layer.weight, before)


def in_double(inputs: Inputs, rows: slice = slice(None)) -> Inputs:
    return {name: value[rows].double() for name, value in inputs.items()}


@given(buckets=st.integers(1, 1000), timesteps=st.lists(st.floats(0, 1000, width=32), min_size=1))
def test_the_models_buckets_are_the_schemes(buckets: int, timesteps: list[float]) -> None:
    assert_same_buckets(Scheme.parse("w4a4", buckets=buckets), timesteps)


@pytest.mark.parametrize("buckets", [3, 6, 7, 20, 999])
def test_model_and_scheme_agree_on_float32_timesteps_on_and_next_to_every_edge(
    buckets: int,
) -> None:
    scheme = Scheme.parse("w4a4", buckets=buckets)
    edges = np.asarray(scheme.bucket_edges, np.float32)
    around = np.concatenate(
        [edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(2000))]
    )
    assert_same_buckets(scheme, around.tolist())


def assert_same_buckets(scheme: Scheme, timesteps: list[float]) -> None:
    empty = Checkpoint("none", Architecture("none", {}, {}, None), scheme, {}, {}, {})
    found = QuantizedModel(nn.Identity(), empty).bucket_of(torch.tensor(timesteps))
    assert found.tolist() == [scheme.bucket_of(t) for t in timesteps]


def test_every_layer_computes_what_its_codes_say(
    model: QuantizedModel, small_checkpoint: Checkpoint, small_inputs: Inputs
) -> None:
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.register_forward_hook(
            lambda m, a, o, n=name: seen.__setitem__(n, (a[0].detach(), o.detach()))
        )
        for name, layer in model.quantized_layers().items()
    ]
    model(**small_inputs)
    for handle in handles:
        handle.remove()
    bucket = model.bucket_of(small_inputs["timestep"]).numpy()
    assert seen.keys() == small_checkpoint.layers.keys()
    for name, (x, y) in seen.items():
        assert (
            relative_error(y.numpy(), numpy_layer(small_checkpoint, name, x.numpy(), bucket)) < 2e-6
        ), name


def test_a_tensor_that_layers_read_in_turn_is_quantized_once_with_the_same_gradients(
    double: QuantizedModel, small_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize, parameters = (
        ActivationQuantizer._quantized,
        [p for p in double.parameters() if p.requires_grad],
    )
    read: list[tuple[int, int]] = []

    def counted(quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
        read.append((id(quantizer), id(x)))
        return quantize(quantizer, x)

    def run() -> tuple[Tensor, ...]:
        output = double(**in_double(small_inputs))
        return output, *torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)

    monkeypatch.setattr(ActivationQuantizer, "_quantized", counted)
    shared, once = run(), len(read)
    monkeypatch.setattr(BucketState, "once", lambda state, quantizer, x, quantize: quantize(x))
    for ours, theirs in zip(shared, run(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert once < len(read) - once


def test_a_quantizer_that_is_called_alone_quantizes_each_time_anew(model: QuantizedModel) -> None:
    quantizer = next(
        s for s in model.activation_quantizers().values() if isinstance(s, ActivationQuantizer)
    )
    x = torch.randn(
        2, *[len(quantizer.channel) if axis == quantizer.axis % 4 else 4 for axis in range(1, 4)]
    )
    with model.at_timesteps(torch.zeros(2)):
        assert quantizer(x) is not quantizer(x)


@torch.no_grad()
def test_a_batch_that_mixes_timesteps_equals_each_sample_alone(
    double: QuantizedModel, small_inputs: Inputs
) -> None:
    together = double(**in_double(small_inputs))
    alone = torch.cat(
        [double(**in_double(small_inputs, slice(i, i + 1))) for i in range(len(together))]
    )
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_scalar_timestep_serves_the_whole_batch(
    double: QuantizedModel, small_inputs: Inputs
) -> None:
    inputs = in_double(small_inputs)
    vector = double(**{**inputs, "timestep": torch.full((5,), 300.0)})
    torch.testing.assert_close(
        double(**{**inputs, "timestep": torch.tensor(300.0)}), vector, rtol=0, atol=0
    )


@torch.no_grad()
def test_the_buckets_scales_matter(
    double: QuantizedModel, small_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = in_double(small_inputs)
    own = double(**inputs)
    monkeypatch.setattr(double, "bucket_of", lambda t: torch.zeros_like(t, dtype=torch.int64))
    differs = (double(**inputs) - own).abs().flatten(1).amax(1) > 1e-6
    expected = [
        bucket != 0
        for bucket in map(double.checkpoint.scheme.bucket_of, small_inputs["timestep"].tolist())
    ]
    assert differs.tolist() == expected


def test_no_bucket_is_left_behind_by_a_forward_pass_that_fails(
    model: QuantizedModel, small_inputs: Inputs
) -> None:
    with pytest.raises(RuntimeError):
        model(**{**small_inputs, "encoder_hidden_states": torch.zeros(5, 3, 99)})
    with refused("QuantizedModel", "bucket", error=RuntimeError):
        model.bucket_state.get()


def assert_same_quantization(found: Checkpoint, expected: Checkpoint) -> None:
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        np.testing.assert_array_equal(
            found.layers[name].weight_codes, layer.weight_codes, err_msg=name
        )
        np.testing.assert_array_equal(
            found.layers[name].weight_scale, layer.weight_scale, err_msg=name
        )
        assert (found.layers[name].bias is None) == (layer.bias is None)
        if layer.bias is not None:
            np.testing.assert_array_equal(found.layers[name].bias, layer.bias, err_msg=name)
    for name, quantizer in expected.quantizers.items():
        for table in ("scale", "low", "high", "channel"):
            np.testing.assert_array_equal(
                getattr(found.quantizers[name], table),
                getattr(quantizer, table),
                err_msg=f"{name}.{table}",
            )
    assert found.floats.keys() == expected.floats.keys()
    for key, value in expected.floats.items():
        np.testing.assert_array_equal(found.floats[key], value, err_msg=key)


def test_a_checkpoint_made_into_a_model_gives_the_same_checkpoint_back(
    model: QuantizedModel, small_checkpoint: Checkpoint
) -> None:
    back = model.to_checkpoint({"method": "test"})
    assert_same_quantization(back, small_checkpoint)
    assert back.provenance == {"method": "test"}
    assert (back.architecture, back.scheme, back.model) == (
        small_checkpoint.architecture,
        small_checkpoint.scheme,
        small_checkpoint.model,
    )


def test_over_the_teachers_unrounded_weights_the_checkpoint_comes_out_the_same(
    small_unet: nn.Module, small_checkpoint: Checkpoint
) -> None:
    student = QuantizedModel.from_checkpoint(small_checkpoint, small_unet)
    assert_same_quantization(student.to_checkpoint({}), small_checkpoint)
    weight = student.quantized_layers()["conv_in"].weight.detach()
    channel = torch.from_numpy(small_checkpoint.quantizer_of("conv_in").channel)
    torch.testing.assert_close(
        weight, small_unet.get_parameter("conv_in.weight").detach() * channel.view(1, -1, 1, 1)
    )


def test_over_the_teachers_weights_a_rounding_that_was_learned_stays_and_the_weights_are_as_near_as_it_allows(
    small_unet: nn.Module, small_checkpoint: Checkpoint
) -> None:
    rng, layers = np.random.default_rng(0), {}
    for name, layer in small_checkpoint.layers.items():
        codes = layer.weight_codes + rng.integers(-1, 2, layer.weight_codes.shape, dtype=np.int8)
        layers[name] = dataclasses.replace(
            layer, codes=np.clip(codes, *weight_range(layer.weight_bits)).astype(np.int8)
        )
    learned = changed(small_checkpoint, layers=layers)
    student = QuantizedModel.from_checkpoint(learned, small_unet)
    assert_same_quantization(student.to_checkpoint({}), learned)
    usual = QuantizedModel.from_checkpoint(small_checkpoint, small_unet).quantized_layers()
    for name, layer in student.quantized_layers().items():
        same = torch.from_numpy(
            layers[name].weight_codes == small_checkpoint.layers[name].weight_codes
        )
        assert 0 < same.sum() < same.numel()
        assert torch.equal(layer.weight[same], usual[name].weight[same]), name


@given(bits=st.sampled_from([4, 8]), asymmetric=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_the_nearest_weight_rounds_to_any_given_codes_and_moves_only_the_margin_farther_than_it_must(
    bits: int, asymmetric: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(3, generator=generator) * 0.2 + 0.01
    low = -torch.randint(0, 2**bits, (3,), generator=generator).float()
    grid = (
        WeightGrid(scale, low, low + 2**bits - 1)
        if asymmetric
        else WeightGrid.symmetric(scale, bits)
    )
    weight = torch.randn(3, 40, generator=generator) * scale[:, None] * 2**bits
    codes = torch.randint(-(2**bits), 2**bits, (3, 40), generator=generator)
    codes = torch.maximum(torch.minimum(codes, grid.high[:, None]), grid.low[:, None]).to(
        torch.int16
    )
    codes[:, :10] = weight_codes(weight, grid)[:, :10]
    nearest = _nearest_with_codes(weight, codes, grid)
    assert torch.equal(weight_codes(nearest, grid), codes)
    assert torch.equal(nearest[:, :10], weight[:, :10])
    ratio = (weight / scale[:, None]).double()
    needed = ((ratio - codes).abs() - 0.5).clamp(min=0)
    assert (
        ((nearest - weight) / scale[:, None]).abs().double()
        <= needed + CODE_MARGIN + 1e-3 + 1e-5 * ratio.abs()
    ).all()
    changed = weight_codes(weight, grid) != codes
    inside = 0.5 - ((nearest / scale[:, None]).double() - codes).abs()
    assert (inside[changed] > CODE_MARGIN - 1e-3).all()


def test_the_teacher_itself_is_left_alone(
    small_unet: nn.Module, small_checkpoint: Checkpoint
) -> None:
    QuantizedModel.from_checkpoint(small_checkpoint, small_unet)
    assert isinstance(small_unet.get_submodule("conv_in"), nn.Conv2d)


@torch.no_grad()
def test_without_rounding_the_quantized_model_is_the_float_model(
    small_unet: nn.Module, small_checkpoint: Checkpoint, small_inputs: Inputs
) -> None:
    student = QuantizedModel.from_checkpoint(small_checkpoint, small_unet)
    for layer in student.quantized_layers().values():
        # The layer without its quantizers: only the folded smoothing scale and its inverse are
        # left.
        layer.forward = lambda x, m=layer: m.compute(
            x / per_channel(m.site.channel, x, m.site.axis), m.weight
        )  # type: ignore[method-assign, misc]
    expected = small_unet(**small_inputs, return_dict=False)[0]
    torch.testing.assert_close(student(**small_inputs), expected, rtol=1e-3, atol=1e-4)


def changed(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    return dataclasses.replace(checkpoint, **changes)


def test_a_checkpoint_that_lacks_a_parameter_or_has_a_strange_one_is_refused_by_name(
    small_checkpoint: Checkpoint,
) -> None:
    fewer = {k: v for k, v in small_checkpoint.floats.items() if k != "conv_norm_out.weight"}
    with refused("conv_norm_out.weight"):
        QuantizedModel.from_checkpoint(changed(small_checkpoint, floats=fewer))
    more = {**small_checkpoint.floats, "strange": np.zeros(1, np.float32)}
    with refused("strange"):
        QuantizedModel.from_checkpoint(changed(small_checkpoint, floats=more))


def test_a_float_parameter_of_another_shape_is_an_input_error(small_checkpoint: Checkpoint) -> None:
    floats = {**small_checkpoint.floats, "conv_norm_out.weight": np.zeros(3, np.float32)}
    with refused("conv_norm_out.weight"):
        QuantizedModel.from_checkpoint(changed(small_checkpoint, floats=floats))


@pytest.mark.parametrize("name", ["NoSuchModel", "DDIMScheduler", "logging", "__doc__"])
def test_an_architecture_that_is_no_diffusers_model_is_refused(name: str) -> None:
    with refused(name):
        build_float_model(Architecture(name, {}, {}, None))


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"block_out_channels": [16000, 16000]}, "conv_norm_out.weight"),
        ({"layers_per_block": 10**9}, "layers_per_block"),
        ({"transformer_layers_per_block": 10**9}, "transformer_layers_per_block"),
        ({"down_block_types": ["DownBlock2D"] * 10**6}, "down_block_types"),
        ({"block_out_channels": [2**24]}, "block_out_channels"),
        ({"down_block_types": ["NoBlock"]}, "NoBlock"),
    ],
    ids=["16000 channels", "layers", "depth", "blocks", "channels", "unknown"],
)
def test_a_forged_architecture_is_refused_before_it_takes_memory(
    small_checkpoint: Checkpoint, change: dict[str, Any], fact: str
) -> None:
    architecture = dataclasses.replace(
        small_checkpoint.architecture, config={**small_checkpoint.architecture.config, **change}
    )
    reset_peak_memory()
    before = peak_memory()
    with refused(fact):
        QuantizedModel.from_checkpoint(changed(small_checkpoint, architecture=architecture))
    assert peak_memory() - before < 2**29


def test_a_layer_of_another_shape_than_the_architectures_is_refused(
    small_checkpoint: Checkpoint,
) -> None:
    layer = small_checkpoint.layers["conv_in"]
    for other in (
        {"bias": None},
        {"codes": layer.weight_codes[:-1], "weight_scale": layer.weight_scale[:-1]},
    ):
        layers = {**small_checkpoint.layers, "conv_in": dataclasses.replace(layer, **other)}
        with refused("conv_in"):
            QuantizedModel.from_checkpoint(changed(small_checkpoint, layers=layers))


def test_a_layer_that_is_neither_conv_nor_linear_is_refused_by_name(
    small_checkpoint: Checkpoint,
) -> None:
    layers = {
        "conv_norm_out": dataclasses.replace(
            small_checkpoint.layers["conv_in"], name="conv_norm_out"
        )
    }
    quantizer = dataclasses.replace(
        small_checkpoint.quantizer_of("conv_in"), layers=("conv_norm_out",)
    )
    floats = {
        k: v for k, v in small_checkpoint.floats.items() if not k.startswith("conv_norm_out.")
    }
    model = build_float_model(small_checkpoint.architecture)
    with refused("conv_norm_out", "Conv2d", "Linear"):
        QuantizedModel(
            model,
            changed(
                small_checkpoint,
                layers=layers,
                quantizers={quantizer.name: quantizer},
                floats=floats,
            ),
        )


@given(
    groups=st.integers(1, 3),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_a_folded_smoothing_scale_undoes_itself_for_any_groups(
    groups: int, inputs: int, outputs: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, groups * inputs, 4, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups * outputs, inputs, 3, 3, generator=generator, dtype=torch.float64)
    channel = torch.rand(groups * inputs, generator=generator, dtype=torch.float64) + 0.5
    folded = F.conv2d(
        x / channel.view(1, -1, 1, 1), fold_smoothing_scale(weight, channel), groups=groups
    )
    torch.testing.assert_close(folded, F.conv2d(x, weight, groups=groups))


def test_a_linear_has_no_geometry_and_a_convolutions_is_its_own() -> None:
    assert conv_geometry(nn.Linear(2, 2)) is None
    geometry = conv_geometry(
        nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=2, groups=2)
    )
    assert geometry is not None
    assert dataclasses.astuple(geometry) == ((2, 1), (1, 0), (2, 2), 2)


@pytest.mark.parametrize(
    "options", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}]
)
def test_padding_that_onnx_would_not_reproduce_is_refused(options: dict[str, Any]) -> None:
    with refused("padding"):
        conv_geometry(nn.Conv2d(2, 2, 3, **options))
