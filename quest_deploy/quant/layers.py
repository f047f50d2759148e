"""Fake-quantized layers: the reference that every engine is judged against.

A *site* is a tensor that is quantized and the layers that read it; it has one :class:`ActivationQuantizer`. The layers hold
integer-valued weights in float; both together compute, in float, what the deployed graph computes in integers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quest_deploy.quant.affine import fake_quantize_activation, fake_quantize_weight, per_channel, per_sample, round_ste
from quest_deploy.scheme import activation_levels, is_symmetric


class BucketState:
    """The bucket of each sample of the batch that is being computed, int64 [B]: set by the model, read by its quantizers."""

    def __init__(self) -> None:
        self.current: Tensor | None = None

    def get(self) -> Tensor:
        """The current buckets; raise RuntimeError outside a forward pass of the quantized model."""
        if self.current is None:
            raise RuntimeError("a quantized layer was called outside its QuantizedModel: no bucket is set")
        return self.current


class ActivationQuantizer(nn.Module):
    """One site's quantizer: a scale and a zero-point for each timestep bucket.

    Attributes:
        base_scale: float [K], positive.
        log_shift: float [K], learned: scale = base_scale * exp(log_shift) stays positive, and is exactly base_scale at 0.
        zero_point: float [K], learned; rounded and clamped to [0, 2^b - 1] where it is used. Unused where symmetric.
        channel: float [C], the static per-channel vector (all ones where the scheme has none).
        axis: the channel axis of the tensors it quantizes (1 for convolutions, the last for linears).
    """

    base_scale: Tensor
    log_shift: nn.Parameter
    zero_point: nn.Parameter
    channel: Tensor

    def __init__(self, bits: int, scale: Tensor, zero_point: Tensor, channel: Tensor, axis: int, buckets: BucketState) -> None:
        super().__init__()
        self.bits = bits
        self.symmetric = is_symmetric(bits)
        self.axis = axis
        self.register_buffer("base_scale", scale.clone())
        self.log_shift = nn.Parameter(torch.zeros_like(scale))
        self.zero_point = nn.Parameter(zero_point.clone(), requires_grad=not self.symmetric)
        self.register_buffer("channel", channel.clone())
        self._folded = not bool((channel == 1).all())
        self._buckets = buckets

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tables of TimestepQuantize: scale, low, high, each [K]."""
        scale = self.base_scale * self.log_shift.exp()
        if self.symmetric:
            bound = torch.full_like(scale, 127.0)
            return scale, -bound, bound
        levels = activation_levels(self.bits)
        zero_point = round_ste(self.zero_point.clamp(0, levels))
        return scale, -zero_point, levels - zero_point

    def current_bucket(self) -> Tensor:
        """The bucket of each sample being computed, int64 [B]."""
        return self._buckets.get()

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize x [B, ...]: scale * code (the channel vector's share lives in the weights)."""
        bucket = self.current_bucket()
        scale, low, high = (table[bucket] for table in self.tables())
        return fake_quantize_activation(x, scale, low, high, self.channel if self._folded else None, self.axis)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What :func:`activation_codes` divides x by and clamps to, shaped to broadcast: scale * channel, low, high."""
        bucket = self.current_bucket()
        scale, low, high = (per_sample(table[bucket], x) for table in self.tables())
        return scale * per_channel(self.channel, x, self.axis), low, high


class QuantizedLayer(nn.Module):
    """What :class:`QuantizedConv2d` and :class:`QuantizedLinear` share.

    Attributes:
        weight: float, the layer's shape, with the site's channel vector already folded in; rounded at every use.
        weight_scale: float [O], one per output channel.
        bias: float [O] or None.
    """

    weight: nn.Parameter
    weight_scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None, weight_scale: Tensor, weight_bits: int, site: ActivationQuantizer) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone())
        self.weight_bits = weight_bits
        self.register_buffer("weight_scale", weight_scale.clone())
        # A site serves several layers: it is owned by the QuantizedModel, and kept out of this module's state here.
        object.__setattr__(self, "site", site)
        self._frozen = False

    site: ActivationQuantizer

    def forward(self, x: Tensor) -> Tensor:
        """The layer on fake-quantized input and weight, in float."""
        return self.compute(self.site(x), self.rounded_weight())

    def rounded_weight(self) -> Tensor:
        """The weight that the layer computes with, in its shape."""
        return self.weight if self._frozen else fake_quantize_weight(self.weight, self.weight_scale, self.weight_bits)

    @torch.no_grad()
    def freeze(self) -> None:
        """Round the weight once and for all: a layer that is not trained neither rounds again nor keeps a second weight."""
        self.weight.copy_(self.rounded_weight())
        self._frozen = True

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """The float layer itself, without its quantizers."""
        raise NotImplementedError


class QuantizedConv2d(QuantizedLayer):
    """A Conv2d with fake-quantized input and weight."""

    def __init__(self, conv: nn.Conv2d, weight: Tensor, weight_scale: Tensor, weight_bits: int, site: ActivationQuantizer) -> None:
        super().__init__(weight, conv.bias, weight_scale, weight_bits, site)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class QuantizedLinear(QuantizedLayer):
    """A Linear with fake-quantized input and weight."""

    def __init__(self, linear: nn.Linear, weight: Tensor, weight_scale: Tensor, weight_bits: int, site: ActivationQuantizer) -> None:
        super().__init__(weight, linear.bias, weight_scale, weight_bits, site)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)
