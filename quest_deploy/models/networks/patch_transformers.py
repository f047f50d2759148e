"""Transformers over patches of a latent, modulated by the timestep (arXiv 2212.09748): what their
families have in common.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor

from quest_deploy.artifacts.model_source import INDEX
from quest_deploy.errors import InputError
from quest_deploy.files import read_json
from quest_deploy.models.channels import Channels
from quest_deploy.models.configurations import TransformerConfiguration
from quest_deploy.models.networks.network import TEXT_TO_IMAGE, Config, Network, States

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from quest_deploy.models.configurations import Configuration

PROMPT_TOKENS = 300
"""As many as the pipelines of PixArt-Sigma and Sana pad prompts to."""
PADDING = 10000.0
"""What diffusers takes from the scores of padding."""


class PatchTransformers(Network):
    """What the families have in common; each adds its classes, its conditions and its layers.

    Attributes:
        flat_class: diffusers' class with flat conditions, called as ``class_names`` has it behind
            diffusers' own.
        layers: which of QuEST's layer sets applies.
        embedder: the module of the patches.
    """

    part, noun = "transformer", "transformer"
    configuration: type[Configuration] = TransformerConfiguration
    supervised_blocks: tuple[str, ...] = ("BasicTransformerBlock",)
    checkpointed_blocks: tuple[str, ...] = ("BasicTransformerBlock",)
    flat_class: type[nn.Module]
    layers: str
    embedder = "pos_embed"

    def check(self, name: str, config: Config, folder: Path, *, of_text: bool) -> None:
        size, patch = config["sample_size"], config["patch_size"]
        if size % patch:
            raise InputError(
                f"{name}: its transformer is not supported: sample_size {size}: expected a "
                f"multiple of its patch_size {patch}"
            )
        width = config["num_attention_heads"] * config["attention_head_dim"]
        if width % 4:
            raise InputError(
                f"{name}: its transformer is not supported: num_attention_heads times "
                f"attention_head_dim is {width}: expected a multiple of 4, for sines and cosines "
                "of both sides"
            )

    def channels(
        self, name: str, config: Config, pipeline: str, variance_type: str | None, *, of_text: bool
    ) -> Channels:
        """See :class:`Network`; a variance that is predicted is left out, as in diffusers."""
        given = config["in_channels"]
        predicted = given if config.get("out_channels") is None else config["out_channels"]
        if predicted not in (given, 2 * given):
            raise InputError(
                f"{name}: a transformer with in_channels {given} and out_channels {predicted} is "
                "not supported; expected as many of both, or twice as many out_channels"
            )
        return Channels(given)

    def family(self, config: Config, *, of_text: bool) -> str:
        """See :class:`Network`; most read prompts."""
        return TEXT_TO_IMAGE

    def layer_set_name(self, family: str) -> str:
        return self.layers

    def sides(self, config: Config, of_decoder: int | None) -> tuple[int, int]:
        return config["sample_size"], config["sample_size"]

    def sample_multiple(self, config: Config) -> int:
        return int(config["patch_size"])

    def without_padding(self, conditions: States) -> States:
        """See :class:`Network`; a prompt's tokens, repeated, are in the place of its padding."""
        if (mask := conditions.get("encoder_attention_mask")) is None:
            return conditions
        states = repeated_tokens(conditions["encoder_hidden_states"], mask)
        return {**conditions, "encoder_hidden_states": states}

    def build(self, class_name: str, config: Config) -> nn.Module:
        kind: Any = getattr(diffusers, self.class_names[0])
        return self.flat(kind.from_config(config))

    def flat(self, network: nn.Module) -> nn.Module:
        network.__class__ = self.flat_class
        patches: Any = network.get_submodule(self.embedder)
        if getattr(patches, "pos_embed", None) is not None:  # some have no positions
            patches.__class__ = AnySizePatchEmbed
            patches.compute_positions()
        return network


