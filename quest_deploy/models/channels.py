"""UNets that read more channels than they sample, or predict more: what an image is inpainted or
edited from, and a learned variance.

The UNet has one input, ``sample``, in every case: the latents, and behind them the channels of an
image, which stay the same at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from quest_deploy.models.registry import DiffusionModel

IMAGE_CONDITION = "image_condition"
"""The channels behind the latents, float32 [B, C, H, W], among a model's conditions. Inpainting has
the mask and the masked image's latents, instruct-pix2pix the image's latents.
"""
GUIDANCE = "guidance"
"""The guidance weight, float32 [B], among the conditions of a model that embeds it."""
INPAINTING, EDITING = "inpainting", "instruct-pix2pix"
IMAGE_KINDS = {
    "StableDiffusionInpaintPipeline": INPAINTING,
    "StableDiffusionXLInpaintPipeline": INPAINTING,
    "StableDiffusionInstructPix2PixPipeline": EDITING,
    "StableDiffusionXLInstructPix2PixPipeline": EDITING,
}
"""By the class of a diffusers pipeline, what it makes of an image."""
LEARNED_VARIANCE = ("learned", "learned_range")


@dataclass(frozen=True)
class Channels:
    """What a UNet's channels are.

    Attributes:
        sampled: of the latents: the first ones of its input, and of its output.
        image: of :data:`IMAGE_CONDITION`, the rest of its input.
        image_kind: what the model makes of an image: ``INPAINTING`` or ``EDITING``; None where it
            takes none. Diffusers inpaints also with a UNet that has no channels for it.
    """

    sampled: int
    image: int = 0
    image_kind: str | None = None


def channels_of(
    name: str, unet: Mapping[str, Any], pipeline: str, variance_type: str | None, *, text: bool
) -> Channels:
    """What the channels of ``unet``, a configuration, are.

    Args:
        name: the model's, for the message.
        pipeline: its diffusers class.
        variance_type: of its scheduler.
        text: whether it reads prompts: diffusers' pipelines that do take no learned variance.

    Raises:
        InputError: its numbers of channels fit no kind of model that is known.
    """
    given, predicted = unet["in_channels"], unet["out_channels"]
    kind, learned = IMAGE_KINDS.get(pipeline), variance_type in LEARNED_VARIANCE
    image = {INPAINTING: predicted + 1, EDITING: predicted}.get(kind or "", 0)
    if given == predicted and kind != EDITING and not learned:
        return Channels(predicted, image_kind=kind)
    if kind is not None and given == predicted + image and not learned:
        return Channels(predicted, image, kind)
    if kind is None and predicted == 2 * given and learned and not text:
        return Channels(given)
    raise InputError(
        f"{name}: a UNet with in_channels {given} and out_channels {predicted} in a {pipeline} "
        f"whose scheduler's variance_type is {variance_type} is not supported; expected as many of "
        "both, for inpainting (9 and 4) or instruct-pix2pix (8 and 4) a pipeline of "
        f"{', '.join(IMAGE_KINDS)}, or for a variance_type of {' or '.join(LEARNED_VARIANCE)} "
        "without text twice as many out_channels"
    )


def joined(latents: Tensor, image: Tensor | None) -> Tensor:
    """The UNet's sample: latents [B, C, H, W] with :data:`IMAGE_CONDITION` behind them."""
    return latents if image is None else torch.cat([latents, image], 1)


def for_scheduler(scheduler: Any, prediction: Tensor, channels: int) -> Tensor:
    """What a scheduler takes of a prediction [B, C, H, W] for ``channels`` sampled channels: the
    mean's, but for one that uses the variance.
    """
    return prediction if uses_variance(scheduler) else prediction[:, :channels]


def uses_variance(scheduler: Any) -> bool:
    """Whether ``scheduler`` takes the variance that a UNet learned: DDPM's alone does."""
    return (
        type(scheduler).__name__ == "DDPMScheduler"
        and scheduler.config.variance_type in LEARNED_VARIANCE
    )


@dataclass(frozen=True)
class Guidance:
    """Guidance: classifier-free, in which a sampling is predicted under several conditions at once,
    or embedded, as a condition of one prediction.

    Attributes:
        weight: of what is asked for; classifier-free, 1 or less is none, as in diffusers'
            pipelines.
        image_weight: of the image that is edited (InstructPix2Pix, arXiv 2211.09800); None for
            models that edit none.
        embedded: whether the weight is the condition :data:`GUIDANCE`.

    Raises:
        InputError: an image weight below 1, which diffusers would take as none.
    """

    weight: float
    image_weight: float | None = None
    embedded: bool = False

    def __post_init__(self) -> None:
        if self.image_weight is not None and not 1 <= self.image_weight < float("inf"):
            raise InputError(f"--image-guidance: expected 1 or more, not {self.image_weight}")

    @property
    def guided(self) -> bool:
        """Whether a sampling has more than one row: as diffusers has it, with weights above 1."""
        return self.weight > 1 and not self.embedded

    def parts(
        self, conditions: dict[str, Tensor], null: dict[str, Tensor] | None
    ) -> list[dict[str, Tensor]]:
        """The conditions of each row of a sampling, each [B, ...]: the unconditional ones and those
        that are asked for; of an edited image all, those without text, and those without both.

        Args:
            null: the conditions of nothing asked for; None where there is no guidance.
        """
        if self.embedded:
            rows = len(next(iter(conditions.values())))
            return [{**conditions, GUIDANCE: torch.full((rows,), float(self.weight))}]
        if not self.guided or null is None:
            return [conditions]
        unasked = {**conditions, **null}
        if self.image_weight is None:
            return [unasked, conditions]
        no_image = torch.zeros_like(conditions[IMAGE_CONDITION])
        return [conditions, unasked, {**unasked, IMAGE_CONDITION: no_image}]

    def combine(self, parts: list[Tensor], channels: int) -> Tensor:
        """One prediction [B, ...] of those of :meth:`parts`; a variance behind the ``channels`` is
        that of what is asked for.
        """
        if len(parts) == 1:
            return parts[0]
        means = [part[:, :channels] for part in parts]
        if self.image_weight is None:
            asked = parts[1]
            mean = means[0] + self.weight * (means[1] - means[0])
        else:
            asked, (text, image, nothing) = parts[0], means
            mean = nothing + self.weight * (text - image) + self.image_weight * (image - nothing)
        return torch.cat([mean, asked[:, channels:]], 1)


def guidance_of(
    model: DiffusionModel, weight: float | None, image_weight: float | None
) -> Guidance:
    """The guidance of ``model`` with these weights, its own where they are None; raise InputError
    for an image's weight where it edits none, and for one above 1 where none guides it.
    """
    if weight is not None and weight > 1 and not (model.classifier_free or model.embeds_guidance):
        raise InputError(
            f"--guidance: {model.name} takes none, being distilled to sample without: expected 1 "
            f"or less, not {weight:g}"
        )
    if image_weight is not None and model.image_guidance is None:
        raise InputError(f"--image-guidance: expected an instruct-pix2pix model, not {model.name}")
    return Guidance(
        model.guidance if weight is None else weight,
        model.image_guidance if image_weight is None else image_weight,
        model.embeds_guidance,
    )
