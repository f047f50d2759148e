from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from quest_deploy.artifacts.checkpoint import ScoreScale
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.quantization.prepare import (
    ExplicitAttention,
    Product,
    SplitConv2d,
    find_split_shortcuts,
    prepare,
    prepared_for,
)
from tests.helpers import refused

Inputs = dict[str, Tensor]
BOTH = list(ScoreScale)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(**options: Any) -> Attention:
    from diffusers.models.attention_processor import Attention, AttnProcessor

    torch.manual_seed(0)
    module = Attention(query_dim=8, heads=2, dim_head=4, **options)
    module.set_processor(AttnProcessor())
    return module.double().eval()


def uncond_unet() -> nn.Module:
    """A UNet2DModel, whose attention blocks take [B, C, H, W], normalize it and add it to
    themselves.
    """
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet: nn.Module = UNet2DModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return unet.double().eval()


@torch.no_grad()
def assert_prepared_equals(
    model: nn.Module, inputs: Inputs, scale: ScoreScale | None, splits: dict[str, int]
) -> nn.Module:
    """In float64, where nothing but rounding may differ; gives the prepared copy."""
    expected = model(**inputs, return_dict=False)[0]
    prepared = prepare(copy.deepcopy(model), splits, scale)
    torch.testing.assert_close(
        prepared(**inputs, return_dict=False)[0], expected, rtol=1e-10, atol=1e-12
    )
    return prepared


@pytest.mark.parametrize("scale", BOTH)
def test_explicit_attention_equals_diffusers_for_self_and_cross_attention_in_a_unet(
    small_unet: nn.Module, small_inputs: Inputs, scale: ScoreScale
) -> None:
    model = copy.deepcopy(small_unet).double()
    inputs = {name: value.double() for name, value in small_inputs.items()}
    prepared = assert_prepared_equals(model, inputs, scale, {})
    assert any(name.endswith("attn2.scores") for name, _ in prepared.named_modules())


@pytest.mark.parametrize("scale", BOTH)
def test_explicit_attention_equals_diffusers_where_it_reads_pictures_normalizes_and_adds_them(
    scale: ScoreScale,
) -> None:
    model = uncond_unet()
    attentions = [module for module in model.modules() if type(module).__name__ == "Attention"]
    assert all(
        module.group_norm is not None and module.residual_connection for module in attentions
    )
    assert_prepared_equals(
        model, {"sample": random(3, 2, 4, 4), "timestep": torch.tensor([1, 500, 999])}, scale, {}
    )


@pytest.mark.parametrize("scale", BOTH)
@pytest.mark.parametrize(
    ("options", "context"),
    [
        ({}, None),
        ({"cross_attention_dim": 6, "bias": True, "out_bias": False}, (3, 7, 6)),
        ({"rescale_output_factor": 3.0}, None),
    ],
    ids=["self", "cross", "rescaled"],
)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_one_attention_equals_diffusers_with_and_without_a_mask(
    options: dict[str, Any], context: tuple[int, ...] | None, masked: bool, scale: ScoreScale
) -> None:
    module, x = attention(**options), random(3, 5, 8)
    states = None if context is None else random(*context, seed=1)
    tokens = 5 if context is None else context[1]
    bias = (
        torch.where(random(3, 1, tokens, seed=2) > 0.5, -10000.0, 0.0).double() if masked else None
    )
    expected = module(x, encoder_hidden_states=states, attention_mask=bias)
    if masked:
        assert not torch.allclose(expected, module(x, encoder_hidden_states=states))
    prepare(module, {}, scale)
    assert isinstance(module.processor, ExplicitAttention)
    torch.testing.assert_close(
        module(x, encoder_hidden_states=states, attention_mask=bias),
        expected,
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("scale", BOTH)
@torch.no_grad()
def test_the_scale_is_applied_where_the_architecture_says(scale: ScoreScale) -> None:
    module, x, seen = attention(), random(2, 5, 8), {}
    prepare(module, {}, scale)
    handles = [
        getattr(module, name).register_forward_pre_hook(
            lambda m, args, n=name: seen.__setitem__(n, args)
        )
        for name in ("scores", "mix")
    ]
    module(x)
    for handle in handles:
        handle.remove()
    q, k = (
        project(x).unflatten(-1, (2, 4)).transpose(1, 2) for project in (module.to_q, module.to_k)
    )
    factor = 4**-0.25 if scale is ScoreScale.OPERANDS else 1.0
    torch.testing.assert_close(seen["scores"][0], q * factor)
    torch.testing.assert_close(seen["scores"][1], (k * factor).transpose(2, 3))
    torch.testing.assert_close(seen["mix"][0].sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))
    assert seen["mix"][1].shape == (2, 2, 5, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"spatial_norm_dim": 4},
        {"cross_attention_norm": "layer_norm"},
        {"qk_norm": "layer_norm"},
        {"added_kv_proj_dim": 8},
    ],
    ids=lambda options: next(iter(options)),
)
def test_attention_that_is_not_written_out_is_refused_and_not_computed_wrongly(
    options: dict[str, Any],
) -> None:
    from diffusers.models.attention_processor import Attention

    module = Attention(query_dim=32, heads=2, dim_head=4, **options)
    prepare(module, {}, ScoreScale.PRODUCT)
    with refused("attention"):
        module(torch.zeros(1, 5, 32), encoder_hidden_states=torch.zeros(1, 5, 32))


