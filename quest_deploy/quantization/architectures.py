"""Networks as a checkpoint describes them: within bounds, and without memory for weights that the
checkpoint itself brings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate import init_empty_weights

from quest_deploy.artifacts.schema import parse
from quest_deploy.errors import InputError
from quest_deploy.models.networks import network_of

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn


def bounded_network(class_name: str, config: dict[str, Any]) -> nn.Module:
    """The network of ``config``; raise InputError where its class is unknown, or it is out of
    bounds or cannot be built.
    """
    kind = network_of(class_name)
    parse(kind.configuration, {**config, "_class_name": class_name}, "architecture")
    try:
        return kind.build(class_name, config)
    except Exception as e:  # diffusers raises whatever a configuration provokes
        raise InputError(
            f"architecture: {class_name} cannot be built of its configuration ({e})"
        ) from e


def without_weights() -> AbstractContextManager[None]:
    """Make parameters on the meta device meanwhile, and buffers as they are."""
    context: AbstractContextManager[None] = init_empty_weights(include_buffers=False)
    return context
