"""UNets as a checkpoint describes them: within bounds, and without memory for weights that the
checkpoint itself brings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate import init_empty_weights

from quest_deploy.artifacts.schema import parse
from quest_deploy.errors import InputError
from quest_deploy.models.configurations import UNetConfiguration

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn


def bounded_unet(unet_class: Any, config: dict[str, Any]) -> nn.Module:
    """The UNet of ``config``; raise InputError where it is out of bounds or cannot be built."""
    name = unet_class.__name__
    parse(UNetConfiguration, {**config, "_class_name": name}, "architecture")
    try:
        unet: nn.Module = unet_class.from_config(config)
    except Exception as e:  # diffusers raises whatever a configuration provokes
        raise InputError(f"architecture: {name} cannot be built of its configuration ({e})") from e
    return unet


def without_weights() -> AbstractContextManager[None]:
    """Make parameters on the meta device meanwhile, and buffers as they are."""
    context: AbstractContextManager[None] = init_empty_weights(include_buffers=False)
    return context