def test_attention_by_a_processor_that_is_not_known_is_refused_by_its_name() -> None:
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    module = attention()
    module.set_processor(PAGIdentitySelfAttnProcessor2_0())
    with refused("attention", "PAGIdentitySelfAttnProcessor2_0", "AttnProcessor2_0"):
        prepare(module, {}, ScoreScale.PRODUCT)
    assert prepare(module, {}, None) is module


CONVS: dict[str, dict[str, Any]] = {
    "1x1": {"kernel_size": 1},
    "without bias": {"kernel_size": 1, "bias": False},
    "strided, padded and dilated": {
        "kernel_size": (3, 2),
        "stride": (2, 1),
        "padding": (1, 0),
        "dilation": (1, 2),
    },
    "padded in a circle": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS.keys())
@pytest.mark.parametrize("channels", [1, 4, 6])
@torch.no_grad()
def test_a_split_convolution_equals_the_whole_one_of_any_geometry_and_dtype(
    options: dict[str, Any], channels: int
) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(7, 5, **options).double(), random(2, 7, 6, 6)
    split = SplitConv2d(conv, channels)
    torch.testing.assert_close(split(x), conv(x), rtol=1e-12, atol=1e-12)
    assert (split.first.in_channels, split.second.in_channels) == (channels, 7 - channels)
    assert split.second.bias is None


def test_a_grouped_convolution_is_not_split() -> None:
    with refused("grouped"):
        SplitConv2d(nn.Conv2d(4, 4, 1, groups=2), 2)


class Shortcuts(nn.Module):
    """Shortcut convolutions behind concatenations and other things."""

    def __init__(self) -> None:
        super().__init__()
        names = ("two", "swapped", "plain", "three", "height", "changed", "other")
        self.blocks = nn.ModuleDict(
            {name: nn.ModuleDict({"conv_shortcut": nn.Conv2d(8, 2, 1)}) for name in names}
        )
        self.not_a_shortcut = nn.Conv2d(8, 2, 1)

    def forward(self, sample: Tensor) -> Tensor:
        a, b = sample[:, :3], sample[:, 3:]
        both, middle = torch.cat([a, b], dim=1), sample.shape[2] // 2
        inputs = {
            "two": both,
            "swapped": torch.concat((b, a), 1),
            "plain": sample,
            "three": torch.cat([a, b[:, :2], b[:, 2:]], 1),
            "height": torch.cat([sample[:, :, :middle], sample[:, :, middle:]], 2),
            "changed": torch.cat([a, b], 1) * 2,
            "other": torch.cat(tensors=[b, a], dim=1),
        }
        results = [self.blocks[name]["conv_shortcut"](x) for name, x in inputs.items()]
        return torch.stack([*results, self.not_a_shortcut(both)])


def test_exactly_the_shortcuts_that_read_a_concatenation_of_two_along_the_channels_are_found() -> (
    None
):
    model = Shortcuts()
    found = find_split_shortcuts(model, {"sample": random(2, 8, 4, 4).float()})
    assert found == {
        "blocks.two.conv_shortcut": 3,
        "blocks.swapped.conv_shortcut": 5,
        "blocks.other.conv_shortcut": 5,
    }
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_in_a_unet_the_up_blocks_shortcuts_are_split_where_the_skip_begins_and_compute_the_same(
    small_unet: nn.Module, small_inputs: Inputs
) -> None:
    model = copy.deepcopy(small_unet).double()
    inputs = {name: value.double() for name, value in small_inputs.items()}
    splits = find_split_shortcuts(model, inputs)
    expected = {
        name
        for name, _ in model.named_modules()
        if name.startswith("up_blocks") and name.endswith("conv_shortcut")
    }
    assert splits.keys() == expected
    assert any(
        name.startswith("down_blocks") and name.endswith("conv_shortcut")
        for name, _ in model.named_modules()
    )
    for name, channels in splits.items():
        assert 0 < channels < model.get_submodule(name).in_channels
    prepared = assert_prepared_equals(model, inputs, ScoreScale.PRODUCT, splits)
    assert all(isinstance(prepared.get_submodule(name), SplitConv2d) for name in splits)


def test_a_model_is_prepared_as_its_scheme_says_and_a_copy_can_be_prepared_alike(
    small_unet: nn.Module, small_inputs: Inputs
) -> None:
    plain, splits, scale = prepared_for(
        copy.deepcopy(small_unet), Scheme.parse("w4a4"), small_inputs
    )
    assert (splits, scale) == ({}, None)
    assert not any(isinstance(module, Product | SplitConv2d) for module in plain.modules())
    for bits in ({"attention_bits": 4}, {"softmax_bits": 8}):
        _, splits, scale = prepared_for(
            copy.deepcopy(small_unet), Scheme.parse("w4a4", **bits), small_inputs
        )
        assert (splits, scale) == ({}, ScoreScale.PRODUCT)
    scheme = Scheme.parse("w4a4", attention_bits=8, split_shortcuts=True)
    model, splits, scale = prepared_for(copy.deepcopy(small_unet), scheme, small_inputs)
    again = prepare(copy.deepcopy(small_unet), splits, scale)
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in again.named_modules()
    ]
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    "splits", [{"nobody": 2}, {"conv_norm_out": 2}, {"conv_in": 0}, {"conv_in": 2}]
)
def test_a_split_that_the_model_does_not_have_is_refused_by_name(
    small_unet: nn.Module, splits: dict[str, int]
) -> None:
    with refused(next(iter(splits))):
        prepare(copy.deepcopy(small_unet), splits, None)
