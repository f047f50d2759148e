"""Fake-quantized layers: the reference that every engine is judged against.

A *site* is a tensor that is quantized and the layers that read it; it has one
:class:`ActivationQuantizer`. The layers hold integer-valued weights in float; both together
compute, in float, what the deployed graph computes in integers.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quest_deploy.artifacts.scheme import Symmetry, activation_levels
from quest_deploy.quantization.affine import (
    WeightGrid,
    activation_codes,
    fake_quantize_activation,
    fake_quantize_weight,
    per_channel,
    per_channel_codes,
    per_sample,
    round_ste,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class BucketState:
    """The bucket of each sample of the batch that is being computed, int64 [B]: set by the model,
    read by its quantizers.

    During a pass it also keeps the last tensor that was quantized: q, k and v read the same one,
    one after the other.
    """

    def __init__(self) -> None:
        self.current: Tensor | None = None
        self._last: tuple[AnyActivationQuantizer, Tensor, Tensor] | None = None
        self._sharing = False

    @contextmanager
    def during(self, buckets: Tensor, *, sharing: bool) -> Iterator[None]:
        """See :meth:`quest_deploy.quantization.model.QuantizedModel.at_timesteps`; ``buckets``
        [B].
        """
        self.current, self._sharing = buckets, sharing
        try:
            yield
        finally:
            self.current, self._sharing, self._last = None, False, None

    def once(
        self, quantizer: AnyActivationQuantizer, x: Tensor, quantize: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """quantize(x), or what it gave for this very tensor, if ``quantizer`` quantized it last in
        this pass.
        """
        if not self._sharing:
            return quantize(x)
        if self._last is None or self._last[0] is not quantizer or self._last[1] is not x:
            self._last = quantizer, x, quantize(x)
        return self._last[2]

    def get(self) -> Tensor:
        """The current buckets; raise RuntimeError outside a forward pass of the quantized model."""
        if self.current is None:
            raise RuntimeError(
                "a quantized layer was called outside its QuantizedModel: no bucket is set"
            )
        return self.current


class AnyActivationQuantizer(nn.Module):
    """What :class:`ActivationQuantizer` and :class:`PerChannelActivationQuantizer` share: scales of
    their own in each bucket.

    Attributes:
        base_scale: float [K] or [K, C].
        log_shift: learned, in base_scale's shape: scale = base_scale * exp(log_shift) keeps its
            sign, and is exactly base_scale at 0.
        zero_point: learned where ``zero_point.requires_grad``, in base_scale's shape.
        axis: the channel axis of the tensors it quantizes (1 for convolutions, the last for
            linears).
    """

    base_scale: Tensor
    log_shift: nn.Parameter
    zero_point: nn.Parameter

    def __init__(self, scale: Tensor, zero_point: Tensor, axis: int, buckets: BucketState) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("base_scale", scale.clone())
        self.log_shift = nn.Parameter(torch.zeros_like(scale))
        self.zero_point = nn.Parameter(zero_point.clone())
        self._buckets = buckets

    @property
    def learns_zero_point(self) -> bool:
        """Whether its zero-points are parameters, not fixed by its symmetry."""
        raise NotImplementedError

    @property
    def scale(self) -> Tensor:
        """The scales, in base_scale's shape."""
        return self.base_scale * self.log_shift.exp()

    def current_bucket(self) -> Tensor:
        """The bucket of each sample being computed, int64 [B]."""
        return self._buckets.get()

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize x [B, ...]."""
        raise NotImplementedError

    def step(self, like: Tensor, bucket: Tensor) -> Tensor:
        """Return what values are divided by before they are rounded, for samples in ``bucket`` [B];
        broadcasts against ``like`` [B, ...].
        """
        raise NotImplementedError

    def ratio(self, x: Tensor) -> Tensor:
        """Return what is rounded: x divided by its step, in x's shape."""
        return x / self.step(x, self.current_bucket())

    def untied(self, x: Tensor, ties: Tensor) -> Tensor:
        """x with the values where ``ties`` moved to the middle of the code below."""
        step = self.step(x, self.current_bucket())
        return torch.where(ties, torch.floor(x / step) * step, x)

    def unquantized(self, x: Tensor) -> Tensor:
        """x as the weights behind this quantizer expect it, but not rounded: where they hold a
        smoothing scale, x is divided by it.
        """
        return x

    def codes(self, x: Tensor) -> Tensor:
        """The codes of x, as the graph's value of that name holds them: int8, or float32 for a free
        quantizer.
        """
        raise NotImplementedError


