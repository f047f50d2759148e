from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quest_deploy.artifacts.checkpoint import Checkpoint
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.quantization.planner import QuantizationPlan, plan_quantization
from tests.helpers import refused

W4A4 = Scheme.parse("w4a4", buckets=2)


class Attention(nn.Module):
    """conv, then q, k and v on one tensor, then out; ``unused`` never runs. Registered in another
    order than executed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 3)
        self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(4, 6, bias=False), nn.Linear(4, 6)
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.unused = nn.Linear(4, 4)

    def forward(self, sample: Tensor) -> Tensor:
        tokens = self.conv(sample).flatten(2).transpose(1, 2)
        output: Tensor = self.out(
            torch.tanh(self.q(tokens)) * self.k(tokens.clone()) + self.v(tokens)
        )
        return output


@pytest.fixture(scope="module")
def plan() -> QuantizationPlan:
    torch.manual_seed(0)
    return plan_quantization(Attention(), {"sample": torch.randn(2, 2, 6, 6)}, W4A4)


def test_layers_and_quantizers_come_in_execution_order_and_unexecuted_layers_are_left_out(
    plan: QuantizationPlan,
) -> None:
    assert [layer.name for layer in plan.layers] == ["conv", "q", "k", "v", "out"]
    assert [quantizer.name for quantizer in plan.quantizers] == ["conv", "q", "out"]


def test_layers_that_read_equal_tensors_share_one_quantizer_named_after_the_first(
    plan: QuantizationPlan,
) -> None:
    assert [quantizer.layers for quantizer in plan.quantizers] == [
        ("conv",),
        ("q", "k", "v"),
        ("out",),
    ]


def test_the_first_and_the_last_layer_get_the_schemes_own_bits(plan: QuantizationPlan) -> None:
    assert [layer.weight_bits for layer in plan.layers] == [8, 4, 4, 4, 8]
    assert [quantizer.bits for quantizer in plan.quantizers] == [8, 4, 8]


def test_layers_that_are_to_have_eight_bits_have_them_and_so_has_what_they_read() -> None:
    scheme = Scheme.parse("w4a4", buckets=2, eight_bit_layers=("k",))
    plan = plan_quantization(Attention(), {"sample": torch.randn(2, 2, 6, 6)}, scheme)
    assert [layer.weight_bits for layer in plan.layers] == [8, 4, 8, 4, 8]
    assert [quantizer.bits for quantizer in plan.quantizers] == [8, 8, 8]


def test_a_pattern_of_eight_bit_layers_that_matches_none_is_refused() -> None:
    scheme = Scheme.parse("w4a4", buckets=2, eight_bit_layers=("k", "unus*"))
    with refused("unus*"):
        plan_quantization(Attention(), {"sample": torch.randn(2, 2, 6, 6)}, scheme)


class ToldSize(nn.Module):
    """What is told two numbers of each sample, and embeds them one by one, as PixArt-alpha does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder, self.out = nn.Linear(1, 4), nn.Linear(8, 8)

    def forward(self, sample: Tensor, size: Tensor) -> Tensor:
        output: Tensor = self.out(sample + self.embedder(size.flatten()[:, None]).view(-1, 8))
        return output


def test_a_layer_whose_rows_are_not_the_batchs_is_refused_by_name_unless_it_stays_in_float() -> (
    None
):
    probe = {"sample": torch.randn(2, 8), "size": torch.randn(2, 2)}
    with refused("embedder", "--float-layers"):
        plan_quantization(ToldSize(), probe, W4A4)
    scheme = Scheme.parse("w4a4", buckets=2, float_layers=("embedder",))
    assert [x.name for x in plan_quantization(ToldSize(), probe, scheme).layers] == ["out"]


def test_the_first_layer_is_the_one_that_reads_the_sample_though_an_embedding_runs_before_it(
    small_checkpoint: Checkpoint,
) -> None:
    bits = {name: layer.weight_bits for name, layer in small_checkpoint.layers.items()}
    assert next(iter(bits)) == "time_embedding.linear_1"
    assert {name for name, width in bits.items() if width == 8} == {"conv_in", "conv_out"}
    assert {
        name for name, quantizer in small_checkpoint.quantizers.items() if quantizer.bits == 8
    } == {
        "conv_in",
        "conv_out",
    }


def test_the_channel_axis_is_1_for_a_convolution_and_the_last_for_a_linear(
    plan: QuantizationPlan,
) -> None:
    assert [quantizer.axis for quantizer in plan.quantizers] == [1, 2, 2]


def test_multiply_adds_are_those_of_one_sample(plan: QuantizationPlan) -> None:
    assert [layer.macs for layer in plan.layers] == [3 * 3 * 4 * 2 * 9, *[9 * 4 * 6] * 3, 9 * 6 * 3]


def test_a_quantizer_shared_with_an_8_bit_layer_has_8_bits() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, sample: Tensor) -> Tensor:
            output: Tensor = self.c(self.a(sample) + self.b(sample))
            return output

    plan = plan_quantization(Two(), {"sample": torch.randn(2, 4)}, W4A4)
    assert [(quantizer.layers, quantizer.bits) for quantizer in plan.quantizers] == [
        (("a", "b"), 8),
        (("c",), 8),
    ]
    assert [layer.weight_bits for layer in plan.layers] == [8, 4, 8]


def test_layers_that_read_one_tensor_along_different_channel_axes_do_not_share_a_quantizer() -> (
    None
):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

        def forward(self, sample: Tensor) -> Tensor:
            output: Tensor = self.conv(sample) + self.linear(sample)
            return output

    plan = plan_quantization(Both(), {"sample": torch.randn(2, 4, 4, 4)}, W4A4)
    assert [(quantizer.layers, quantizer.axis) for quantizer in plan.quantizers] == [
        (("conv",), 1),
        (("linear",), 3),
    ]


def test_a_model_without_layers_is_refused() -> None:
    class Nothing(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            return sample

    with refused("Conv2d", "Linear"):
        plan_quantization(Nothing(), {"sample": torch.randn(2, 4)}, W4A4)


def test_a_layer_that_runs_twice_is_refused_by_name_and_no_hook_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Linear(4, 4)

        def forward(self, sample: Tensor) -> Tensor:
            output: Tensor = self.again(self.again(sample))
            return output

    model = Twice()
    with refused("again"):
        plan_quantization(model, {"sample": torch.randn(2, 4)}, W4A4)
    assert not model.again._forward_hooks


def test_in_a_unet_attention_and_embedding_readers_share_and_every_layer_has_one_quantizer(
    small_checkpoint: Checkpoint,
) -> None:
    quantizers = small_checkpoint.quantizers.values()
    assert sorted(name for quantizer in quantizers for name in quantizer.layers) == sorted(
        small_checkpoint.layers
    )
    by_layers = {quantizer.layers for quantizer in quantizers}
    names = list(small_checkpoint.layers)
    assert tuple(n for n in names if "attn2.to_k" in n or "attn2.to_v" in n) in by_layers
    assert tuple(n for n in names if n.endswith("time_emb_proj")) in by_layers
    for block in {n.removesuffix(".to_q") for n in names if n.endswith("attn1.to_q")}:
        assert tuple(f"{block}.{part}" for part in ("to_q", "to_k", "to_v")) in by_layers
    shared = {
        name for quantizer in quantizers if len(quantizer.layers) > 1 for name in quantizer.layers
    }
    assert all(
        any(part in name for part in ("attn1.", "attn2.", "time_emb_proj")) for name in shared
    )
