"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): flow matching, and joint attention of the sample's
patches and the tokens of three text encoders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from quest_deploy.models.networks.network import Config, States
from quest_deploy.models.networks.patch_transformers import (
    PatchTransformers,
    require_encoders,
    spread,
    unpatched,
)
from quest_deploy.models.networks.prompt_encoders import PromptEncoder, Tokens, most_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

RANDOM_TOKENS = 77 + 256
"""CLIP's, and as many as the pipeline pads T5's to."""
USUAL_SIDE = 96
"""Patches along a side, at most, where the configuration does not say it; diffusers' default."""


class FlatSD3(SD3Transformer2DModel):
    """An SD3Transformer2DModel, called as a UNet is; see
    :class:`quest_deploy.models.networks.network.Network`.
    """

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        *,
        return_dict: bool = True,
    ) -> Any:
        """Predict.

        Args:
            encoder_hidden_states: [B, tokens, D].
            pooled_projections: [B, D].
        """
        embedded = self.time_text_embed(spread(timestep, sample), pooled_projections)
        hidden, states = self.pos_embed(sample), self.context_embedder(encoder_hidden_states)
        for block in self.transformer_blocks:
            states, hidden = block(
                hidden_states=hidden, encoder_hidden_states=states, temb=embedded
            )
        patches = self.proj_out(self.norm_out(hidden, embedded))
        output = unpatched(patches, sample, self.config["patch_size"])
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class CLIPsAndT5(PromptEncoder):
    """Two CLIPs and T5 as Stable Diffusion 3's pipeline runs them: the CLIPs' last but one states
    side by side, as wide as T5's, and T5's behind them.
    """

    outputs = ("encoder_hidden_states", "pooled_projections")

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.clips = nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2])
        self.t5 = pipeline.text_encoder_3
        clip = Tokens(pipeline.tokenizer_max_length, cut=True)
        self.tokens = (clip, clip, Tokens(most_tokens(pipeline)))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *of_clips, of_t5 = (ids.long() for ids in inputs)
        found = [
            clip(ids, output_hidden_states=True)
            for clip, ids in zip(self.clips, of_clips, strict=True)
        ]
        last = self.t5(of_t5)[0]
        states = torch.cat([each.hidden_states[-2] for each in found], -1)
        wide = F.pad(states, (0, last.shape[-1] - states.shape[-1]))
        return torch.cat([wide, last], 1), torch.cat([each[0] for each in found], -1)


class SD3(PatchTransformers):
    """See :class:`quest_deploy.models.networks.network.Network`."""

    class_names, flat_class = ("SD3Transformer2DModel", "FlatSD3"), FlatSD3
    token_inputs = ("encoder_hidden_states",)
    conditions = (*token_inputs, "pooled_projections")
    flow_matching = True
    supervised_blocks = checkpointed_blocks = ("JointTransformerBlock",)
    supervised_output = 1
    layers = "sd3"
    prompt_encoder = CLIPsAndT5

    def check(self, name: str, config: Config, folder: Path, *, of_text: bool) -> None:
        super().check(name, config, folder, of_text=of_text)
        require_encoders(name, folder, ("text_encoder", "text_encoder_2", "text_encoder_3"))

    def largest_side(self, config: Config) -> int | None:
        """See :class:`Network`: positions are those of the middle of so many patches."""
        patches = config.get("pos_embed_max_size", USUAL_SIDE)
        return None if patches is None else int(patches * config["patch_size"])

    def build(self, class_name: str, config: Config) -> nn.Module:
        side = config.get("pos_embed_max_size", USUAL_SIDE)
        # The table of positions would take gigabytes to make, only to be dropped.
        network: Any = super().build(class_name, {**config, "pos_embed_max_size": 1})
        network.pos_embed.pos_embed_max_size = side
        network.register_to_config(pos_embed_max_size=side)
        built: nn.Module = network
        return built

    def guidance(self, config: Config, family: str) -> float:
        return 7.0

    def float_layers(self, config: Config) -> tuple[str, ...]:
        """See :class:`Network`: embedders, adaptive norms and last projection."""
        embedders = ("pos_embed.*", "time_text_embed.*", "context_embedder")
        return (*embedders, "*.norm1.linear", "*.norm1_context.linear", "norm_out.*", "proj_out")

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> tuple[States, States]:
        states, no_states, pooled, no_pooled = pipeline.encode_prompt(
            list(prompts), None, None, device=torch.device("cpu"), do_classifier_free_guidance=True
        )
        return _states(states, pooled), _states(no_states, no_pooled)

    def random_states(self, config: Config, count: int, generator: torch.Generator) -> States:
        width, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
        return _states(
            torch.randn(count, RANDOM_TOKENS, width, generator=generator),
            torch.randn(count, pooled, generator=generator),
        )


def _states(states: Tensor, pooled: Tensor) -> States:
    return {"encoder_hidden_states": states.float(), "pooled_projections": pooled.float()}