class ActivationQuantizer(AnyActivationQuantizer):
    """One quantizer with integer codes: a scale and a zero-point for each timestep bucket.

    Attributes:
        base_scale: float [K], positive.
        zero_point: float [K]; rounded and clamped to [0, 2^b - 1] where it is used. Unused unless
            asymmetric.
        channel: float [C], the static per-channel vector (all ones where the scheme has none).
    """

    channel: Tensor

    def __init__(
        self,
        bits: int,
        scale: Tensor,
        zero_point: Tensor,
        channel: Tensor,
        axis: int,
        buckets: BucketState,
        symmetry: Symmetry,
    ) -> None:
        super().__init__(scale, zero_point, axis, buckets)
        self.bits, self.symmetry = bits, symmetry
        self.zero_point.requires_grad_(self.learns_zero_point)
        self.register_buffer("channel", channel.clone())
        self._folded = not bool((channel == 1).all())

    @property
    def learns_zero_point(self) -> bool:
        return self.symmetry is Symmetry.ASYMMETRIC

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tables of TimestepQuantize: scale, low, high, each [K]."""
        scale, levels = self.scale, activation_levels(self.bits)
        if self.symmetry is Symmetry.SYMMETRIC:
            bound = torch.full_like(scale, 127.0)
            return scale, -bound, bound
        if self.symmetry is Symmetry.UNSIGNED:
            return scale, torch.zeros_like(scale), torch.full_like(scale, levels)
        zero_point = round_ste(self.zero_point.clamp(0, levels))
        return scale, -zero_point, levels - zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize x [B, ...]: scale * code (the smoothing scale's share lives in the
        weights).
        """
        return self._buckets.once(self, x, self._quantized)

    def _quantized(self, x: Tensor) -> Tensor:
        bucket = self.current_bucket()
        scale, low, high = (table[bucket] for table in self.tables())
        return fake_quantize_activation(
            x, scale, low, high, self.channel if self._folded else None, self.axis
        )

    def codes(self, x: Tensor) -> Tensor:
        bucket = self.current_bucket()
        _, low, high = (per_sample(table[bucket], x) for table in self.tables())
        codes = activation_codes(x, self.step(x, bucket), low, high)
        return (codes + per_sample(self.offset[bucket], x)).to(torch.int8)

    def unquantized(self, x: Tensor) -> Tensor:
        return x / per_channel(self.channel, x, self.axis) if self._folded else x

    @property
    def offset(self) -> Tensor:
        """What makes the codes fit int8, [K]; see
        :attr:`quest_deploy.artifacts.checkpoint.ActivationQuantizerData.offset`.
        """
        _, low, high = self.tables()
        return torch.zeros_like(low) if low.min() >= -128 and high.max() <= 127 else -128 - low

    def step(self, like: Tensor, bucket: Tensor) -> Tensor:
        scale = per_sample(self.scale[bucket], like)
        # Ones may lie along a product's tokens, of which there are as many as the sample is large.
        return scale * per_channel(self.channel, like, self.axis) if self._folded else scale


class PerChannelActivationQuantizer(AnyActivationQuantizer):
    """One quantizer in float: a scale and a zero-point for each timestep bucket and channel.

    Attributes:
        base_scale, zero_point: float [K, C] along ``axis``; see
            :class:`quest_deploy.artifacts.checkpoint.PerChannelQuantizerData`.
        code_low, code_high: the codes' range, the zero-point included.
    """

    def __init__(
        self,
        scale: Tensor,
        zero_point: Tensor,
        code_range: tuple[int, int],
        axis: int,
        buckets: BucketState,
        *,
        symmetric: bool,
    ) -> None:
        super().__init__(scale, zero_point, axis, buckets)
        self.code_low, self.code_high = code_range
        self.symmetric = symmetric
        self.zero_point.requires_grad_(self.learns_zero_point)

    @property
    def learns_zero_point(self) -> bool:
        return not self.symmetric

    def forward(self, x: Tensor) -> Tensor:
        scale, zero_point = self._operands(x)
        return per_channel_codes(x, scale, zero_point, self.code_low, self.code_high) * scale

    def step(self, like: Tensor, bucket: Tensor) -> Tensor:
        return _rows(self.scale[bucket], like, self.axis)

    def codes(self, x: Tensor) -> Tensor:
        return per_channel_codes(x, *self._operands(x), self.code_low, self.code_high)

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bucket = self.current_bucket()
        return _rows(self.scale[bucket], x, self.axis), _rows(
            round_ste(self.zero_point)[bucket], x, self.axis
        )