class AnySizePatchEmbed(PatchEmbed):
    """A PatchEmbed that computes its positions from the sample's height and width, as operators of
    a graph; diffusers has a table for one size, and computes others' beside the model.
    """

    width: int
    """Of a position, which the projection has no more once it is quantized."""

    def compute_positions(self) -> None:
        """Forget diffusers' table of positions, which may be a gigabyte; raise InputError where it
        is not what is computed instead.
        """
        self.width = self.proj.out_channels
        table: Tensor | None = self._buffers.pop("pos_embed", None)
        largest = self.pos_embed_max_size
        if table is None or table.is_meta or not largest:
            return
        # Columns along the first row of patches, and rows along the first column: all there is.
        half = table.shape[-1] // 2
        grid = table.float().unflatten(1, (largest, largest))[0]
        expected = self._sines(largest, table.device)
        for found in (grid[0, :, :half], grid[:, 0, half:]):
            if not torch.allclose(found, expected, atol=2e-3):  # as of a file in half precision
                raise InputError(
                    "the transformer's pos_embed.pos_embed: expected the sines and cosines of its "
                    "configuration, found other positions, which are not supported"
                )

    def forward(self, latent: Tensor) -> Tensor:
        """latent [B, C, H, W] -> [B, patches, D]."""
        patches = self.proj(latent)
        rows, columns = patches.shape[-2:]
        # The first half of the width is of the columns, though diffusers calls it the height's.
        across, down = (self._sines(count, patches.device) for count in (columns, rows))
        parts = (across[None], down[:, None])
        positions = torch.cat([part.expand(rows, columns, -1) for part in parts], -1)
        embedded: Tensor = patches.flatten(2).transpose(1, 2) + positions.flatten(0, 1)[None]
        return embedded

    def _sines(self, count: Any, device: torch.device) -> Tensor:
        """The positions of ``count`` patches along one side, [count, D / 2]: the middle ones of the
        largest side where the model has one, and else so many that they span what the model's own
        side does.
        """
        quarter = self.width // 4
        exponents = torch.arange(quarter, dtype=torch.float64, device=device) / quarter
        frequencies = (10000.0**-exponents).float()
        places = torch.arange(count, dtype=torch.float32, device=device)
        largest = self.pos_embed_max_size
        if largest:
            places = places + (largest - count) // 2
        span = self.base_size / self.interpolation_scale
        units = places * (span / largest) if largest else places * span / count
        angles = units[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)


def require_encoders(name: str, folder: Path, encoders: Sequence[str]) -> None:
    """Raise InputError where one of the text ``encoders`` is not in the index of the pipeline in
    ``folder``, of the model ``name``.
    """
    index = read_json(folder / INDEX)
    if absent := [part for part in encoders if (index.get(part) or [None])[0] is None]:
        raise InputError(
            f"{name}: expected its text encoders {', '.join(encoders)}, and {absent[0]} is not in "
            f"its {INDEX}; get the model whole"
        )


def unpatched(patches: Tensor, sample: Tensor, side: int) -> Tensor:
    """The prediction [B, C, H, W] of ``sample`` [B, ..., H, W] from its patches [B, patches, side x
    side x C].
    """
    rows, columns = sample.shape[-2] // side, sample.shape[-1] // side
    # [B, rows, columns, side, side, C] -> [B, C, rows * side, columns * side]
    cut: Tensor = patches.unflatten(2, (side, side, -1)).unflatten(1, (rows, columns))
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def repeated_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """The states [N, tokens, D] with a row's tokens in turn, from its first, in the place of its
    padding; a row of padding alone stays. ``mask`` as of :func:`masked_states`.
    """
    real, places = mask > 0, torch.arange(mask.shape[1])
    counts = real.sum(1, keepdim=True)
    counts = counts.where(counts > 0, mask.shape[1])
    tokens_first = real.int().argsort(dim=1, descending=True, stable=True)
    chosen = places.where(real, tokens_first.gather(1, places % counts))
    return states.gather(1, chosen[..., None].expand_as(states))


def masked_states(states: Tensor, mask: Tensor) -> States:
    """The states [N, tokens, D] of prompts and their mask [N, tokens], 1 for a token and 0 for
    padding, as conditions.
    """
    return {"encoder_hidden_states": states.float(), "encoder_attention_mask": mask.float()}


def encoded_prompts(pipeline: Any, prompts: Sequence[str], **options: Any) -> tuple[States, States]:
    """:func:`masked_states` of prompts and of none, by the ``encode_prompt`` of a pipeline that
    gives masks; ``options`` are its further arguments.
    """
    states, mask, no_states, no_mask = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=True, device=torch.device("cpu"), **options
    )
    return masked_states(states, mask), masked_states(no_states, no_mask)


def random_states(count: int, width: int, generator: torch.Generator) -> States:
    """:func:`masked_states` of ``count`` prompts, random normal [count, PROMPT_TOKENS, width]; a
    half of the tokens, or more, are padding.
    """
    lengths = torch.randint(1, PROMPT_TOKENS // 2, (count, 1), generator=generator)
    states = torch.randn(count, PROMPT_TOKENS, width, generator=generator)
    return masked_states(states, torch.arange(PROMPT_TOKENS) < lengths)


def spread(timestep: Tensor | float, like: Tensor) -> Tensor:
    """``timestep``, a number or [B], as [B] of the sample ``like`` [B, ...]."""
    steps = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep)
    return steps.expand(like.shape[0])
