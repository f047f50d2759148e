"""FLUX.1 (dev and schnell, by Black Forest Labs): flow matching, attention of the sample's patches
and the text's tokens in one sequence, positions that turn q and k, and of dev an embedded guidance.

The graph takes latents and timesteps as every other network's does, [B, C, height, width] and the
scheduler's own, and packs the latents itself: their size says the positions, and samplers, runtimes
and decoders see one kind of sample. diffusers' pipeline gives packed latents, their positions and a
thousandth of the timestep, of which :meth:`Flux.from_pipeline` makes the graph's inputs.
"""

from __future__ import annotations

import math
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from quest_deploy.errors import InputError
from quest_deploy.models.channels import GUIDANCE, Channels
from quest_deploy.models.configurations import FluxConfiguration
from quest_deploy.models.networks.network import Config, States
from quest_deploy.models.networks.patch_transformers import (
    PatchTransformers,
    require_encoders,
    spread,
)
from quest_deploy.models.networks.prompt_encoders import PromptEncoder, Tokens, most_tokens
from quest_deploy.models.schedulers import DYNAMIC, OF_TOKENS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PACKED = 2
"""Latents along a patch's side."""
USUAL_SIDE = 128
"""Latents along a side, where no decoder says it; its pipeline's own."""
TOKENS = 512
"""As many as its pipeline pads T5's to."""
UNIT = 1000.0
"""Its pipeline divides timesteps by it, and diffusers' network multiplies with it, guidance too."""
FEW_STEPS = 4
"""What schnell takes."""


