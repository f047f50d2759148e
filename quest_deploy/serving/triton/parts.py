"""What runs beside the UNet, as ONNX files: the text encoders as one model, and the decoder."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn

from exporters.torch_to_qdq import quiet
from quest_deploy.models.pipeline_model import unscaled
from quest_deploy.models.residuals import IMAGE_TOKENS
from quest_deploy.models.unets import ADDED_CONDITIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

OPSET = 20


class TextEncoder(nn.Module):
    """A pipeline's text encoders, their outputs named as the UNet's conditions.

    As diffusers' ``encode_prompt`` without ``clip_skip``: of one encoder the last layer's states;
    of Stable Diffusion XL's two the last but one's, side by side, and the second one's pooled
    state.
    """

    def __init__(self, *encoders: nn.Module) -> None:
        """Join ``encoders``, one or two."""
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    @property
    def outputs(self) -> list[str]:
        """What it gives, by name."""
        return ["encoder_hidden_states", "text_embeds"][: len(self.encoders)]

    def forward(self, *input_ids: Tensor) -> tuple[Tensor, ...]:
        """From the token ids of each encoder's tokenizer, int32 [B, T], to float32 [B, T, D], and
        [B, P] of two.
        """
        if len(self.encoders) == 1:
            return (self.encoders[0](input_ids[0].long())[0],)
        outputs = [
            encoder(ids.long(), output_hidden_states=True)
            for encoder, ids in zip(self.encoders, input_ids, strict=True)
        ]
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1][0]


class Decoder(nn.Module):
    """A pipeline's decoder, from the sampler's latents [B, C, h, w] to images [B, 3, H, W] in [-1,
    1], or a little beyond.
    """

    def __init__(self, decoder: Any) -> None:
        """Wrap an AutoencoderKL or a VQModel."""
        super().__init__()
        self.decoder = decoder

    def forward(self, sample: Tensor) -> Tensor:
        """Undo the scaling and decode."""
        image: Tensor = self.decoder.decode(unscaled(self.decoder, sample), return_dict=False)[0]
        return image


class Encoder(nn.Module):
    """A pipeline's encoder, from images [B, 3, H, W] in [-1, 1] to the mean and the deviation of
    their latents, each [B, C, h, w].
    """

    outputs = ("mean", "deviation")

    def __init__(self, encoder: Any, scale: float) -> None:
        """Wrap an AutoencoderKL, whose latents the UNet takes times ``scale``."""
        super().__init__()
        self.encoder, self.scale = encoder, scale

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Encode and scale."""
        found = self.encoder.encode(sample, return_dict=False)[0]
        return self.scale * found.mean, self.scale * found.std


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


def save_onnx(
    module: nn.Module,
    inputs: dict[str, Tensor],
    outputs: list[str],
    dynamic_axes: dict[int, str],
    path: Path,
) -> None:
    """Write ``module`` as ONNX, its weights beside it.

    Args:
        inputs: examples by name.
        dynamic_axes: the axes of each input that may be of any size, by their names.
    """
    with torch.no_grad(), warnings.catch_warnings(), quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=_shapes(module, inputs, dynamic_axes),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=True)


def _shapes(module: nn.Module, inputs: dict[str, Tensor], axes: Iterable[int]) -> Any:
    """What torch takes; an input that is no image has no axis but the batch that is dynamic."""
    each = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis in axes if not axis or value.dim() == 4}
        for value in inputs.values()
    )
    return (
        (each,) if isinstance(module, TextEncoder | ControlNet) else each
    )  # of *inputs, one argument holds all
