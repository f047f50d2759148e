"""An IP-Adapter's image encoder, a ControlNet and text encoders as a package's models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn

from exporters.graph_info import input_sizes
from exporters.part_info import IDS, MASK, part_info
from quest_deploy.backends.base import check_sizes
from quest_deploy.models.residuals import IMAGE_TOKENS
from quest_deploy.models.unets import ADDED_CONDITIONS
from quest_deploy.serving.parts import text_output
from quest_deploy.serving.triton.graphs import PLACEHOLDER_DOMAIN

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir


class ImageEncoder(nn.Module):
    """An IP-Adapter's image encoder and projection, from what CLIP reads of an image, float32
    [B, 3, H, W], to the UNet's tokens [B, tokens, C].
    """

    outputs = (IMAGE_TOKENS,)

    def __init__(self, encoder: Any, projection: Any) -> None:
        """Join CLIP's vision model and the projection, both diffusers'."""
        super().__init__()
        self.encoder, self.projection = encoder, projection
        self.pooled = isinstance(projection, ImageProjection)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode and project."""
        found = self.encoder(pixels, output_hidden_states=not self.pooled)
        states = found.image_embeds if self.pooled else found.hidden_states[-2]
        tokens: Tensor = self.projection(states)
        return tokens


class EncoderPlaceholder(nn.Module):
    """A text encoder to be traced without its weights: a node for each output of its graph, which
    :func:`quest_deploy.serving.triton.graphs.with_parts` puts in their place.
    """

    def __init__(self, name: str, graph: ir.Model) -> None:
        """Stand for the part ``name``, whose graph is ``graph``."""
        super().__init__()
        self.name, self.kind = name, part_info(graph).kind
        self.inputs = input_sizes(graph)
        self.sizes: dict[str, list[Any]] = {
            x.name or "": list(x.shape or ())[1:] for x in graph.graph.outputs
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> Any:
        """What the encoder gives for ids [B, T], and a mask [B, T] where it reads one; raise
        InputError for another length than the graph's.
        """
        check_sizes(
            self.name,
            self.inputs[IDS],
            input_ids.shape,
            "; run `quest-deploy export-parts` again",
        )
        given = {IDS: input_ids}
        if MASK in self.inputs:
            given[MASK] = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        operands = tuple(x.int() for x in given.values())
        outputs = {
            output: torch.onnx.ops.symbolic(
                f"{PLACEHOLDER_DOMAIN}::{self.name}",
                operands,
                {"output": output},
                dtype=torch.float32,
                shape=[input_ids.shape[0], *sizes],
                version=1,
            )
            for output, sizes in self.sizes.items()
        }
        return text_output(self.kind, outputs, states=output_hidden_states)


class ControlNet(nn.Module):
    """A ControlNet, from the UNet's inputs and an image to what it adds to the UNet."""

    def __init__(self, net: Any, inputs: Sequence[str], pixels: int) -> None:
        """Wrap a ControlNetModel.

        Args:
            inputs: the names of the UNet's inputs that it takes, in order.
            pixels: of a latent's side. The image comes as [B, 3 x pixels², h, w], of the latents'
                height and width, so that one size says all of them.
        """
        super().__init__()
        self.net, self.inputs, self.pixels = net, inputs, pixels

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The residuals for ``inputs`` and, last, the image: of the skip connections in turn and
        of the middle block.
        """
        *values, image = inputs
        given = dict(zip(self.inputs, values, strict=True))
        added = {name: given[name] for name in ADDED_CONDITIONS if name in given}
        down, mid = self.net(
            given["sample"],
            given["timestep"],
            given["encoder_hidden_states"],
            controlnet_cond=nn.functional.pixel_shuffle(image, self.pixels),
            added_cond_kwargs=added or None,
            return_dict=False,
        )
        return (*down, mid)
