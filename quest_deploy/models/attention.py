"""diffusers' attention written out, and beside it an IP-Adapter's: what it adds to each
cross-attention (arXiv 2308.06721).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from quest_deploy.errors import InputError
from quest_deploy.models.residuals import IP_ADAPTER

_CROSS = ".attn2"
"""How the cross-attentions of Stable Diffusion's transformer blocks are called."""


def attentions(model: nn.Module) -> list[Any]:
    """Every attention of a diffusers network."""
    kinds = (Attention, AttentionModuleMixin)
    return [module for module in model.modules() if isinstance(module, kinds)]


class ImageAttention(nn.Module):
    """An IP-Adapter's keys and values of an image's tokens, for the queries of an attention.

    Attributes:
        heads, scale: the attention's own.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        shape = (attention.to_k.in_features, attention.to_k.out_features)
        self.to_k, self.to_v = (nn.Linear(*shape, bias=False) for _ in "kv")
        self.heads, self.scale = attention.heads, attention.scale


def add_image_attentions(unet: nn.Module) -> dict[str, ImageAttention]:
    """Give each cross-attention of ``unet`` an :class:`ImageAttention` with weights to be filled
    in, as its module ``ip_adapter``; return them by their attention's name, in diffusers' order.

    Raises:
        InputError: its attention is not that of Stable Diffusion's transformer blocks.
    """
    width = getattr(unet.config, "cross_attention_dim", None)
    found = {}
    for name, attention in unet.named_modules():
        if not isinstance(attention, Attention):
            continue
        crosses = name.endswith(_CROSS)
        reads = attention.cross_attention_dim  # of self-attention its queries' width
        if attention.is_cross_attention != crosses or (crosses and reads != width):
            raise InputError(
                f"an IP-Adapter: expected a UNet whose cross-attentions, and no other, are called "
                f"attn2 and read text states [B, tokens, {width}]; {name} differs"
            )
        if crosses:
            attention.set_processor(WrittenAttention())  # type: ignore[arg-type]
            found[name] = ImageAttention(attention)
    if not found:
        raise InputError("an IP-Adapter: expected a UNet with cross-attention, found none")
    for name, module in found.items():
        unet.get_submodule(name).add_module(IP_ADAPTER, module)
    return found


def has_image_attentions(unet: nn.Module) -> bool:
    """Whether :func:`add_image_attentions` was given ``unet``."""
    return any(isinstance(module, ImageAttention) for module in unet.modules())


class WrittenAttention:
    """diffusers' processor interface, written out so that its parts can be replaced, with an
    IP-Adapter's sum: o = attend(q, k, v) + scale * attend(q, k', v'), k' and v' of an image.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """As diffusers' own processors.

        Args:
            encoder_hidden_states: what is attended to, or a tuple of it, an image's tokens [B,
                tokens, C] and the scales [B] of what they add.

        Raises:
            InputError: this does not compute such attention.
        """
        norms = (attn.spatial_norm, attn.norm_q, attn.norm_k)
        if (
            attn.norm_cross
            or attn.added_kv_proj_dim is not None
            or any(norm is not None for norm in norms)
        ):
            raise InputError(
                "attention with spatial, cross or q/k normalization, or with added keys and "
                "values, cannot be quantized, nor have an IP-Adapter; leave attention in float"
            )
        image: tuple[Tensor, ...] = ()
        if isinstance(encoder_hidden_states, tuple):
            encoder_hidden_states, *rest = encoder_hidden_states
            image = tuple(rest)
        residual, shape = hidden_states, hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            _by_head(project(x), attn.heads)
            for project, x in (
                (attn.to_q, hidden_states),
                (attn.to_k, context),
                (attn.to_v, context),
            )
        )
        mask = None
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, k.shape[2], shape[0])
            mask = mask.view(shape[0], attn.heads, -1, mask.shape[-1])
        mixed = self.attend(attn, q, k, v, mask)
        if image:
            (tokens, scale), beside = image, attn.ip_adapter
            k, v = (_by_head(project(tokens), attn.heads) for project in (beside.to_k, beside.to_v))
            mixed = mixed + scale[:, None, None, None] * self.attend(beside, q, k, v, None)
        hidden_states = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).unflatten(2, shape[2:])
        if attn.residual_connection:
            hidden_states = (
                residual + hidden_states
            )  # in this order the result has the layout of the residual, as in CompVis
        result: Tensor = hidden_states / attn.rescale_output_factor
        return result

    def attend(self, attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k^T * scale + mask) v; q, k, v [B, heads, tokens, d], mask [B, heads, 1 or
        tokens, tokens of k].
        """
        mixed: Tensor = F.scaled_dot_product_attention(q, k, v, mask, scale=attn.scale)
        return mixed


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B, tokens, heads x d] as [B, heads, tokens, d]."""
    heads_apart: Tensor = x.unflatten(-1, (heads, -1))
    return heads_apart.transpose(1, 2)
