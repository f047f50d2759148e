"""PixArt-alpha and PixArt-Sigma (arXiv 2310.00426, 2403.04692): cross attention to the states of
T5, and one adaptive norm for all blocks, to which each adds a table of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor

from quest_deploy.errors import InputError
from quest_deploy.models.networks.network import Config, States
from quest_deploy.models.networks.patch_transformers import (
    PADDING,
    PatchTransformers,
    encoded_prompts,
    random_states,
    spread,
    unpatched,
)
from quest_deploy.models.networks.prompt_encoders import PromptEncoder, Tokens, most_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TOLD_SIZE = 128
"""The sample's side of the models that are told the image's size."""


class FlatPixArt(PixArtTransformer2DModel):
    """A PixArtTransformer2DModel, called as a UNet is; see
    :class:`quest_deploy.models.networks.network.Network`.
    """

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        *,
        return_dict: bool = True,
    ) -> Any:
        """Predict.

        Args:
            encoder_hidden_states: [B, tokens, D].
            encoder_attention_mask: [B, tokens], 1 for tokens and 0 for padding.
            resolution, aspect_ratio: [B, 2], height and width in pixels, and [B, 1], their
                quotient; of a model that is told them.
        """
        hidden = self.pos_embed(sample)
        modulation, embedded = self.adaln_single(
            spread(timestep, sample),
            {"resolution": resolution, "aspect_ratio": aspect_ratio},
            batch_size=sample.shape[0],
            hidden_dtype=hidden.dtype,
        )
        states = encoder_hidden_states
        if self.caption_projection is not None:
            states = self.caption_projection(states)
        bias = (encoder_attention_mask - 1)[:, None] * PADDING
        for block in self.transformer_blocks:
            hidden = block(
                hidden,
                encoder_hidden_states=states,
                encoder_attention_mask=bias,
                timestep=modulation,
            )
        shift, scale = (self.scale_shift_table + embedded[:, None]).chunk(2, dim=1)
        patches = self.proj_out(self.norm_out(hidden) * (1 + scale) + shift)
        # diffusers squeezes the patches first, which a graph cannot do where their number is open.
        output = unpatched(patches, sample, self.config["patch_size"])
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class T5WithMask(PromptEncoder):
    """T5 as PixArt's pipelines run it."""

    outputs = ("encoder_hidden_states", "encoder_attention_mask")

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.encoder = pipeline.text_encoder
        self.tokens = (Tokens(most_tokens(pipeline), masked=True, lower=True),)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        ids, mask = inputs
        return self.encoder(ids.long(), attention_mask=mask.long())[0], mask.float()


class PixArt(PatchTransformers):
    """See :class:`quest_deploy.models.networks.network.Network`."""

    class_names, flat_class = ("PixArtTransformer2DModel", "FlatPixArt"), FlatPixArt
    token_inputs = ("encoder_hidden_states", "encoder_attention_mask")
    conditions = (*token_inputs, "resolution", "aspect_ratio")
    flow_matching = None
    # The states of no prompt, which training drew from, in files that older diffusers wrote.
    unused_weights = ("caption_projection.y_embedding",)
    layers = "pixart"
    prompt_encoder = T5WithMask

    def check(self, name: str, config: Config, folder: Path, *, of_text: bool) -> None:
        super().check(name, config, folder, of_text=of_text)
        if not of_text:
            raise InputError(f"{name}: a transformer of PixArt without a text encoder")
        if _is_told(config) and config["sample_size"] != TOLD_SIZE:
            raise InputError(
                f"{name}: its transformer is not supported: use_additional_conditions with "
                f"sample_size {config['sample_size']}: diffusers tells of an image's size where it "
                f"is {TOLD_SIZE}"
            )

    def guidance(self, config: Config, family: str) -> float:
        return 4.5

    def float_layers(self, config: Config) -> tuple[str, ...]:
        """See :class:`Network`: embedders, adaptive norm and last projection."""
        text = ("caption_projection.*",) if config.get("caption_channels") is not None else ()
        return ("pos_embed.*", "adaln_single.*", *text, "proj_out")

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> tuple[States, States]:
        return encoded_prompts(pipeline, prompts)

    def random_states(self, config: Config, count: int, generator: torch.Generator) -> States:
        width = config.get("caption_channels") or config["cross_attention_dim"]
        return random_states(count, width, generator)

    def of_size(self, config: Config, size: tuple[int, int], count: int) -> States:
        if not _is_told(config):
            return {}
        height, width = size
        return {
            "resolution": torch.tensor([[height, width]], dtype=torch.float32).repeat(count, 1),
            "aspect_ratio": torch.tensor([[height / width]], dtype=torch.float32).repeat(count, 1),
        }


def _is_told(config: Config) -> bool:
    """Whether a transformer of ``config`` is told the image's size."""
    told = config.get("use_additional_conditions")
    return config["sample_size"] == TOLD_SIZE if told is None else bool(told)
