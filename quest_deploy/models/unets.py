"""UNets whose every condition is an argument of its own, a tensor [B, ...] of float32: what a graph
can have as inputs.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from quest_deploy.models.attention import attentions
from quest_deploy.models.residuals import packed
from quest_deploy.models.supported import has_cross_attention

ADDED_CONDITIONS = ("text_embeds", "time_ids")
"""What Stable Diffusion XL's UNet takes beside the text states, in diffusers packed into
``added_cond_kwargs``.
"""


class ResidualsUNet(UNet2DConditionModel):
    """A UNet2DConditionModel that takes what ControlNets and an IP-Adapter add to it by name.

    Attributes:
        recorded: what a checkpoint records as its class.
    """

    recorded = UNet2DConditionModel.__name__

    def forward(self, *arguments: Any, **conditions: Any) -> Any:
        return super().forward(*arguments, **packed(conditions))


class FlatConditionsUNet(ResidualsUNet):
    """A UNet2DConditionModel, called with SDXL's added conditions by name, class labels in float32,
    and without hidden states where nothing attends to them.
    """

    recorded = "FlatConditionsUNet"

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        return_dict: bool = True,
        **conditions: Tensor,
    ) -> Any:
        added = {name: conditions.pop(name) for name in ADDED_CONDITIONS if name in conditions}
        return super().forward(
            sample,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            added_cond_kwargs=added or None,
            return_dict=return_dict,
            **_whole_labels(conditions),
        )


class FlatLabelsUNet(UNet2DModel):
    """A UNet2DModel, called with class labels in float32."""

    recorded = "FlatLabelsUNet"

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, *, return_dict: bool = True, **conditions: Tensor
    ) -> Any:
        return super().forward(
            sample, timestep, return_dict=return_dict, **_whole_labels(conditions)
        )


FLAT_CLASSES: dict[str, type[nn.Module]] = {
    each.recorded: each for each in (ResidualsUNet, FlatConditionsUNet, FlatLabelsUNet)
}
"""By the name that a checkpoint records as its architecture's class."""


def with_flat_conditions(unet: nn.Module) -> nn.Module:
    """Give ``unet``, a diffusers UNet, one of these classes; it is the same object.

    Weights, configuration and module names stay: the class differs in its call alone.
    """
    config: Any = unet.config
    if isinstance(unet, UNet2DModel) and config.num_class_embeds is not None:
        unet.__class__ = FlatLabelsUNet
    elif isinstance(unet, UNet2DConditionModel):
        is_plain = (
            config.num_class_embeds is None
            and config.addition_embed_type is None
            and has_cross_attention({**config, "_class_name": UNet2DConditionModel.__name__})
        )
        unet.__class__ = ResidualsUNet if is_plain else FlatConditionsUNet
    return unet


def recorded_class(unet: nn.Module) -> str:
    """What a checkpoint records as the class of ``unet``."""
    return getattr(type(unet), "recorded", type(unet).__name__)


def _whole_labels(conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.long() if name == "class_labels" else value
        for name, value in conditions.items()
    }


def set_heads(model: nn.Module, heads: int) -> None:
    """Give every attention of ``model`` this number of heads; its weights keep their shapes."""
    for attention in attentions(model):
        attention.heads, attention.scale = heads, (attention.inner_dim // heads) ** -0.5
    model.fixed_heads = heads  # type: ignore[assignment]


def fixed_heads(model: nn.Module) -> int | None:
    """Return what :func:`set_heads` gave ``model``, or None."""
    return getattr(model, "fixed_heads", None)
