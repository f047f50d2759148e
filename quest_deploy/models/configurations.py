"""What the toolchain reads in a pipeline's configuration files, with bounds: a damaged or hostile
file is refused by name before it takes memory or time. Keys that only diffusers reads are its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from quest_deploy.artifacts.model_source import INDEX
from quest_deploy.artifacts.schema import parse
from quest_deploy.errors import InputError
from quest_deploy.files import read_json
from quest_deploy.models.registry import OTHERWISE

if TYPE_CHECKING:
    from pathlib import Path

MOST_LEVELS, MOST_CHANNELS = 8, 2**14
Channels = Annotated[int, Field(ge=1, le=MOST_CHANNELS)]
Side = Annotated[int, Field(ge=1, le=2**12)]
Layers = Annotated[int, Field(ge=1, le=16)]
Depth = Annotated[int, Field(ge=0, le=48)]
Blocks = Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_LEVELS)]
Item = TypeVar("Item")
PerLevel = Annotated[tuple[Item, ...], Field(min_length=1, max_length=MOST_LEVELS)]


class Configuration(BaseModel):
    """What configuration files have in common: keys that are not named here are diffusers' own."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class UNetConfiguration(Configuration):
    """unet/config.json."""

    class_name: str = Field(alias="_class_name")
    sample_size: Side | tuple[Side, Side]
    in_channels: Channels
    out_channels: Channels
    block_out_channels: PerLevel[Channels]
    down_block_types: Blocks
    up_block_types: Blocks
    layers_per_block: Layers | PerLevel[Layers] = 2
    transformer_layers_per_block: Depth | PerLevel[Depth | PerLevel[Depth]] = 1
    attention_head_dim: Channels | PerLevel[Channels] | None = None
    num_attention_heads: Channels | PerLevel[Channels] | None = None
    cross_attention_dim: Channels | PerLevel[Channels] | None = None
    norm_num_groups: Channels | None = 32
    norm_eps: float = 1e-5
    num_class_embeds: Annotated[int, Field(ge=1, le=10**6)] | None = None
    time_embedding_dim: Channels | None = None
    projection_class_embeddings_input_dim: Channels | None = None
    addition_time_embed_dim: Channels | None = None
    mid_block_type: str | None = None
    time_embedding_type: str | None = None


class TransformerConfiguration(Configuration):
    """transformer/config.json, of a transformer over square patches."""

    class_name: str = Field(alias="_class_name")
    sample_size: Side
    patch_size: Annotated[int, Field(ge=1, le=2**6)]
    in_channels: Channels
    out_channels: Channels | None = None
    num_layers: Annotated[int, Field(ge=1, le=2**8)]
    num_attention_heads: Channels
    attention_head_dim: Channels
    cross_attention_dim: Channels | None = None
    caption_channels: Channels | None = None
    num_cross_attention_heads: Channels | None = None
    cross_attention_head_dim: Channels | None = None
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] | None = None
    joint_attention_dim: Channels | None = None
    caption_projection_dim: Channels | None = None
    pooled_projection_dim: Channels | None = None
    pos_embed_max_size: Annotated[int, Field(ge=1, le=2**10)] | None = None
    num_embeds_ada_norm: Annotated[int, Field(ge=1, le=10**6)] | None = None
    norm_type: str | None = None
    use_additional_conditions: bool | None = None


class FluxConfiguration(Configuration):
    """transformer/config.json, of FLUX.1; its defaults are diffusers'."""

    class_name: str = Field(alias="_class_name")
    patch_size: Annotated[int, Field(ge=1, le=2**6)] = 1
    in_channels: Channels = 64
    out_channels: Channels | None = None
    num_layers: Annotated[int, Field(ge=1, le=2**8)] = 19
    num_single_layers: Annotated[int, Field(ge=1, le=2**8)] = 38
    num_attention_heads: Channels = 24
    attention_head_dim: Channels = 128
    joint_attention_dim: Channels = 4096
    pooled_projection_dim: Channels = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[Channels, Channels, Channels] = (16, 56, 56)


Shift = Annotated[float, Field(ge=-8, le=8)]
"""The logarithm of a shift."""
Tokens = Annotated[int, Field(ge=1, le=2**24)]


class SchedulerConfiguration(Configuration):
    """scheduler/scheduler_config.json."""

    num_train_timesteps: Annotated[int, Field(ge=1, le=10**5)] = 1000
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    beta_schedule: str = "linear"
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon"
    shift: Annotated[float, Field(gt=0)] | None = None
    flow_shift: Annotated[float, Field(gt=0)] | None = None
    steps_offset: Annotated[int, Field(ge=0, le=10**5)] = 0
    base_shift: Shift | None = None
    max_shift: Shift | None = None
    base_image_seq_len: Tokens | None = None
    max_image_seq_len: Tokens | None = None


class TextEncoderConfiguration(Configuration):
    """text_encoder_2/config.json."""

    projection_dim: Channels


class DecoderConfiguration(Configuration):
    """vae/config.json or vqvae/config.json."""

    block_out_channels: PerLevel[Channels] | None = Field(
        default=None,
        validation_alias=AliasChoices("block_out_channels", "decoder_block_out_channels"),
    )
    """AutoencoderTiny's files may have the decoder's alone."""
    scaling_factor: Annotated[float, Field(gt=0)] = 1.0
    shift_factor: float | None = None
    latent_channels: Channels | None = None
    sample_size: Side | tuple[Side, Side] | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @field_validator("latents_mean", "latents_std")
    @classmethod
    def _check_latents(
        cls, values: tuple[float, ...] | None, read: ValidationInfo
    ) -> tuple[float, ...] | None:
        channels = read.data.get("latent_channels")
        if values is not None and channels is not None and len(values) != channels:
            raise ValueError(f"expected {channels} numbers, latent_channels, found {len(values)}")
        return values


Read = TypeVar("Read", bound=Configuration)
Part = tuple[str | None, str | None]
PARTS = ("unet", "transformer", "scheduler", "text_encoder", "text_encoder_2", "vae", "vqvae")
"""Entries of an index that are parts; others may be settings of the pipeline."""


def read_configuration(kind: type[Read], path: Path) -> dict[str, Any]:
    """The content of a configuration file; raise InputError where it does not fit ``kind``."""
    # diffusers writes DPM-Solver's lambda_min_clipped as -Infinity.
    content: dict[str, Any] = read_json(path, repair=OTHERWISE, infinities=True)
    parse_configuration(kind, content, str(path))
    return content


def parse_configuration(kind: type[Read], content: dict[str, Any], where: str) -> None:
    """Raise InputError, which begins with ``where``, where ``content`` does not fit ``kind``."""
    parse(kind, content, where, OTHERWISE)


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json: by the name of each part its library and class; raise InputError where it
    is anything else.
    """
    path = folder / INDEX
    content = read_json(path, repair=OTHERWISE)
    if not isinstance(content, dict) or not isinstance(content.get("_class_name"), str):
        raise InputError(f"{path}: expected a pipeline with its _class_name; {OTHERWISE}")
    parts = {k: part for k, part in content.items() if isinstance(part, list) or k in PARTS}
    parse(dict[str, Part], parts, str(path), OTHERWISE)
    return content
