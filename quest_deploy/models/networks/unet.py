"""diffusers' UNets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import torch

from quest_deploy.models.channels import channels_of
from quest_deploy.models.conditions import TEXT_TOKENS, ClassLabels, states_width, time_ids
from quest_deploy.models.configurations import (
    TextEncoderConfiguration,
    UNetConfiguration,
    read_configuration,
)
from quest_deploy.models.networks.network import (
    CLASS_CONDITIONAL,
    TEXT_TO_IMAGE,
    UNCONDITIONAL,
    Config,
    Network,
    States,
)
from quest_deploy.models.residuals import unet_residuals
from quest_deploy.models.supported import (
    TIME_IDS,
    UNETS,
    check_time_ids,
    check_unet,
    has_cross_attention,
    sample_multiple,
)
from quest_deploy.models.unets import ADDED_CONDITIONS, FLAT_CLASSES, with_flat_conditions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from quest_deploy.models.channels import Channels
    from quest_deploy.models.residuals import Residual

GUIDANCE = {TEXT_TO_IMAGE: 7.5, CLASS_CONDITIONAL: 3.0, UNCONDITIONAL: 1.0}
"""What each family is used with: Stable Diffusion's default, QuEST's for ImageNet, and none."""


class UNets(Network):
    """See :class:`quest_deploy.models.networks.network.Network`."""

    part, noun = "unet", "UNet"
    class_names = tuple(dict.fromkeys((*UNETS, *FLAT_CLASSES)))
    configuration = UNetConfiguration
    conditions = ("encoder_hidden_states", "class_labels", *ADDED_CONDITIONS)
    token_inputs = ("encoder_hidden_states",)
    supervised_blocks = ("ResnetBlock2D", "Transformer2DModel")
    checkpointed_blocks = ("ResnetBlock2D", "Transformer2DModel", "Upsample2D", "Downsample2D")
    reconstructs = takes_loras = takes_variance = True

    def check(self, name: str, config: Config, folder: Path, *, of_text: bool) -> None:
        check_unet(name, config, of_text=of_text)
        path, pooled = folder / "text_encoder_2" / "config.json", None
        if path.exists():
            pooled = int(read_configuration(TextEncoderConfiguration, path)["projection_dim"])
        check_time_ids(name, config, pooled)

    def channels(
        self, name: str, config: Config, pipeline: str, variance_type: str | None, *, of_text: bool
    ) -> Channels:
        return channels_of(name, config, pipeline, variance_type, text=of_text)

    def family(self, config: Config, *, of_text: bool) -> str:
        """See :class:`Network`; it is also which layers QuEST trains: a UNet without
        cross-attention has attention blocks for transformers, whether it embeds a class or not.
        """
        if of_text:
            return TEXT_TO_IMAGE
        return CLASS_CONDITIONAL if has_cross_attention(config) else UNCONDITIONAL

    def layer_set_name(self, family: str) -> str:
        return family

    def guidance(self, config: Config, family: str) -> float:
        return GUIDANCE[family] if self.labels(config) is None else 1.0

    def residuals(self, config: Config, kind: str) -> dict[str, Residual]:
        return unet_residuals(config, kind)

    def labels(self, config: Config) -> ClassLabels | None:
        classes = config.get("num_class_embeds")
        return None if classes is None else ClassLabels(classes)

    def sides(self, config: Config, of_decoder: int | None) -> tuple[int, int]:
        side = config["sample_size"]
        height, width = (side, side) if isinstance(side, int) else side
        return height, width

    def sample_multiple(self, config: Config) -> int:
        return sample_multiple(config)

    def build(self, class_name: str, config: Config) -> nn.Module:
        kind: Any = FLAT_CLASSES.get(class_name) or getattr(diffusers, class_name)
        unet: nn.Module = kind.from_config(config)
        return unet

    def flat(self, network: nn.Module) -> nn.Module:
        return with_flat_conditions(network)

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> tuple[States, States]:
        given = {
            "prompt": prompts,
            "device": torch.device("cpu"),
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": True,
        }
        if hasattr(pipeline, "encode_prompt"):
            encoded: Sequence[torch.Tensor] = pipeline.encode_prompt(**given)
        else:  # instruct-pix2pix's, which gives both, and the unconditional ones twice
            encoded = pipeline._encode_prompt(**given).chunk(3)[:2]
        names = ("encoder_hidden_states", "text_embeds")  # each with its unconditional half behind
        asked, unasked = (
            dict(zip(names, (x.float() for x in encoded[i::2]), strict=False)) for i in (0, 1)
        )
        return asked, unasked

    def random_states(self, config: Config, count: int, generator: torch.Generator) -> States:
        width = states_width(config)
        states = {
            "encoder_hidden_states": torch.randn(count, TEXT_TOKENS, width, generator=generator)
        }
        if config.get("addition_embed_type") == "text_time":
            pooled = (
                config["projection_class_embeddings_input_dim"]
                - TIME_IDS * config["addition_time_embed_dim"]
            )
            states["text_embeds"] = torch.randn(count, pooled, generator=generator)
        return states

    def of_size(self, config: Config, size: tuple[int, int], count: int) -> States:
        if config.get("addition_embed_type") != "text_time":
            return {}
        return {"time_ids": time_ids(*size).repeat(count, 1)}
