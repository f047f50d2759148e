"""From the configuration of a CompVis UNetModel to the equal diffusers model, and from the one's
names to the other's.

Covered: Stable Diffusion v1 and class-conditional latent diffusion (spatial transformers, a
UNet2DConditionModel) and unconditional latent diffusion (attention blocks, a UNet2DModel; ResBlocks
or convolutions between its levels), with any number of levels and of ResBlocks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field

from quest_deploy.artifacts.schema import validated
from quest_deploy.artifacts.scheme import TRAIN_TIMESTEPS
from quest_deploy.errors import InputError
from quest_deploy.files import read_bounded
from quest_deploy.models.configurations import (
    MOST_CHANNELS,
    MOST_LEVELS,
    Channels,
    Depth,
    Layers,
    PerLevel,
    Side,
)
from quest_deploy.models.plain_yaml import load_yaml

if TYPE_CHECKING:
    from pathlib import Path

GROUPS = 32
"""The groups of every GroupNorm in a CompVis UNet."""
BETAS = (0.00085, 0.012)
"""Stable Diffusion's noise schedule, where the configuration names none."""
MOST_TIMESTEPS = 100_000
_MOST_BYTES = 2**20
_REQUIRED = (
    "image_size",
    "in_channels",
    "model_channels",
    "out_channels",
    "num_res_blocks",
    "attention_resolutions",
    "channel_mult",
)
_OPTIONAL = {
    "num_heads": -1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_spatial_transformer": False,
    "transformer_depth": 1,
    "context_dim": None,
    "dropout": 0,
    "use_checkpoint": False,
    "use_fp16": False,
    "legacy": True,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
}
_FIXED = {
    "conv_resample": True,
    "dims": 2,
    "num_classes": None,
    "use_new_attention_order": False,
    "n_embed": None,
}
"""What other values would change the network in ways that no listed model uses."""


class Layout(StrEnum):
    """How the official code lays out what a layer reads, and thereby a table of its scales for T
    timesteps.
    """

    IMAGE = "image"
    """A convolution's [B, C, H, W]: tables (T, C, 1, 1)."""
    VECTOR = "vector"
    """An embedding [B, C]: tables (T, C)."""
    SEQUENCE = "sequence"
    """A transformer's [B, N, C]: tables (T, 1, C)."""
    TOKENS = "tokens"
    """An attention block's [B, C, N], whose last axis is not the channels': tables (T, 1, N). Its
    layers are Conv1d's.
    """


@dataclass(frozen=True)
class OfficialLayer:
    """A convolution or linear layer.

    Attributes:
        name: its CompVis name.
        targets: its diffusers name; three of them for an attention block's qkv.
        shape: of its weight in the CompVis model.
        bias: whether it has one.
        tokens: N of Layout.TOKENS.
        halves: the channels of the concatenation that a shortcut reads, or None.
    """

    name: str
    targets: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout
    bias: bool = True
    tokens: int = 0
    halves: tuple[int, int] | None = None


@dataclass(frozen=True)
class OfficialOperand:
    """An operand of attention's products.

    Attributes:
        name: of its quantizer, in CompVis's names.
        attention: the diffusers attention.
        operand: q, k, v or softmax.
        size: of the axis along which its tables vary, or None where it is the length of the
            context.
        axis: where diffusers' operands [B, heads, ...] have that axis.
    """

    name: str
    attention: str
    operand: str
    size: int | None
    axis: int


@dataclass
class Names:
    """The CompVis model, module by module.

    Attributes:
        floats: norms, from their CompVis to their diffusers names, with their channels.
        heads: of each attention block's qkv, by its CompVis name.
    """

    layers: list[OfficialLayer] = field(default_factory=list)
    operands: list[OfficialOperand] = field(default_factory=list)
    floats: dict[str, tuple[str, int]] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)


