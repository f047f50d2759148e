"""What ControlNets and T2I-adapters add inside a UNet, each tensor an input of its own: float32
[B, C, height / divisor, width / divisor] of the sample's height and width.

Zeros add nothing: a UNet with these inputs computes then what it computes without them. Several
ControlNets add up before they reach the UNet, so that it has one set of inputs for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    T = TypeVar("T")

DOWN, MID = "down_block_additional_residual_", "mid_block_additional_residual"
"""A ControlNet's inputs: one for each skip connection, counted from 0, and the middle block's."""
_WITHOUT = ("UNet2DModel", "FlatLabelsUNet")
"""The classes of UNets that take no residuals."""
_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
"""The blocks whose skip connections are known."""


@dataclass(frozen=True)
class Residual:
    """A residual's channels, and what the sample's height and width are divided by in it."""

    channels: int
    divisor: int

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Its shape, without the batch, beside samples of this height and width."""
        return self.channels, height // self.divisor, width // self.divisor


def unet_residuals(config: Mapping[str, Any]) -> dict[str, Residual]:
    """The inputs that ControlNets give a UNet of ``config``, its ``_class_name`` among it; raise
    InputError where they give it none.
    """
    if (kind := config["_class_name"]) in _WITHOUT:
        raise InputError(
            f"ControlNet's inputs: expected a UNet of Stable Diffusion, found a {kind}, which "
            "takes none"
        )
    return controlnet_residuals(config)


def controlnet_residuals(config: Mapping[str, Any]) -> dict[str, Residual]:
    """The outputs of a ControlNet of ``config``; raise InputError where its blocks are not those of
    Stable Diffusion.
    """
    down = list(_skips(config))
    return {
        **{f"{DOWN}{i}": residual for i, residual in enumerate(down)},
        MID: Residual(down[-1].channels, down[-1].divisor),
    }


def _skips(config: Mapping[str, Any]) -> Iterator[Residual]:
    """What the down blocks keep for the up blocks, in order."""
    channels, kinds = config["block_out_channels"], config["down_block_types"]
    layers = config.get("layers_per_block", 2)
    counts = [layers] * len(channels) if isinstance(layers, int) else layers
    if strange := sorted(set(kinds) - set(_BLOCKS)):
        raise InputError(
            f"ControlNet's inputs: expected down blocks of {' and '.join(_BLOCKS)}, found "
            f"{', '.join(strange)}"
        )
    yield Residual(channels[0], 1)
    for level, (width, count) in enumerate(zip(channels, counts, strict=True)):
        for _ in range(count):
            yield Residual(width, 2**level)
        if level < len(channels) - 1:
            yield Residual(width, 2 ** (level + 1))


def packed(conditions: Mapping[str, T]) -> dict[str, Any]:
    """``conditions`` by name, the residuals among them as the arguments of diffusers' UNets."""
    found: dict[str, Any] = {k: x for k, x in conditions.items() if not k.startswith(DOWN)}
    if down := len(conditions) - len(found):
        residuals = tuple(conditions[f"{DOWN}{i}"] for i in range(down))
        found["down_block_additional_residuals"] = residuals
    return found


def unpacked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of :func:`packed`, for the arguments of diffusers' UNets that are given."""
    found = dict(arguments)
    for i, residual in enumerate(found.pop("down_block_additional_residuals", None) or ()):
        found[f"{DOWN}{i}"] = residual
    return found
