"""Branches of low rank beside quantized layers (SVDQuant, arXiv 2411.05007).

The singular vectors of the smoothed weight with the largest singular values are taken out of it,
into a branch in FP16 that reads the input as it is: y = Q(x) Q(W - D U) + x D U. (LQER, arXiv
2402.02446, decomposes the weight's rounding error instead, and leaves the activations' error.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quest_deploy.quantization.layer_kinds import layers_matching
from quest_deploy.quantization.model import fold_smoothing_scale
from quest_deploy.quantization.prepare import LowRank, prepare

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from quest_deploy.artifacts.scheme import Scheme


@torch.no_grad()
def add_branches(
    unet: nn.Module, smoothing: Mapping[str, Tensor], scheme: Scheme
) -> dict[str, int]:
    """Give the layers that ``scheme`` says their branches, in place; ``unet`` computes what it did,
    but for rounding.

    Args:
        smoothing: the smoothing scale [I] of each layer that is quantized.

    Returns:
        The rank by the layer's name: the scheme's, or the weight's largest where that is smaller.

    Raises:
        InputError: a pattern that matches no layer, or a grouped convolution.
    """
    ranks = {}
    for name in layers_matching(smoothing, scheme.low_rank_layers, "a branch of low rank"):
        layer, channel = unet.get_submodule(name), smoothing[name]
        smoothed = fold_smoothing_scale(layer.get_parameter("weight"), channel)
        ranks[name] = rank = min(scheme.low_rank, *smoothed.flatten(1).shape)
        prepare(unet, {}, None, {name: rank})
        branched = unet.get_submodule(name)
        assert isinstance(branched, LowRank)
        left, values, right = torch.linalg.svd(smoothed.flatten(1), full_matrices=False)
        root = values[:rank].sqrt()
        down = (root[:, None] * right[:rank]).view(-1, *smoothed.shape[1:])
        branched.take(fold_smoothing_scale(down, 1 / channel), left[:, :rank] * root)
    return ranks