@validated("a UNetModel's parameters")
@dataclass(frozen=True)
class UNetConfig:
    """A CompVis UNetModel's configuration; field names are its own parameters.

    Attributes:
        train_timesteps, betas: of the LDM configuration around it, or Stable Diffusion's.
    """

    image_size: Side
    in_channels: Channels
    model_channels: Channels
    out_channels: Channels
    num_res_blocks: Layers
    attention_resolutions: Annotated[tuple[Side, ...], Field(min_length=1, max_length=MOST_LEVELS)]
    channel_mult: PerLevel[Channels]
    num_heads: Channels | Literal[-1] = -1
    num_head_channels: Channels | Literal[-1] = -1
    use_spatial_transformer: bool = False
    transformer_depth: Annotated[Depth, Field(ge=1)] = 1
    context_dim: Channels | None = None
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    train_timesteps: int = TRAIN_TIMESTEPS
    betas: tuple[float, float] = BETAS

    @classmethod
    def load(cls, path: Path) -> UNetConfig:
        """Read a YAML or JSON file: an LDM configuration, or the parameters of its UNet alone.

        Raises:
            InputError: it cannot be read, a parameter is missing or unknown, or it describes a UNet
                that is not covered.
        """
        try:
            content = _parse(path)
        except FileNotFoundError as e:
            raise InputError(f"{path} does not exist") from e
        except (OSError, ValueError, RecursionError) as e:
            reason = " ".join(str(e).split())
            raise InputError(
                f"{path}: expected the UNet's configuration as YAML or JSON ({reason})"
            ) from e
        try:
            return cls.from_params(content)
        except InputError as e:
            raise InputError(f"{path}: {e}") from e

    @classmethod
    def from_params(cls, content: Any) -> UNetConfig:
        """See :meth:`load`."""
        around: dict[str, Any] = {}
        if isinstance(content, dict) and "model" in content:
            around = _get(content, "model", "params")
            content = _get(around, "unet_config", "params")
        if not isinstance(content, dict):
            raise InputError(
                "expected model.params.unet_config.params, or those parameters alone, found "
                f"{type(content).__name__}"
            )
        # Stable Diffusion's UNet names a size that it does not use; the model around it names the
        # latent's.
        given = {
            **_OPTIONAL,
            **content,
            **({"image_size": around["image_size"]} if "image_size" in around else {}),
        }
        missing = [name for name in _REQUIRED if name not in given]
        unknown = sorted(map(str, given.keys() - {*_REQUIRED, *_OPTIONAL, *_FIXED}))
        if missing or unknown:
            raise InputError(
                f"a UNetModel's parameters: missing {missing or 'none'}, unknown "
                f"{unknown or 'none'}"
            )
        for name, value in _FIXED.items():
            if given.get(name, value) != value:
                raise InputError(f"{name}: {given[name]!r} is not supported, only {value!r}")
        if given["num_heads"] == -1 and given["num_head_channels"] == -1:
            raise InputError("one of num_heads and num_head_channels must be set")
        if given["num_heads_upsample"] not in (-1, given["num_heads"]):
            raise InputError(
                f"num_heads_upsample: {given['num_heads_upsample']!r} is not supported, only "
                "num_heads itself"
            )
        context = given["context_dim"]
        if given["use_spatial_transformer"] and (type(context) is not int or context < 1):
            raise InputError(
                f"context_dim: expected the size of a context vector, found {context!r}"
            )
        if context is not None and not given["use_spatial_transformer"]:
            raise InputError(
                "context_dim: only a UNet with use_spatial_transformer reads a context"
            )
        if given["use_spatial_transformer"] and given["resblock_updown"]:
            raise InputError("resblock_updown: with spatial transformers only False is supported")
        names = [*_REQUIRED, *(name for name in _OPTIONAL if name in cls.__dataclass_fields__)]
        values: dict[str, Any] = {
            name: tuple(given[name]) if isinstance(given[name], list) else given[name]
            for name in names
        }
        timesteps = around.get("timesteps", TRAIN_TIMESTEPS)
        if type(timesteps) is not int or not 1 <= timesteps <= MOST_TIMESTEPS:
            raise InputError(
                f"timesteps: expected an integer from 1 to {MOST_TIMESTEPS}, found {timesteps!r}"
            )
        betas = (_beta(around, "linear_start", BETAS[0]), _beta(around, "linear_end", BETAS[1]))
        config = cls(**values, train_timesteps=timesteps, betas=betas)
        config._check_sizes()
        return config

    def _check_sizes(self) -> None:
        if self.in_channels != self.out_channels:
            raise InputError(
                f"in_channels {self.in_channels} and out_channels {self.out_channels}: expected "
                "the same number; what an image is made from, and a learned variance, are not "
                "imported"
            )
        if self.model_channels % GROUPS:
            raise InputError(
                f"model_channels: expected a multiple of the {GROUPS} groups of its norms, found "
                f"{self.model_channels}"
            )
        if max(self.channels) > MOST_CHANNELS:
            raise InputError(
                f"model_channels, channel_mult: expected levels of at most {MOST_CHANNELS} "
                f"channels, found {max(self.channels)}"
            )
        halvings = len(self.channel_mult) - 1
        if self.image_size % 2**halvings:
            raise InputError(
                f"image_size: expected a size that can be halved {halvings} times, found "
                f"{self.image_size}"
            )
        name = "num_heads" if self.num_head_channels == -1 else "num_head_channels"
        divisor = getattr(self, name)
        for level, channels in enumerate(self.channels):
            attends = self.attends(level) or level == halvings  # the middle block does
            if attends and channels % divisor:
                raise InputError(
                    f"{name}: expected a divisor of the {channels} channels that attention reads, "
                    f"found {divisor}"
                )

    @property
    def channels(self) -> tuple[int, ...]:
        """The channels of each level."""
        return tuple(mult * self.model_channels for mult in self.channel_mult)

    def attends(self, level: int) -> bool:
        """Whether a level's ResBlocks have attention behind them."""
        return 2**level in self.attention_resolutions

    def heads(self, channels: int) -> int:
        """The attention heads on ``channels`` channels."""
        return (
            self.num_heads if self.num_head_channels == -1 else channels // self.num_head_channels
        )

    @property
    def class_name(self) -> str:
        """The diffusers class."""
        return "UNet2DConditionModel" if self.use_spatial_transformer else "UNet2DModel"

    @property
    def diffusers_config(self) -> dict[str, Any]:
        """The diffusers class's configuration."""
        levels, shift = (
            range(len(self.channel_mult)),
            "scale_shift" if self.use_scale_shift_norm else "default",
        )
        kind = "CrossAttn{}Block2D" if self.use_spatial_transformer else "Attn{}Block2D"
        plain = {
            side: f"Resnet{side}sampleBlock2D" if self.resblock_updown else f"{side}Block2D"
            for side in ("Down", "Up")
        }
        types = {
            side: [kind.format(side) if self.attends(i) else name for i in levels]
            for side, name in plain.items()
        }
        config: dict[str, Any] = {
            "sample_size": self.image_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "layers_per_block": self.num_res_blocks,
            "block_out_channels": list(self.channels),
            "down_block_types": types["Down"],
            "up_block_types": types["Up"][::-1],
            "norm_num_groups": GROUPS,
            "norm_eps": 1e-5,
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "resnet_time_scale_shift": shift,
        }
        if self.use_spatial_transformer:
            # diffusers calls the number of heads attention_head_dim in this class.
            heads = [self.heads(channels) for channels in self.channels]
            depth = {"transformer_layers_per_block": self.transformer_depth}
            return {
                **config,
                **depth,
                "cross_attention_dim": self.context_dim,
                "attention_head_dim": heads,
            }
        resample = "resnet" if self.resblock_updown else "conv"
        return {
            **config,
            "attention_head_dim": None if self.num_head_channels == -1 else self.num_head_channels,
            "attn_norm_num_groups": GROUPS,
            "downsample_type": resample,
            "upsample_type": resample,
        }

    @property
    def fixed_heads(self) -> int | None:
        """The heads of every attention where diffusers' configuration can only say how many
        channels each has, else None.
        """
        return (
            None if self.use_spatial_transformer or self.num_head_channels != -1 else self.num_heads
        )

    def names(self) -> Names:
        """Every module of the CompVis model with its diffusers name, in the order of its state
        dict.
        """
        return _Walk(self).names


