"""What ControlNets and T2I-adapters add inside a UNet, each tensor an input of its own: float32
[B, C, height / divisor, width / divisor] of the sample's height and width; and an IP-Adapter's
inputs.

Zeros add nothing: a UNet with these inputs computes then what it computes without them. Several
ControlNets add up before they reach the UNet, so that it has one set of inputs for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping

    from quest_deploy.artifacts.scheme import Scheme

    T = TypeVar("T")

DOWN, MID = "down_block_additional_residual_", "mid_block_additional_residual"
"""A ControlNet's inputs: one for each skip connection, counted from 0, and the middle block's."""
INTRABLOCK = "down_intrablock_additional_residual_"
"""A T2I-adapter's: one inside each down block, and the middle block's behind them."""
CONTROLNET, T2I_ADAPTER = KINDS = ("controlnet", "t2i_adapter")
"""What adds them; an option's names begin so."""
PARTS = {CONTROLNET: "controlnet", T2I_ADAPTER: "adapter"}
"""What diffusers' pipelines call them."""
IP_ADAPTER = "ip_adapter"
IMAGE_TOKENS, IMAGE_SCALE = IMAGE_PROMPT = ("ip_adapter_tokens", "ip_adapter_scale")
"""An IP-Adapter's inputs: an image's tokens, float32 [B, tokens, C] as text states are, and the
scale of what they add, float32 [B].
"""
_ARGUMENTS: dict[str, tuple[str, type[list[Any]] | type[tuple[Any, ...]]]] = {
    DOWN: ("down_block_additional_residuals", tuple),
    INTRABLOCK: ("down_intrablock_additional_residuals", list),  # of which diffusers takes one off
}
"""The arguments of diffusers' UNets that are several inputs here."""
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


def unet_residuals(config: Mapping[str, Any], kind: str = CONTROLNET) -> dict[str, Residual]:
    """The inputs that a ``kind`` gives a UNet of ``config``, its ``_class_name`` among it; raise
    InputError where it gives it none.
    """
    if config["_class_name"] in _WITHOUT:
        raise takes_none(config, kind)
    return {CONTROLNET: controlnet_residuals, T2I_ADAPTER: adapter_residuals}[kind](config)


def takes_none(config: Mapping[str, Any], kind: str) -> InputError:
    """The error that a network of ``config`` has no inputs of a ``kind``."""
    return InputError(
        f"{kind}: expected a UNet of Stable Diffusion, found a {config['_class_name']}, which "
        "takes no inputs of it"
    )


def check_unrecorded(scheme: Scheme, kind: str) -> None:
    """Raise InputError where a UNet that is calibrated without a ``kind`` cannot get its inputs."""
    if scheme.split_shortcuts and kind == CONTROLNET:
        raise InputError(
            f"{flag(kind)}-inputs: with split shortcuts a skip connection and the next layer share "
            "a quantizer unless something was added to one of them; expected a workspace that is "
            f"calibrated with {flag(kind)}, or with --whole-shortcuts"
        )


def flag(kind: str) -> str:
    """The option that names what adds them."""
    return f"--{kind.replace('_', '-')}"


def kind_of(name: str) -> str:
    """What gives the input ``name``."""
    if name in IMAGE_PROMPT:
        return IP_ADAPTER
    return T2I_ADAPTER if name.startswith(INTRABLOCK) else CONTROLNET


def adapter_residuals(config: Mapping[str, Any]) -> dict[str, Residual]:
    """The inputs that T2I-adapters give a UNet of ``config``; raise InputError where its blocks are
    not those of Stable Diffusion.
    """
    _check_blocks(config)
    channels, kinds = config["block_out_channels"], config["down_block_types"]
    last = len(channels) - 1
    # A block with attention adds it before it halves, another one behind.
    halvings = [
        level + (kind != "CrossAttnDownBlock2D" and level < last)
        for level, kind in enumerate(kinds)
    ]
    found = [Residual(c, 2**h) for c, h in zip(channels, halvings, strict=True)]
    return {f"{INTRABLOCK}{i}": x for i, x in enumerate([*found, Residual(channels[-1], 2**last)])}


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
    _check_blocks(config)
    channels, layers = config["block_out_channels"], config.get("layers_per_block", 2)
    counts = [layers] * len(channels) if isinstance(layers, int) else layers
    yield Residual(channels[0], 1)
    for level, (width, count) in enumerate(zip(channels, counts, strict=True)):
        for _ in range(count):
            yield Residual(width, 2**level)
        if level < len(channels) - 1:
            yield Residual(width, 2 ** (level + 1))


def _check_blocks(config: Mapping[str, Any]) -> None:
    if strange := sorted(set(config["down_block_types"]) - set(_BLOCKS)):
        raise InputError(
            f"a ControlNet's or T2I-adapter's inputs: expected down blocks of "
            f"{' and '.join(_BLOCKS)}, found {', '.join(strange)}"
        )


def check_image_prompt(given: Container[str]) -> None:
    """Raise InputError where one of an IP-Adapter's inputs is ``given`` alone, which would add
    nothing.
    """
    missing = [name for name in IMAGE_PROMPT if name not in given]
    if len(missing) == 1:
        raise InputError(
            f"{missing[0]}: expected both {' and '.join(IMAGE_PROMPT)}, or neither: an image's "
            "tokens add nothing without their scale"
        )


def packed(conditions: Mapping[str, T]) -> dict[str, Any]:
    """``conditions`` by name, the residuals among them as the arguments of diffusers' UNets; an
    IP-Adapter's inputs beside the text states, as
    :class:`quest_deploy.models.attention.WrittenAttention` takes them. Raise InputError where one
    of those two is missing.
    """
    check_image_prompt(conditions)
    found: dict[str, Any] = dict(conditions)
    if IMAGE_TOKENS in found:
        image = (found.pop(name) for name in IMAGE_PROMPT)
        found["encoder_hidden_states"] = (found["encoder_hidden_states"], *image)
    for prefix, (argument, kind) in _ARGUMENTS.items():
        if count := sum(name.startswith(prefix) for name in conditions):
            found[argument] = kind(found.pop(f"{prefix}{i}") for i in range(count))
    return found


def unpacked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of :func:`packed`, for the arguments of diffusers' UNets that are given."""
    found = dict(arguments)
    for prefix, (argument, _) in _ARGUMENTS.items():
        for i, residual in enumerate(found.pop(argument, None) or ()):
            found[f"{prefix}{i}"] = residual
    return found
