"""Sana (arXiv 2410.10629): flow matching, linear attention, cross attention to the states of Gemma,
and a feed-forward of convolutions.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
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

USUAL_WIDTH = 2304
"""Gemma's, where the configuration does not say it; diffusers' default."""
_UNSUPPORTED = {
    "guidance_embeds": (False, "Sana-Sprint's guidance, which is embedded"),
    "qk_norm": (None, "norms of q and k across heads"),
    "timestep_scale": (1.0, "timesteps in other units than the scheduler's"),
}
"""By setting, the value that it must have, and what another one means."""


class FlatSana(SanaTransformer2DModel):
    """A SanaTransformer2DModel, called as a UNet is; see
    :class:`quest_deploy.models.networks.network.Network`.
    """

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        *,
        return_dict: bool = True,
    ) -> Any:
        """Predict.

        Args:
            encoder_hidden_states: [B, tokens, D].
            encoder_attention_mask: [B, tokens], 1 for tokens and 0 for padding.
        """
        side = self.config["patch_size"]
        hidden = self.patch_embed(sample)
        modulation, embedded = self.time_embed(
            spread(timestep, sample), batch_size=sample.shape[0], hidden_dtype=hidden.dtype
        )
        states = self.caption_norm(self.caption_projection(encoder_hidden_states))
        bias = (encoder_attention_mask - 1)[:, None] * PADDING
        for block in self.transformer_blocks:
            hidden = block(
                hidden,
                encoder_hidden_states=states,
                encoder_attention_mask=bias,
                timestep=modulation,
                height=sample.shape[-2] // side,
                width=sample.shape[-1] // side,
            )
        patches = self.proj_out(self.norm_out(hidden, embedded, self.scale_shift_table))
        output = unpatched(patches, sample, side)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class Gemma(PromptEncoder):
    """Gemma as Sana's pipeline runs it: behind an instruction, whose states are left out but for
    the first one's.
    """

    outputs = ("encoder_hidden_states", "encoder_attention_mask")

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.encoder = pipeline.text_encoder
        before, kept = "\n".join(_instruction(pipeline)), most_tokens(pipeline)
        length = len(pipeline.tokenizer.encode(before)) + kept - 2  # as diffusers counts
        self.tokens = (Tokens(length, masked=True, lower=True, before=before, kept=kept),)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        ids, mask, places = (each.long() for each in inputs)
        states = self.encoder(ids, attention_mask=mask)[0]
        chosen = places[..., None].expand(-1, -1, states.shape[-1])
        return states.gather(1, chosen), mask.gather(1, places).float()


class Sana(PatchTransformers):
    """See :class:`quest_deploy.models.networks.network.Network`."""

    class_names, flat_class = ("SanaTransformer2DModel", "FlatSana"), FlatSana
    embedder = "patch_embed"
    token_inputs = conditions = ("encoder_hidden_states", "encoder_attention_mask")
    flow_matching = True
    supervised_blocks = checkpointed_blocks = ("SanaTransformerBlock",)
    layers = "sana"
    prompt_encoder = Gemma

    def check(self, name: str, config: Config, folder: Path, *, of_text: bool) -> None:
        super().check(name, config, folder, of_text=of_text)
        if not of_text:
            raise InputError(f"{name}: a transformer of Sana without a text encoder")
        for key, (expected, why) in _UNSUPPORTED.items():
            if (found := config.get(key, expected)) != expected:
                raise InputError(
                    f"{name}: its transformer is not supported: {key} {found!r}: {why}; expected "
                    f"{expected!r}"
                )

    def guidance(self, config: Config, family: str) -> float:
        return 4.5

    def float_layers(self, config: Config) -> tuple[str, ...]:
        """See :class:`Network`: embedders, adaptive norm and last projection, and the depthwise
        convolutions, which multiply nine values each.
        """
        ends = ("patch_embed.*", "time_embed.*", "caption_projection.*", "proj_out")
        return (*ends, "*.ff.conv_depth")

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> tuple[States, States]:
        """See :class:`Network`; prompts have the instruction before them that the pipeline has."""
        instruction = _instruction(pipeline)
        return encoded_prompts(pipeline, prompts, complex_human_instruction=instruction)

    def random_states(self, config: Config, count: int, generator: torch.Generator) -> States:
        width = config.get("caption_channels", USUAL_WIDTH)
        return random_states(count, width, generator)


def _instruction(pipeline: Any) -> list[str]:
    """The lines that the pipeline puts before every prompt that is asked for."""
    lines: list[str] = signature(pipeline.__call__).parameters["complex_human_instruction"].default
    return lines
