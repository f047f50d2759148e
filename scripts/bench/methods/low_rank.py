"""Branches of low rank in FP16 beside quantized layers (SVDQuant, arXiv 2411.05007).

y = Q(x) Q(W - U D) + x D U: the singular vectors of the smoothed weight with the largest singular
values are taken out of it and computed on the input as it is, so that neither their weights nor
what they multiply is rounded. (LQER, arXiv 2402.02446, decomposes the weight's rounding error
instead, and leaves the activations' error.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quest_deploy.artifacts.checkpoint import ActivationQuantizerData
from quest_deploy.quantization.model import fold_smoothing_scale, set_submodule

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.artifacts.checkpoint import Checkpoint


class Branched(nn.Module):
    """A layer and its branch; together they compute what the layer did.

    Attributes:
        residual: the layer without the branch's share of its weight: what is quantized.
        down: float16 [rank, I, ...]; as the layer reads its input.
        up: float16 [O, rank].
    """

    down: Tensor
    up: Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.register_buffer("down", down.half())
        self.register_buffer("up", up.half())
        with torch.no_grad():
            layer.weight -= (self.up.float() @ self.down.float().flatten(1)).view_as(layer.weight)
        self.residual = layer
        self.geometry = (
            (layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        result: Tensor = self.residual(x)
        down, up = self.down.float(), self.up.float()
        if self.geometry is None:
            return result + F.linear(F.linear(x, down), up)
        stride, padding, dilation = self.geometry
        inner = F.conv2d(x, down, None, stride, padding, dilation)
        return result + F.conv2d(inner, up[:, :, None, None])


@torch.no_grad()
def add_branches(unet: nn.Module, calibrated: Checkpoint, layers: Iterable[str], rank: int) -> None:
    """Give the ``layers`` of the float ``unet``, none of them in groups, branches of ``rank``.

    Args:
        calibrated: of ``unet``; its smoothing scales are those of the decomposed weights.
    """
    for name in layers:
        layer = unet.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        quantizer = calibrated.quantizer_of(name)
        assert isinstance(quantizer, ActivationQuantizerData)
        channel = torch.from_numpy(quantizer.channel.copy())
        smoothed = fold_smoothing_scale(layer.weight, channel)
        left, values, right = torch.linalg.svd(smoothed.flatten(1), full_matrices=False)
        root = values[:rank].sqrt()
        down = (root[:, None] * right[:rank]).view(-1, *smoothed.shape[1:])
        down = fold_smoothing_scale(down, 1 / channel)
        set_submodule(unet, name, Branched(layer, down, left[:, :rank] * root))
