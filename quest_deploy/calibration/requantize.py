"""Round weights again that changed in the float model, such as by a LoRA, under the activation and
smoothing scales that calibration chose.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from quest_deploy.artifacts.checkpoint import ActivationQuantizerData
from quest_deploy.calibration.ptq import RangeMethod, rounded_weight
from quest_deploy.progress import no_progress
from quest_deploy.quantization.model import fold_smoothing_scale, prepared, unrounded_weight

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quest_deploy.artifacts.checkpoint import Checkpoint, LayerData
    from quest_deploy.progress import Progress


@torch.no_grad()
def requantize(
    checkpoint: Checkpoint,
    before: nn.Module,
    after: nn.Module,
    progress: Progress = no_progress,
) -> tuple[Checkpoint, int]:
    """Give ``checkpoint`` what changed in its float model, from ``before`` to ``after``.

    A layer whose weight is the same in both keeps its codes. Any other becomes u + g (W_after -
    W_before), g its smoothing scale, and is rounded with weight scales chosen as calibration chose
    them. u is the weight nearest to g W_before that has the layer's codes: g W_before itself where
    calibration rounded it, so that the result is what calibration with these activation scales
    gives; beside it where Q-Diffusion learned the rounding or finetuning moved the weight, whose
    work is kept so. It is not the dequantized weight, which lies in the middle of its code:
    most changes are smaller than half a step, and to round that again would undo all of those.
    Branches of low rank stay as they are: the layers beside them change.

    Args:
        before: the float model of ``checkpoint``; both are rewritten in place.
        after: the same model with other weights.

    Returns:
        The new checkpoint, and how many layers changed, among them those that are not quantized.
    """
    method = RangeMethod(checkpoint.provenance["range"])
    old, new = (prepared(model, checkpoint).state_dict() for model in (before, after))
    changed = [key for key in old if not torch.equal(old[key], new[key])]
    layers, floats = dict(checkpoint.layers), dict(checkpoint.floats)
    for i, key in enumerate(changed):
        name = key.removesuffix(".weight")
        if name in layers:
            quantizer = checkpoint.quantizer_of(name)
            channel = (
                torch.from_numpy(quantizer.channel.copy())
                if isinstance(quantizer, ActivationQuantizerData)
                else None
            )
            layers[name] = _requantized(layers[name], old[key], new[key], channel, method)
        else:
            floats[key] = np.asarray(floats[key]) + (new[key] - old[key]).numpy()
        progress("weights", i + 1, len(changed))
    return replace(checkpoint, layers=layers, floats=floats), len(changed)


def _requantized(
    data: LayerData, before: Tensor, after: Tensor, channel: Tensor | None, method: RangeMethod
) -> LayerData:
    change = after - before
    change = change if channel is None else fold_smoothing_scale(change, channel)
    weight = unrounded_weight(before, data, channel) + change
    codes, scale = rounded_weight(weight, data.weight_bits, method)
    return replace(data, codes=codes, weight_scale=scale)