class FlatFlux(FluxTransformer2DModel):
    """A FluxTransformer2DModel, called as a UNet is; see
    :class:`quest_deploy.models.networks.network.Network`.
    """

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
        *,
        return_dict: bool = True,
    ) -> Any:
        """Predict.

        Args:
            encoder_hidden_states: T5's, [B, tokens, D].
            pooled_projections: CLIP's, [B, D].
            guidance: [B], the weight as users know it (3.5), of a model that embeds it.
        """
        hidden = self.x_embedder(packed(sample))
        weights = () if guidance is None else (UNIT * guidance,)
        embedded = self.time_text_embed(spread(timestep, sample), *weights, pooled_projections)
        states = self.context_embedder(encoder_hidden_states)
        rotary = self.rotary(states.shape[1], sample)
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            states, hidden = block(
                hidden_states=hidden,
                encoder_hidden_states=states,
                temb=embedded,
                image_rotary_emb=rotary,
            )
        patches = self.proj_out(self.norm_out(hidden, embedded))
        output = unpacked(patches, sample)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def rotary(self, tokens: int, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [tokens + patches, d] by which q and k turn (RoPE, arXiv 2104.09864),
        as operators of a graph: text is at 0, and a patch of ``sample`` [B, C, H, W] at its row and
        its column.
        """
        rows, columns = (side // PACKED for side in sample.shape[-2:])
        first, *axes = (self._angles(axis, sample) for axis in self.pos_embed.axes_dim)
        down, right = (
            torch.arange(count, dtype=torch.float32, device=sample.device)[:, None] * frequencies
            for count, frequencies in zip((rows, columns), axes, strict=True)
        )
        parts = (torch.zeros_like(first), down[:, None], right[None])
        patches = torch.cat([part.expand(rows, columns, -1) for part in parts], -1).flatten(0, 1)
        text = patches.new_zeros(tokens, patches.shape[1])
        angles = torch.cat([text, patches])
        both = torch.stack([angles, angles], -1).flatten(1)  # of the two halves of each pair
        return both.cos(), both.sin()

    def _angles(self, width: int, like: Tensor) -> Tensor:
        """What the pairs of an axis turn by from one place to the next, [width / 2]."""
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=like.device) / width
        return (float(self.pos_embed.theta) ** -exponents).float()


class Sinusoids(nn.Module):
    """diffusers' Timesteps with frequencies that are constants, to the bit diffusers'.

    A guidance of 3.5 is an angle of up to 3500: computed again in a graph, where an exponential may
    differ by its last bit, a frequency would turn it by 2e-4.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
        self.register_buffer("frequencies", exponents.exp(), persistent=False)

    def forward(self, steps: Tensor) -> Tensor:
        """steps [B] -> float32 [B, width], cosines before sines."""
        angles = steps[:, None].float() * self.frequencies.float()
        return torch.cat([angles.cos(), angles.sin()], -1)


class PooledCLIPAndT5(PromptEncoder):
    """T5, and CLIP's pooled state, as FLUX's pipeline runs them."""

    outputs = ("encoder_hidden_states", "pooled_projections")

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.clip, self.t5 = pipeline.text_encoder, pipeline.text_encoder_2
        clip = Tokens(pipeline.tokenizer_max_length, cut=True)
        self.tokens = (clip, Tokens(most_tokens(pipeline)))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        of_clip, of_t5 = (ids.long() for ids in inputs)
        return self.t5(of_t5)[0], self.clip(of_clip).pooler_output


class Flux(PatchTransformers):
    """See :class:`quest_deploy.models.networks.network.Network`."""

    class_names, flat_class = ("FluxTransformer2DModel", "FlatFlux"), FlatFlux
    configuration = FluxConfiguration
    token_inputs = ("encoder_hidden_states",)
    conditions = (*token_inputs, "pooled_projections", GUIDANCE)
    flow_matching, classifier_free = True, False
    supervised_blocks = checkpointed_blocks = (
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
    )
    supervised_output = 1
    layers = "flux"
    prompt_encoder = PooledCLIPAndT5

    def check(self, name: str, config: Config, folder: Path, *, of_text: bool) -> None:
        require_encoders(name, folder, ("text_encoder", "text_encoder_2"))
        found = _settings(config)
        axes, width = found["axes_dims_rope"], found["attention_head_dim"]
        for key, wrong, expected in (
            ("patch_size", found["patch_size"] != 1, "1, of latents that are packed"),
            ("in_channels", found["in_channels"] % PACKED**2, f"a multiple of {PACKED**2}"),
            (
                "axes_dims_rope",
                sum(axes) != width or any(axis % 2 for axis in axes),
                f"even numbers whose sum is attention_head_dim, {width}",
            ),
        ):
            if wrong:
                raise InputError(
                    f"{name}: its transformer is not supported: {key} {found[key]}: expected "
                    f"{expected}"
                )

    def channels(
        self, name: str, config: Config, pipeline: str, variance_type: str | None, *, of_text: bool
    ) -> Channels:
        """See :class:`Network`; packed, those of a patch's latents are one."""
        given = _settings(config)["in_channels"]
        if config.get("out_channels") not in (None, given):
            raise InputError(
                f"{name}: a transformer with in_channels {given} and out_channels "
                f"{config['out_channels']} is not supported; expected as many of both: those that "
                "fill, or are controlled by an image, are not run here"
            )
        return Channels(given // PACKED**2)

    def flat(self, network: nn.Module) -> nn.Module:
        embedders: Any = network.get_submodule("time_text_embed")
        embedders.time_proj = Sinusoids(embedders.timestep_embedder.linear_1.in_features)
        return super().flat(network)

    def sides(self, config: Config, of_decoder: int | None) -> tuple[int, int]:
        """See :class:`Network`; no file of the transformer's says it."""
        side = USUAL_SIDE if of_decoder is None else of_decoder
        if not side or side % PACKED:
            raise InputError(
                f"vae/config.json: sample_size: expected a multiple of {PACKED} latents, which are "
                f"packed, found {side}"
            )
        return side, side

    def sample_multiple(self, config: Config) -> int:
        return PACKED

    def schedule_tokens(self, size: tuple[int, int]) -> int | None:
        height, width = size
        return height * width // PACKED**2

    def usual_steps(self, config: Config, schedule: Mapping[str, Any]) -> int | None:
        """See :class:`Network`; schnell's neither embeds guidance nor shifts its schedule."""
        distilled = not self.embeds_guidance(config) and not schedule[OF_TOKENS][DYNAMIC]
        return FEW_STEPS if distilled else None

    def guidance(self, config: Config, family: str) -> float:
        return 3.5 if self.embeds_guidance(config) else 1.0

    def embeds_guidance(self, config: Config) -> bool:
        return bool(config.get("guidance_embeds"))

    def float_layers(self, config: Config) -> tuple[str, ...]:
        """See :class:`Network`: embedders, adaptive norms and last projection."""
        embedders = ("x_embedder", "context_embedder", "time_text_embed.*")
        norms = ("*.norm1.linear", "*.norm1_context.linear", "*.norm.linear")
        return (*embedders, *norms, "norm_out.*", "proj_out")

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> tuple[States, States]:
        """See :class:`Network`; no prompt guides it, and the states asked for stand for those."""
        states, pooled, _ = pipeline.encode_prompt(list(prompts), None, torch.device("cpu"))
        asked = {"encoder_hidden_states": states.float(), "pooled_projections": pooled.float()}
        return asked, asked

    def random_states(self, config: Config, count: int, generator: torch.Generator) -> States:
        found = _settings(config)
        width, pooled = found["joint_attention_dim"], found["pooled_projection_dim"]
        return {
            "encoder_hidden_states": torch.randn(count, TOKENS, width, generator=generator),
            "pooled_projections": torch.randn(count, pooled, generator=generator),
        }

    def from_pipeline(self, given: dict[str, Any]) -> dict[str, Any]:
        patches, images, text = (given.pop(x, None) for x in ("sample", "img_ids", "txt_ids"))
        steps = torch.as_tensor(given["timestep"])
        if steps.numel() and not 0 <= float(steps.max()) <= 1:
            raise InputError(
                f"timestep: expected the scheduler's divided by {UNIT:g}, as FLUX's pipeline has "
                f"it, found {float(steps.max()):g}"
            )
        rows, columns = _grid(patches, images, text)
        unflat = patches.new_zeros(()).expand(1, 1, PACKED * rows, PACKED * columns)
        return {**given, "sample": unpacked(patches, unflat), "timestep": steps * UNIT}

    def to_pipeline(self, prediction: Tensor) -> Tensor:
        return packed(prediction)


def packed(latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] as patches [B, H / 2 x W / 2, C x 2 x 2], row by row."""
    rows, columns = (side // PACKED for side in latents.shape[-2:])
    cut: Tensor = latents.unflatten(3, (columns, PACKED)).unflatten(2, (rows, PACKED))
    # [B, C, rows, 2, columns, 2] -> [B, rows, columns, C, 2, 2]
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(patches: Tensor, like: Tensor) -> Tensor:
    """Patches [B, H / 2 x W / 2, C x 2 x 2] as latents [B, C, H, W], of the height and width of
    ``like`` [..., H, W].
    """
    rows, columns = (side // PACKED for side in like.shape[-2:])
    cut: Tensor = patches.unflatten(2, (-1, PACKED, PACKED)).unflatten(1, (rows, columns))
    # [B, rows, columns, C, 2, 2] -> [B, C, rows, 2, columns, 2]
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _grid(patches: Tensor, images: Tensor | None, text: Tensor | None) -> tuple[int, int]:
    """How many rows and columns of patches [B, N, D] positions [N, 3] and those of the text say;
    raise InputError where they are others than a grid's, and the text's others than zero.
    """
    if images is not None:
        places = images[0] if images.dim() == 3 else images  # as older diffusers had it
        rows, columns = (int(places[:, axis].max()) + 1 for axis in (1, 2))
        if rows * columns == len(places) == patches.shape[1]:
            down = torch.arange(rows).repeat_interleave(columns)
            right = torch.arange(columns).repeat(rows)
            grid = torch.stack([torch.zeros_like(down), down, right], 1).to(places)
            if torch.equal(places, grid) and (text is None or not text.any()):
                return rows, columns
    raise InputError(
        "img_ids, txt_ids: expected the positions of one grid of patches, row by row, and zeros "
        "for the text: an engine computes them of the sample's size, and takes no others, such as "
        "those of a second image"
    )


def _settings(config: Config) -> dict[str, Any]:
    """``config`` with diffusers' defaults, which published files leave out."""
    parameters = signature(FluxTransformer2DModel.__init__).parameters.items()
    defaults = {name: p.default for name, p in parameters if p.default is not Parameter.empty}
    return {**defaults, **config}
