"""A ControlNet as a package's model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from quest_deploy.models.unets import ADDED_CONDITIONS

if TYPE_CHECKING:
    from collections.abc import Sequence


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
        """The residuals for ``inputs`` and, last, the image, in the order of the UNet's inputs."""
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
