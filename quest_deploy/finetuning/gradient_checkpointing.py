"""Gradient checkpointing: what a block keeps for the backward pass is computed again there."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quest_deploy.models.networks import kind_of
from quest_deploy.quantization.prepare import ExplicitAttention

if TYPE_CHECKING:
    from collections.abc import Callable


def _by_heads(
    attend: Callable[..., Tensor], attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """:meth:`ExplicitAttention.attend`, one head after another, each computed again in the backward
    pass.

    Quantized attention materializes its scores, and its quantizers keep several tensors of their
    shape [B, heads, tokens, tokens]: at 4096 tokens, 8 heads and batch 4 each takes 2 GiB. Here
    only those of one head exist at a time.
    """
    if not torch.is_grad_enabled():
        return attend(attn, q, k, v, mask)
    masks = [None] * attn.heads if mask is None else mask.split(1, dim=1)
    heads = zip(*(x.split(1, dim=1) for x in (q, k, v)), masks, strict=True)
    return torch.cat(
        [checkpoint(attend, attn, *head, use_reentrant=False) for head in heads], dim=1
    )


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Let the blocks of a prepared diffusers model, and the heads of its quantized attention, run
    again in the backward pass.

    What the blocks' quantizers keep for it is most of a step's memory. diffusers' own switch leaves
    out what surrounds a transformer's blocks, and the resampling.
    """
    kinds = kind_of(model).checkpointed_blocks
    for module in model.modules():
        block: Any = module
        if type(module).__name__ in kinds:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        elif isinstance(getattr(module, "processor", None), ExplicitAttention):
            block.processor.attend = partial(_by_heads, block.processor.attend)
