"""An IP-Adapter's image encoder and a ControlNet as a package's models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn

from quest_deploy.models.residuals import IMAGE_TOKENS
from quest_deploy.models.unets import ADDED_CONDITIONS

if TYPE_CHECKING:
    from collections.abc import Sequence


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