def _rows(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """[B, C] values to broadcast against ``like`` [B, ...] with C along ``axis``."""
    shape = [1] * like.dim()
    shape[0], shape[axis] = values.shape
    return values.view(shape)


class QuantizedLayer(nn.Module):
    """What :class:`QuantizedConv2d` and :class:`QuantizedLinear` share.

    Attributes:
        weight: float, the layer's shape, with the quantizer's smoothing scale already folded in;
            rounded at every use.
        weight_scale: float [O], one per output channel.
        weight_low, weight_high: float [O], the range of the codes, the zero-point already
            subtracted.
        bias: float [O] or None.
    """

    weight: nn.Parameter
    weight_scale: Tensor
    weight_low: Tensor
    weight_high: Tensor
    bias: nn.Parameter | None
    site: AnyActivationQuantizer

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        grid: WeightGrid,
        quantizer: AnyActivationQuantizer,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone())
        self.register_buffer("weight_scale", grid.scale.clone())
        self.register_buffer("weight_low", grid.low.clone())
        self.register_buffer("weight_high", grid.high.clone())
        # A quantizer serves several layers: it is owned by the QuantizedModel, and kept out of this
        # module's state here.
        object.__setattr__(self, "site", quantizer)
        self._frozen = False

    @property
    def grid(self) -> WeightGrid:
        """What the weight is rounded to."""
        return WeightGrid(self.weight_scale, self.weight_low, self.weight_high)

    def forward(self, x: Tensor) -> Tensor:
        """The layer on fake-quantized input and weight, in float."""
        return self.compute(self.site(x), self.rounded_weight())

    def rounded_weight(self) -> Tensor:
        """The weight that the layer computes with, in its shape."""
        return self.weight if self._frozen else fake_quantize_weight(self.weight, self.grid)

    @torch.no_grad()
    def freeze(self) -> None:
        """Round the weight once and for all: a layer that is not trained neither rounds again nor
        keeps a second weight.
        """
        self.weight.copy_(self.rounded_weight())
        self._frozen = True

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """The float layer itself, without its quantizers."""
        raise NotImplementedError


class QuantizedConv2d(QuantizedLayer):
    """A Conv2d with fake-quantized input and weight."""

    def __init__(
        self, conv: nn.Conv2d, weight: Tensor, grid: WeightGrid, quantizer: AnyActivationQuantizer
    ) -> None:
        super().__init__(weight, conv.bias, grid, quantizer)
        self.stride, self.padding, self.dilation, self.groups = (
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class QuantizedLinear(QuantizedLayer):
    """A Linear with fake-quantized input and weight."""

    def __init__(
        self, linear: nn.Linear, weight: Tensor, grid: WeightGrid, quantizer: AnyActivationQuantizer
    ) -> None:
        super().__init__(weight, linear.bias, grid, quantizer)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class QuantizedPointwise(QuantizedLinear):
    """A Linear that sums as a Conv1d of size 1 does: what the layers of CompVis's attention blocks
    are.
    """

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, N, C] -> [B, N, O]; a vector [B, C] is no attention block's."""
        if x.dim() != 3:
            return super().compute(x, weight)
        return F.conv1d(x.transpose(1, 2), weight[..., None], self.bias).transpose(1, 2)


class QuantizedSplit(nn.Module):
    """The halves of a split shortcut, each quantized by itself, in one convolution: one sum over
    both, as the official code's.
    """

    def __init__(self, first: QuantizedLayer, second: QuantizedLayer) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, O, H', W']."""
        halves = (self.first, self.second)
        quantized = torch.cat(
            [half.site(part) for half, part in zip(halves, self.parts(x), strict=True)], dim=1
        )
        return self.first.compute(
            quantized, torch.cat([half.rounded_weight() for half in halves], dim=1)
        )

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what of x [B, C, H, W] each half reads."""
        parts: tuple[Tensor, ...] = x.split(
            [self.first.weight.shape[1], self.second.weight.shape[1]], dim=1
        )
        return parts


class QuantizedMatmul(nn.Module):
    """A product of two activations, one or both of them fake-quantized.

    Attributes:
        quantizers: the operands' quantizers; None for one that stays in float.
    """

    quantizers: tuple[AnyActivationQuantizer | None, AnyActivationQuantizer | None]

    def __init__(
        self, quantizers: tuple[AnyActivationQuantizer | None, AnyActivationQuantizer | None]
    ) -> None:
        super().__init__()
        # Owned by the QuantizedModel, as a layer's quantizer is.
        object.__setattr__(self, "quantizers", quantizers)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a^ [B, heads, M, N] @ b^ [B, heads, N, P]."""
        first, second = (
            x if quantizer is None else quantizer(x)
            for x, quantizer in zip((a, b), self.quantizers, strict=True)
        )
        return self.compute(first, second)

    def compute(self, first: Tensor, second: Tensor) -> Tensor:
        """The float product itself, without its quantizers."""
        result: Tensor = first @ second
        return result


class QuantizedTransformerQK(QuantizedMatmul):
    """q k^T with k laid out as in CompVis's spatial transformers, [B, heads, N, d], on which the
    order of the sums depends.
    """

    def compute(self, first: Tensor, second: Tensor) -> Tensor:
        return super().compute(first, second.transpose(2, 3).contiguous().transpose(2, 3))


class QuantizedBlockMix(QuantizedMatmul):
    """softmax v, summed as v^T softmax^T: what torch makes of the einsum in CompVis's attention
    blocks.
    """

    def compute(self, first: Tensor, second: Tensor) -> Tensor:
        return super().compute(second.transpose(2, 3), first.transpose(2, 3)).transpose(2, 3)
