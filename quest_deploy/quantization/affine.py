"""The arithmetic of the quantizers, as pure tensor functions with straight-through gradients: the
one place where torch rounds to codes (``affine_numpy`` is its twin without torch).

Rounding is half to even everywhere, as in ONNX QuantizeLinear. Division, never multiplication by a
reciprocal: the two differ on ties, and a tie that falls the other way is another code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quest_deploy.artifacts.scheme import weight_range


def activation_codes(x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """clamp(round(x / step), low, high), in x's float dtype: the codes of TimestepQuantize. All
    operands broadcast against x.
    """
    return clamp(torch.round(x / step), low, high)


def per_channel_codes(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """clamp(round(x / scale) + zero_point, low, high) - zero_point, in this order of float
    operations, with straight-through gradients: the codes of a quantizer that is per-channel.
    """
    return torch.clamp(round_ste(x / scale) + zero_point, low, high) - zero_point


@dataclass(frozen=True)
class WeightGrid:
    """What a weight [O, ...] is rounded to: whole multiples from low to high of scale, each float
    [O]; asymmetric for low != -high.
    """

    scale: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def symmetric(cls, scale: Tensor, bits: int) -> WeightGrid:
        """The grid of :func:`quest_deploy.artifacts.scheme.weight_range`."""
        low, high = weight_range(bits)
        return cls(scale, torch.full_like(scale, low), torch.full_like(scale, high))


def weight_codes(weight: Tensor, grid: WeightGrid) -> Tensor:
    """The codes of ``weight`` [O, ...] on ``grid``, int16 (an asymmetric 8-bit weight reaches from
    -255 to 255).
    """
    scale, low, high = (per_sample(values, weight) for values in (grid.scale, grid.low, grid.high))
    return torch.clamp(torch.round(weight / scale), low, high).to(torch.int16)


def fake_quantize_weight(weight: Tensor, grid: WeightGrid) -> Tensor:
    """codes * scale, with the straight-through gradient for weights inside the range (zero for
    clipped ones).
    """
    scale, low, high = (per_sample(values, weight) for values in (grid.scale, grid.low, grid.high))
    if not torch.is_grad_enabled():
        return _clamped_((weight / scale).round_(), low, high).mul_(scale)
    result: Tensor = _FakeQuantizeWeight.apply(weight, scale, low, high)
    return result


def fake_quantize_activation(
    x: Tensor, scale: Tensor, low: Tensor, high: Tensor, channel: Tensor | None, axis: int
) -> Tensor:
    """scale * clamp(round(x / (scale * channel)), low, high), with straight-through and LSQ
    gradients.

    The result is *not* multiplied by ``channel``: it is folded into the weights (SmoothQuant, arXiv
    2211.10438).

    Args:
        x: float [B, ...].
        scale: [B], positive; one per sample, picked from the bucket's table by the caller.
        low, high: [B], the clip bounds -z and 2^b-1-z (or -127 and 127): integers. Their gradients
            follow the clipped values.
        channel: [C] along ``axis`` of x, positive, or None where it would be all ones.
        axis: the channel axis of x; not 0.
    """
    if not torch.is_grad_enabled():
        step = per_sample(scale, x)
        return _clamped_(_ratio(x, step, channel, axis).round_(), low, high).mul_(step)
    result: Tensor = _FakeQuantizeActivation.apply(x, scale, low, high, channel, axis)
    return result


def _ratio(x: Tensor, step: Tensor, channel: Tensor | None, axis: int) -> Tensor:
    """Return what is rounded, in memory of its own."""
    return x / (step if channel is None else step * per_channel(channel, x, axis))


def _clamped_(codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``codes`` [B, ...] clamped in place: a new tensor at each step takes longer than the step."""
    torch.maximum(codes, per_sample(low, codes), out=codes)
    return torch.minimum(codes, per_sample(high, codes), out=codes)


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing had been rounded."""
    return x + (torch.round(x) - x).detach()


def bucket_of(timestep: Tensor, edges: Tensor) -> Tensor:
    """The bucket of each timestep [B], int64 [B]: the number of ``edges`` [K-1] <= t."""
    return (timestep[:, None] >= edges[None]).sum(1)


def clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x clamped to [low, high], both of which broadcast against it: torch.clamp, ten times as fast
    on a CPU.
    """
    return torch.minimum(torch.maximum(x, low), high)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Shape [B] values to broadcast over the rows of ``like`` [B, ...] (of a weight, over its
    output channels).
    """
    return values.view(-1, *([1] * (like.dim() - 1)))


def per_channel(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Shape [C] values to broadcast along ``axis`` of ``like``."""
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.view(shape)


# On a CPU, comparisons and masks take five to ten times as long as arithmetic: gradients are picked
# by the kernels that torch has for activation functions.


def _where_zero(grad: Tensor, excess: Tensor) -> Tensor:
    """``grad`` where ``excess``, of whole numbers, is 0; else 0."""
    result: Tensor = torch.ops.aten.hardtanh_backward(grad, excess, -0.5, 0.5)
    return result


def _where_positive(grad: Tensor, excess: Tensor) -> Tensor:
    """``grad`` where ``excess`` is positive; else 0."""
    result: Tensor = torch.ops.aten.threshold_backward(grad, excess, 0)
    return result


class _FakeQuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        codes = torch.round(weight / scale)
        clamped = clamp(codes, low, high)
        ctx.save_for_backward(codes.sub_(clamped))
        return clamped.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (excess,) = ctx.saved_tensors
        return _where_zero(grads[0], excess), None, None, None


class _FakeQuantizeActivation(torch.autograd.Function):
    # One function instead of a chain of autograd nodes: a UNet calls this some hundred times a
    # step.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        low: Tensor,
        high: Tensor,
        channel: Tensor | None,
        axis: int,
    ) -> Tensor:
        step = per_sample(scale, x)
        ratio = _ratio(x, step, channel, axis)
        # Only the ratio is kept, and its codes made again in the backward pass: every quantizer of
        # a UNet keeps its own.
        ctx.save_for_backward(ratio, scale, low, high, channel)
        ctx.axis = axis
        return _clamped_(torch.round(ratio), low, high).mul_(step)

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None]:
        ratio, scale, low, high, channel = ctx.saved_tensors
        grad = grads[0]
        codes = torch.round(ratio)
        clamped = clamp(codes, per_sample(low, ratio), per_sample(high, ratio))
        excess = codes.sub_(clamped)
        inside = _where_zero(grad, excess)
        grad_x = grad_scale = grad_low = grad_high = None
        if ctx.needs_input_grad[0]:
            grad_x = inside if channel is None else inside / per_channel(channel, inside, ctx.axis)
        if any(ctx.needs_input_grad[1:4]):
            outside = grad - inside
            above = _where_positive(outside, excess).flatten(1).sum(1)
            below = outside.flatten(1).sum(1) - above
            # LSQ (arXiv 1902.08153): the rounding error where x is inside, the bound itself where
            # it is clipped.
            grad_scale = _row_products(inside, clamped.sub_(ratio)) + below * low + above * high
            grad_low, grad_high = below * scale, above * scale
        return grad_x, grad_scale, grad_low, grad_high, None, None


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of the rows of ``a`` and ``b`` [B, ...], [B]."""
    result: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return result
