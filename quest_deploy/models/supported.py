"""Which UNets go through the toolchain, by their configurations, and why others do not.

Asked when a model is first loaded, so that nothing is refused after minutes of calibration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

UNETS = ("UNet2DConditionModel", "UNet2DModel")
CONDITIONS = (
    "time_cond_proj_dim",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "class_embed_type",
)
"""Settings of conditions that no model's sampler here would give."""
TIME_IDS = 6
"""What Stable Diffusion XL is told of the picture's size."""


def has_cross_attention(config: Mapping[str, Any]) -> bool:
    """Whether a UNet of ``config`` attends to hidden states."""
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    blocks = (*config["down_block_types"], *config["up_block_types"], middle or "")
    return config["_class_name"] != "UNet2DModel" and any("CrossAttn" in name for name in blocks)


def sample_multiple(config: Mapping[str, Any]) -> int:
    """What heights and widths of the samples must be multiples of: every level but the last
    halves them.
    """
    return int(2 ** (len(config["down_block_types"]) - 1))


def check_unet(name: str, config: Mapping[str, Any], *, of_text: bool) -> None:
    """Raise InputError, which names the setting, where a UNet is not supported.

    Args:
        name: of the model.
        config: of its UNet.
        of_text: whether its pipeline has a text encoder.
    """
    if (found := config.get("_class_name")) not in UNETS:
        raise InputError(f"{name}: expected a UNet of {' or '.join(UNETS)}, found {found}")
    if (problem := next(_problems(config, of_text=of_text), None)) is not None:
        raise InputError(f"{name}: its UNet is not supported: {problem}")


def _problems(config: Mapping[str, Any], *, of_text: bool) -> Iterator[str]:
    for key in CONDITIONS:
        if config.get(key) is not None:
            yield f"{key} {config[key]!r} is a condition that no sampler here gives"
    added = config.get("addition_embed_type")
    if added not in (None, "text_time"):
        yield f"addition_embed_type {added!r}: expected none, or text_time"
    labels = config.get("num_class_embeds")
    attends = has_cross_attention(config)
    if labels is not None and (of_text or attends):
        yield (
            f"num_class_embeds {labels} beside text or tokens: expected one condition (of an "
            "upscaler it is the level of noise in the picture, which nothing here gives)"
        )
    if of_text and not attends:
        yield "a text encoder, and no block with cross-attention that would read it"
    if added == "text_time" and not of_text:
        yield "addition_embed_type 'text_time' without a text encoder"
    yield from _sizes(config)
    kind = config.get("time_embedding_type", "positional")
    if config["_class_name"] == "UNet2DModel" and kind != "positional":
        reason = {
            "fourier": "the UNet reads noise levels (sigmas), not timesteps",
            "learned": "a table has no row for the timesteps between, which samplers visit",
        }
        yield f"time_embedding_type {kind!r}: {reason.get(kind, 'unknown')}"


def _sizes(config: Mapping[str, Any]) -> Iterator[str]:
    size, multiple = config["sample_size"], sample_multiple(config)
    sides = (size, size) if isinstance(size, int) else size
    if any(side % multiple for side in sides):
        yield (
            f"sample_size {size}: expected multiples of {multiple}, since its "
            f"{len(config['down_block_types'])} levels halve it"
        )


def check_time_ids(name: str, config: Mapping[str, Any], pooled: int | None) -> None:
    """Raise InputError where a UNet of Stable Diffusion XL is told something else than the six
    numbers of the picture's size: the refiner has five, an aesthetic score among them.

    Args:
        pooled: the width of the second text encoder's pooled state, where it is known.
    """
    if config.get("addition_embed_type") != "text_time":
        return
    width = config.get("projection_class_embeddings_input_dim")
    each = config.get("addition_time_embed_dim")
    if width is None or each is None or width <= TIME_IDS * each:
        raise InputError(
            f"{name}: its UNet's projection_class_embeddings_input_dim {width} does not hold "
            f"{TIME_IDS} times addition_time_embed_dim {each} and a text's state"
        )
    if pooled is not None and width != pooled + TIME_IDS * each:
        raise InputError(
            f"{name}: its UNet's projection_class_embeddings_input_dim is {width}: expected "
            f"{pooled} + {TIME_IDS} x {each}, a text's state and the picture's size; a refiner "
            "(five numbers, with an aesthetic score) refines pictures, and is not supported"
        )
