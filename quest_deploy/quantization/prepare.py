"""Rewrite a float model into an equal one in which everything that is quantized is a module of its
own.

Three things in a UNet are not, as diffusers writes them: the halves of a shortcut convolution that
reads a concatenation (Q-Diffusion quantizes each half by itself), what is left of a layer beside a
branch of low rank (SVDQuant), and the products inside attention. Rewritten, they are found,
quantized, finetuned and exported like every other layer, and hardly anything else in the toolchain
knows about them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quest_deploy.artifacts.checkpoint import DOWN, OPERANDS, RESIDUAL, UP, ScoreScale
from quest_deploy.errors import InputError
from quest_deploy.models.attention import WrittenAttention, attentions
from quest_deploy.models.residuals import IP_ADAPTER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quest_deploy.artifacts.scheme import Scheme

SHORTCUTS = "conv_shortcut"
"""The name of a ResBlock's shortcut convolution in diffusers."""


class SplitConv2d(nn.Module):
    """A Conv2d whose input channels are split in two: first(x[:, :n]) + second(x[:, n:]), the bias
    in ``first``.
    """

    def __init__(self, conv: nn.Conv2d, channels: int) -> None:
        super().__init__()
        if conv.groups != 1:
            raise InputError("a grouped convolution cannot be split by input channels")
        self.first = _slice_of(conv, 0, channels, bias=conv.bias is not None)
        self.second = _slice_of(conv, channels, conv.in_channels, bias=False)
        self.channels = channels
        with torch.no_grad():
            self.first.weight.copy_(conv.weight[:, :channels])
            self.second.weight.copy_(conv.weight[:, channels:])
            if conv.bias is not None and self.first.bias is not None:
                self.first.bias.copy_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, O, H', W']."""
        result: Tensor = self.first(x[:, : self.channels]) + self.second(x[:, self.channels :])
        return result


def _slice_of(conv: nn.Conv2d, start: int, stop: int, *, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(
        stop - start,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        bias=bias,
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )


class LowRank(nn.Module):
    """A layer with a branch of low rank beside it, y = residual(x) + x D U (SVDQuant, arXiv
    2411.05007).

    The branch reads x as it is and stays in float, so that neither its weights nor what they
    multiply is rounded to a few bits. It begins at zero.

    Attributes:
        residual: the layer, its weight less D U: what is quantized.
        down: D, float16 [rank, I, kh, kw] or [rank, I], as the layer's weight reads its input.
        up: U, float16 [O, rank].
    """

    residual: nn.Module
    down: Tensor
    up: Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear, rank: int) -> None:
        super().__init__()
        weight = layer.weight
        self.geometry = (
            (layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else None
        )
        self.add_module(RESIDUAL, layer)
        for name, shape in ((DOWN, (rank, *weight.shape[1:])), (UP, (len(weight), rank))):
            self.register_buffer(name, weight.new_zeros(shape, dtype=torch.float16))

    @torch.no_grad()
    def take(self, down: Tensor, up: Tensor) -> None:
        """Let the branch compute ``down`` and ``up``, as FP16 rounds them, in the layer's stead."""
        self.down.copy_(down)
        self.up.copy_(up)
        weight = self.residual.get_parameter("weight")
        # Not in place: copies of the layer may share its weight.
        rest = weight - (self.up.float() @ self.down.float().flatten(1)).view_as(weight)
        self.residual.weight = nn.Parameter(rest, weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer itself returned."""
        result: Tensor = self.residual(x)
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if self.geometry is None:
            return result + F.linear(F.linear(x, down), up)
        stride, padding, dilation = self.geometry
        inner = F.conv2d(x, down, None, stride, padding, dilation)
        return result + F.conv2d(inner, up[:, :, None, None])


class Product(nn.Module):
    """A product of two activations, a [B, heads, M, N] @ b [B, heads, N, P].

    Attributes:
        operands: what each operand is called, one of ``OPERANDS``.
    """

    def __init__(self, operands: tuple[str, str]) -> None:
        super().__init__()
        self.operands = operands

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The matrix product."""
        return a @ b


class ExplicitAttention(WrittenAttention):
    """Attention whose two products are the modules ``scores`` and ``mix`` of the Attention.

    Operands are [B, heads, tokens, d]: the batch stays in axis 0, so that each sample keeps its own
    timestep's scales.
    """

    def __init__(self, scale: ScoreScale) -> None:
        self.scale = scale

    def attend(self, attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """See :meth:`quest_deploy.models.attention.WrittenAttention.attend`."""
        factor = self.factor(attn)
        if self.scale is ScoreScale.OPERANDS:
            root = factor**0.5
            scores = attn.scores(q * root, (k * root).transpose(2, 3))
        else:
            scores = attn.scores(q, k.transpose(2, 3)) * factor
        if mask is not None:
            scores = scores + mask
        mixed: Tensor = attn.mix(scores.softmax(-1), v)
        return mixed

    def factor(self, attn: Any) -> float:
        """What the scores are multiplied by."""
        return float(attn.scale)


class ExplicitJointAttention(ExplicitAttention):
    """The joint attention of Stable Diffusion 3 written out: the sample's patches and the text's
    tokens, each by projections of its own, attend to all of both.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """diffusers' processor interface: the patches [B, N, D], and the tokens [B, M, D] where
        there are any.
        """
        q, k, v = _own(attn, hidden_states)
        if encoder_hidden_states is not None:
            added = _added(attn, encoder_hidden_states)
            q, k, v = (torch.cat(both, 2) for both in zip((q, k, v), added, strict=True))
        mixed = self.attend(attn, q, k, v, None).transpose(1, 2).flatten(2)
        patches = mixed[:, : hidden_states.shape[1]]
        output: Tensor = attn.to_out[1](attn.to_out[0](patches))
        if encoder_hidden_states is None:
            return output
        tokens = mixed[:, hidden_states.shape[1] :]
        return output, tokens if attn.context_pre_only else attn.to_add_out(tokens)


class ExplicitRotaryAttention(ExplicitAttention):
    """The attention of FLUX written out: the text's tokens come before the sample's patches, in
    some blocks by projections of their own, and q and k are turned by where they are. They are
    quantized as turned.
    """

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **_: Any,
    ) -> Any:
        """diffusers' processor interface: the patches [B, N, D] and the tokens [B, M, D], or all of
        them [B, M + N, D], and cosines and sines [M + N, d] of their positions.
        """
        q, k, v = _own(attn, hidden_states)
        if encoder_hidden_states is not None:
            added = _added(attn, encoder_hidden_states)
            q, k, v = (torch.cat(both, 2) for both in zip(added, (q, k, v), strict=True))
        if image_rotary_emb is not None:
            rotated: Any = [apply_rotary_emb(x, image_rotary_emb) for x in (q, k)]
            q, k = rotated
        mixed = self.attend(attn, q, k, v, None).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return mixed
        tokens = encoder_hidden_states.shape[1]
        patches = attn.to_out[1](attn.to_out[0](mixed[:, tokens:]))
        return patches, attn.to_add_out(mixed[:, :tokens])

    def factor(self, attn: Any) -> float:
        """See :class:`ExplicitAttention`."""
        return float(attn.head_dim**-0.5)


_EXPLICIT: dict[str, type[ExplicitAttention] | None] = {
    "AttnProcessor": ExplicitAttention,
    "AttnProcessor2_0": ExplicitAttention,
    "SanaAttnProcessor2_0": ExplicitAttention,
    WrittenAttention.__name__: ExplicitAttention,
    "JointAttnProcessor2_0": ExplicitJointAttention,
    "FluxAttnProcessor": ExplicitRotaryAttention,
    "SanaLinearAttnProcessor2_0": None,
}
"""By diffusers' processor, or ours, what computes the same. Linear attention has no softmax: its
products stay in float.
"""


def _heads(attn: Any, project: Any, x: Tensor, norm: Any = None) -> Tensor:
    """x [B, N, D] projected, [B, heads, N, d], and normalized by ``norm`` where there is one."""
    heads: Tensor = project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return heads if norm is None else norm(heads)


def _own(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of x by :func:`_heads`."""
    q, k = _heads(attn, attn.to_q, x, attn.norm_q), _heads(attn, attn.to_k, x, attn.norm_k)
    return q, k, _heads(attn, attn.to_v, x)


def _added(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the projections of the text."""
    q = _heads(attn, attn.add_q_proj, x, attn.norm_added_q)
    k = _heads(attn, attn.add_k_proj, x, attn.norm_added_k)
    return q, k, _heads(attn, attn.add_v_proj, x)


def prepare(
    model: nn.Module,
    split_shortcuts: Mapping[str, int],
    attention: ScoreScale | None,
    low_rank: Mapping[str, int] | None = None,
) -> nn.Module:
    """Rewrite ``model`` in place and return it; its float results stay the same but for rounding.

    Args:
        split_shortcuts: by the name of a convolution, the channels of its first half.
        attention: where explicit attention applies its scale, or None to leave attention alone.
        low_rank: by the name of a layer, its halves' among them, the rank of a branch beside it,
            which is zero.

    Raises:
        InputError: a name that is no convolution or layer of the model's, or attention of an
            unknown kind.
    """
    for name, channels in split_shortcuts.items():
        parent, _, child = name.rpartition(".")
        try:
            conv = model.get_submodule(name)
        except AttributeError:
            conv = None
        if not isinstance(conv, nn.Conv2d) or not 0 < channels < conv.in_channels:
            raise InputError(
                f"split shortcut {name}: expected one of the model's convolutions, and fewer "
                "channels than it reads"
            )
        setattr(model.get_submodule(parent), child, SplitConv2d(conv, channels))
    for name, rank in (low_rank or {}).items():
        parent, _, child = name.rpartition(".")
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            layer = None
        if not isinstance(layer, nn.Conv2d | nn.Linear) or getattr(layer, "groups", 1) != 1:
            raise InputError(
                f"branch of low rank: expected one of the model's layers, no grouped convolution, "
                f"found {name}"
            )
        setattr(model.get_submodule(parent), child, LowRank(layer, rank))
    if attention is not None:
        for module in attentions(model):
            processor = type(module.processor).__name__
            if processor not in _EXPLICIT:
                raise InputError(
                    f"attention: expected one of {', '.join(_EXPLICIT)}, whose products can be "
                    f"quantized, found {processor}; leave attention in float"
                )
            if (explicit := _EXPLICIT[processor]) is None:
                continue
            for each in (module, getattr(module, IP_ADAPTER, None)):
                if each is not None:
                    each.scores, each.mix = Product(OPERANDS["scores"]), Product(OPERANDS["mix"])
            module.set_processor(explicit(attention))
    return model


def prepared_for(
    model: nn.Module, scheme: Scheme, probe: Mapping[str, Tensor]
) -> tuple[nn.Module, dict[str, int], ScoreScale | None]:
    """:func:`prepare` ``model`` for ``scheme``, in place, finding the split shortcuts by running
    the model on ``probe``.

    Returns:
        The model, and what :func:`prepare` needs to do the same to another copy of it.
    """
    splits = find_split_shortcuts(model, probe) if scheme.split_shortcuts else {}
    quantized = scheme.attention_bits is not None or scheme.softmax_bits is not None
    attention = ScoreScale.PRODUCT if quantized else None
    return prepare(model, splits, attention), splits, attention


@torch.no_grad()
def find_split_shortcuts(model: nn.Module, probe: Mapping[str, Tensor]) -> dict[str, int]:
    """The shortcut convolutions that read a concatenation of two tensors, with the channels of the
    first; runs ``model`` once.
    """
    found: dict[str, int] = {}
    concatenations = _Concatenations()

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if (first := concatenations.first_of(args[0])) is not None:
                found[name] = first

        return hook

    handles = [
        module.register_forward_pre_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and name.rpartition(".")[2] == SHORTCUTS
    ]
    try:
        with concatenations:
            model(**probe)
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Concatenations(TorchFunctionMode):
    """Remembers the results of torch.cat([a, b], dim=1), and how many channels a had."""

    def __init__(self) -> None:
        super().__init__()
        self._results: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat, torch.concatenate):
            named = {**dict(zip(("tensors", "dim"), args, strict=False)), **(kwargs or {})}
            parts, axis = named["tensors"], named.get("dim", 0)
            if len(parts) == 2 and axis == 1 and result.dim() == 4:
                self._results.append((result, parts[0].shape[1]))
        return result

    def first_of(self, x: Tensor) -> int | None:
        return next((channels for result, channels in self._results if result is x), None)
