"""ControlNets in torch, as diffusers has them: which fit a model, and what they add to its UNet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor

from quest_deploy.artifacts.controlnet import CONFIGURATION
from quest_deploy.errors import InputError
from quest_deploy.files import read_json
from quest_deploy.models.channels import EDITING
from quest_deploy.models.control_images import edges
from quest_deploy.models.image_inputs import read_image, resized
from quest_deploy.models.residuals import controlnet_residuals, unet_residuals, unpacked
from quest_deploy.models.unets import ADDED_CONDITIONS
from quest_deploy.models.weights import load_part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from quest_deploy.artifacts.controlnet import ControlNetFolder
    from quest_deploy.artifacts.image_folder import ImageFolder
    from quest_deploy.models.pipeline_model import PipelineModel

SHOWN = "controlnet_image_"
"""What a ControlNet is shown, counted from 0, among the conditions of a sampling."""
_REPAIR = "get the ControlNet again"
_SAME = ("cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim")
"""What the configurations of a UNet and of its ControlNets say alike."""


def check_model(model: PipelineModel) -> None:
    """Raise InputError where ``model`` takes no ControlNet."""
    if model.asked_for != "prompt" or model.channels.image_kind == EDITING:
        raise InputError(
            f"--controlnet: expected a text-to-image or inpainting model, not {model.name}, for "
            "whose kind diffusers has no pipeline with a ControlNet"
        )
    unet_residuals(model.config)


def load_controlnet(folder: Path, model: PipelineModel) -> ControlNetModel:
    """The ControlNet in ``folder``, in float32; raise InputError where it is damaged, of another
    kind, or made for another UNet than the one of ``model``.
    """
    config = read_json(folder / CONFIGURATION, repair=_REPAIR)
    if not isinstance(config, dict) or config.get("_class_name") != ControlNetModel.__name__:
        found = config.get("_class_name") if isinstance(config, dict) else config
        raise InputError(f"{folder}: expected a {ControlNetModel.__name__}, found {found}")
    net: ControlNetModel = load_part(folder, ControlNetModel, whole=True)
    check_fits(net.config, model, str(folder))
    return net


def check_fits(config: Mapping[str, Any], model: PipelineModel, where: str) -> None:
    """Raise InputError where a ControlNet of ``config`` was made for another UNet than the one of
    ``model``.
    """
    pixels = model.image_size[0] // model.sample_shape[1]
    halvings = len(config["conditioning_embedding_out_channels"] or ()) - 1
    expected = {
        "in_channels": model.channels.sampled,
        "the shapes that it adds": list(unet_residuals(model.config).values()),
        "pixels of its image to a latent": pixels,
        "conditioning_channels": 3,
        **{name: model.config.get(name) for name in _SAME},
    }
    found = {
        "in_channels": config["in_channels"],
        "the shapes that it adds": list(controlnet_residuals(config).values()),
        "pixels of its image to a latent": 2**halvings,
        "conditioning_channels": config["conditioning_channels"],
        **{name: config.get(name) for name in _SAME},
    }
    if wrong := [name for name, value in found.items() if value != expected[name]]:
        raise InputError(
            f"{where}: expected a ControlNet that was made for {model.name}, and this one was "
            f"not: {', '.join(wrong)} {'differ' if len(wrong) > 1 else 'differs'}"
        )


class ControlNets:
    """The ControlNets that a model is calibrated with, each with its scale, and their images."""

    def __init__(
        self,
        folders: Sequence[ControlNetFolder],
        images: Sequence[ImageFolder],
        model: PipelineModel,
    ) -> None:
        """Load them.

        Args:
            images: what each is shown, or one for all of them; none for edges of the model's own
                pictures.

        Raises:
            InputError: one cannot be read or does not fit the model, or there are more or fewer
                folders of images.
        """
        if len(images) not in (0, 1, len(folders)):
            raise InputError(
                f"--control-images: expected one folder, or one for each of {len(folders)} "
                f"ControlNets in their order, found {len(images)}"
            )
        check_model(model)
        self._model = model
        self._nets = [(load_controlnet(x.check(), model), x.scale) for x in folders]
        given = [_read(folder, model.image_size) for folder in images]
        self._images = given * len(folders) if len(given) == 1 else given

    def images(self, latents: NDArray[np.float32]) -> dict[str, Tensor]:
        """What each is shown in samplings, float32 [B, 3, height, width] in [0, 1], by name: the
        user's images in turn, or edges of the pictures of ``latents`` [B, ...].
        """
        count = len(latents)
        given = self._images or [self._edges(latents)] * len(self._nets)
        return {
            f"{SHOWN}{i}": torch.stack([_tensor(shown[row % len(shown)]) for row in range(count)])
            for i, shown in enumerate(given)
        }

    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> dict[str, Tensor]:
        """The sum of what they add at ``timestep`` to the UNet for ``sample`` [B, ...], by the name
        of its input; ``conditions`` are the UNet's and those of :meth:`images`.
        """
        added = {name: conditions[name] for name in ADDED_CONDITIONS if name in conditions}
        total: dict[str, Tensor] = {}
        for i, (net, scale) in enumerate(self._nets):
            down, mid = net(
                sample,
                timestep,
                conditions["encoder_hidden_states"],
                controlnet_cond=conditions[f"{SHOWN}{i}"],
                conditioning_scale=scale,
                added_cond_kwargs=added or None,
                return_dict=False,
            )
            found = unpacked(
                {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            )
            total = {name: total[name] + x if name in total else x for name, x in found.items()}
        return total

    def _edges(self, latents: NDArray[np.float32]) -> list[Image.Image]:
        if self._model.source.random_weights:  # which draw nothing
            return [edges(self._model.image_input(i).image) for i in range(len(latents))]
        levels = (127.5 * (self._model.images(latents) + 1)).round().astype(np.uint8)
        return [edges(Image.fromarray(x.transpose(1, 2, 0))) for x in levels]


def _read(folder: ImageFolder, size: tuple[int, int]) -> list[Image.Image]:
    return [resized(read_image(path), size) for path in folder.files()]


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, np.float32).transpose(2, 0, 1) / 255)