class _Walk:
    """Goes through the CompVis model as its constructor builds it."""

    def __init__(self, config: UNetConfig) -> None:
        self.config, self.names = config, Names()
        base, embedding, levels = (
            config.model_channels,
            4 * config.model_channels,
            len(config.channel_mult),
        )
        self._layer("time_embed.0", "time_embedding.linear_1", (embedding, base), Layout.VECTOR)
        self._layer(
            "time_embed.2", "time_embedding.linear_2", (embedding, embedding), Layout.VECTOR
        )
        self._layer("input_blocks.0.0", "conv_in", (base, config.in_channels, 3, 3))
        skips, channels, block = [base], base, 1
        for level, out in enumerate(config.channels):
            target = f"down_blocks.{level}"
            for i in range(config.num_res_blocks):
                self._res(f"input_blocks.{block}.0", f"{target}.resnets.{i}", channels, out)
                channels = out
                if config.attends(level):
                    self._attention(
                        f"input_blocks.{block}.1", f"{target}.attentions.{i}", channels, level
                    )
                skips.append(channels)
                block += 1
            if level + 1 < levels:
                self._resample(
                    f"input_blocks.{block}.0", "op", f"{target}.downsamplers.0", channels
                )
                skips.append(channels)
                block += 1
        self._res("middle_block.0", "mid_block.resnets.0", channels, channels)
        self._attention("middle_block.1", "mid_block.attentions.0", channels, levels - 1)
        self._res("middle_block.2", "mid_block.resnets.1", channels, channels)
        block = 0
        for up, level in enumerate(reversed(range(levels))):
            target = f"up_blocks.{up}"
            for i in range(config.num_res_blocks + 1):
                self._res(
                    f"output_blocks.{block}.0",
                    f"{target}.resnets.{i}",
                    channels,
                    config.channels[level],
                    skips.pop(),
                )
                channels, child = config.channels[level], 1
                if config.attends(level):
                    self._attention(
                        f"output_blocks.{block}.1", f"{target}.attentions.{i}", channels, level
                    )
                    child = 2
                if level and i == config.num_res_blocks:
                    self._resample(
                        f"output_blocks.{block}.{child}", "conv", f"{target}.upsamplers.0", channels
                    )
                block += 1
        self.names.floats["out.0"] = ("conv_norm_out", channels)
        self._layer("out.2", "conv_out", (config.out_channels, base, 3, 3))

    def _layer(
        self,
        name: str,
        target: str,
        shape: tuple[int, ...],
        layout: Layout = Layout.IMAGE,
        *,
        bias: bool = True,
        tokens: int = 0,
    ) -> None:
        self.names.layers.append(OfficialLayer(name, (target,), shape, layout, bias, tokens))

    def _resample(self, name: str, conv: str, target: str, channels: int) -> None:
        if self.config.resblock_updown:
            self._res(name, target, channels, channels)
        else:
            self._layer(f"{name}.{conv}", f"{target}.conv", (channels, channels, 3, 3))

    def _res(self, name: str, target: str, channels: int, out: int, skip: int = 0) -> None:
        read, embedding = channels + skip, 4 * self.config.model_channels
        self.names.floats[f"{name}.in_layers.0"] = (f"{target}.norm1", read)
        self._layer(f"{name}.in_layers.2", f"{target}.conv1", (out, read, 3, 3))
        projected = 2 * out if self.config.use_scale_shift_norm else out
        self._layer(
            f"{name}.emb_layers.1", f"{target}.time_emb_proj", (projected, embedding), Layout.VECTOR
        )
        self.names.floats[f"{name}.out_layers.0"] = (f"{target}.norm2", out)
        self._layer(f"{name}.out_layers.3", f"{target}.conv2", (out, out, 3, 3))
        if read != out:
            halves = (channels, skip) if skip else None
            shortcut = (f"{target}.conv_shortcut",)
            self.names.layers.append(
                OfficialLayer(
                    f"{name}.skip_connection",
                    shortcut,
                    (out, read, 1, 1),
                    Layout.IMAGE,
                    halves=halves,
                )
            )

    def _attention(self, name: str, target: str, channels: int, level: int) -> None:
        tokens = (self.config.image_size // 2**level) ** 2
        if self.config.use_spatial_transformer:
            self._spatial_transformer(name, target, channels, tokens)
        else:
            self._attention_block(name, target, channels, tokens)

    def _attention_block(self, name: str, target: str, channels: int, tokens: int) -> None:
        self.names.floats[f"{name}.norm"] = (f"{target}.group_norm", channels)
        self.names.heads[f"{name}.qkv"] = self.config.heads(channels)
        projections = (f"{target}.to_q", f"{target}.to_k", f"{target}.to_v")
        self.names.layers.append(
            OfficialLayer(
                f"{name}.qkv",
                projections,
                (3 * channels, channels, 1),
                Layout.TOKENS,
                tokens=tokens,
            )
        )
        self._layer(
            f"{name}.proj_out",
            f"{target}.to_out.0",
            (channels, channels, 1),
            Layout.TOKENS,
            tokens=tokens,
        )
        # q is [B, heads, N, d], k is transposed to [B, heads, d, N], the softmax is [B, heads, N,
        # N] and v is [B, heads, N, d].
        for matmul, quantizer, operand, axis in (
            ("qkv_matmul", "q", "q", 2),
            ("qkv_matmul", "k", "k", 3),
            ("smv_matmul", "v", "v", 2),
            ("smv_matmul", "w", "softmax", 3),
        ):
            quantizer = f"{name}.attention.{matmul}.act_quantizer_{quantizer}"
            self.names.operands.append(OfficialOperand(quantizer, target, operand, tokens, axis))

    def _spatial_transformer(self, name: str, target: str, channels: int, tokens: int) -> None:
        self.names.floats[f"{name}.norm"] = (f"{target}.norm", channels)
        self._layer(f"{name}.proj_in", f"{target}.proj_in", (channels, channels, 1, 1))
        context = self.config.context_dim or channels
        for depth in range(self.config.transformer_depth):
            inner = f"transformer_blocks.{depth}"
            for attention, read in (("attn1", channels), ("attn2", context)):
                part = f"{inner}.{attention}"
                for projection, inputs in (("to_q", channels), ("to_k", read), ("to_v", read)):
                    names = (f"{name}.{part}.{projection}", f"{target}.{part}.{projection}")
                    self._layer(*names, (channels, inputs), Layout.SEQUENCE, bias=False)
                self._layer(
                    f"{name}.{part}.to_out.0",
                    f"{target}.{part}.to_out.0",
                    (channels, channels),
                    Layout.SEQUENCE,
                )
                keys, size = (
                    (tokens if attention == "attn1" else None),
                    channels // self.config.heads(channels),
                )
                for quantizer, operand, along, axis in (
                    ("q", "q", size, 3),
                    ("k", "k", size, 2),
                    ("v", "v", size, 3),
                    ("w", "softmax", keys, 3),
                ):
                    quantizer = f"{name}.{part}.act_quantizer_{quantizer}"
                    self.names.operands.append(
                        OfficialOperand(quantizer, f"{target}.{part}", operand, along, axis)
                    )
            for layer, shape in (
                ("ff.net.0.proj", (8 * channels, channels)),
                ("ff.net.2", (channels, 4 * channels)),
            ):
                self._layer(
                    f"{name}.{inner}.{layer}", f"{target}.{inner}.{layer}", shape, Layout.SEQUENCE
                )
            for norm in ("norm1", "norm2", "norm3"):
                self.names.floats[f"{name}.{inner}.{norm}"] = (f"{target}.{inner}.{norm}", channels)
        self._layer(f"{name}.proj_out", f"{target}.proj_out", (channels, channels, 1, 1))


def _parse(path: Path) -> Any:
    text = read_bounded(path, _MOST_BYTES, "give the UNet's configuration").decode()
    if path.suffix == ".json":
        return json.loads(text)
    try:
        return load_yaml(text)
    except yaml.YAMLError as e:
        raise ValueError(str(e)) from e


def _get(content: Any, *keys: str) -> Any:
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise InputError(f"expected model.params.unet_config.params; {key!r} is missing")
        content = content[key]
    return content


def _beta(around: dict[str, Any], name: str, default: float) -> float:
    try:
        beta = float(around.get(name, default))  # YAML reads 1e-3 as text
    except (TypeError, ValueError, OverflowError):
        beta = 0.0
    if not 0 < beta < 1:
        raise InputError(f"{name}: expected a variance between 0 and 1, found {around[name]!r}")
    return beta
