"""ControlNets and T2I-adapters in torch, as diffusers has them: which fit a model, and what they
add to its UNet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image
from torch import Tensor

from quest_deploy.artifacts.scaled_folder import CONFIGURATION
from quest_deploy.errors import InputError
from quest_deploy.files import read_json
from quest_deploy.models.channels import EDITING
from quest_deploy.models.control_images import drawn, edges
from quest_deploy.models.image_inputs import read_image, resized
from quest_deploy.models.residuals import (
    CONTROLNET,
    INTRABLOCK,
    T2I_ADAPTER,
    controlnet_residuals,
    unet_residuals,
    unpacked,
)
from quest_deploy.models.unets import ADDED_CONDITIONS
from quest_deploy.models.weights import load_part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from quest_deploy.artifacts.image_folder import ImageFolder
    from quest_deploy.artifacts.scaled_folder import ScaledFolder
    from quest_deploy.models.pipeline_model import PipelineModel

SHOWN = "control_image_"
"""What each is shown, counted from 0, among the conditions of a sampling."""
_CLASSES = {CONTROLNET: ControlNetModel, T2I_ADAPTER: T2IAdapter}
_SAME = ("cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim")
"""What the configurations of a UNet and of its ControlNets say alike."""


def load_control(folder: Path, model: PipelineModel, kind: str) -> Any:
    """The ControlNet or T2I-adapter in ``folder``, in float32; raise InputError where it is
    damaged, of another kind, or made for another UNet than the one of ``model``.
    """
    expected = _CLASSES[kind]
    config = read_json(folder / CONFIGURATION, repair="get it again")
    if not isinstance(config, dict) or config.get("_class_name") != expected.__name__:
        found = config.get("_class_name") if isinstance(config, dict) else config
        raise InputError(f"{folder}: expected a {expected.__name__}, found {found}")
    _check_model(model, kind, str(folder))
    net = load_part(folder, expected, whole=True)
    check_fits(net, model, kind, str(folder))
    return net


def check_fits(net: Any, model: PipelineModel, kind: str, where: str) -> None:
    """Raise InputError where ``model`` takes no ``kind``, or ``net`` is none, or was made for
    another UNet.
    """
    if not isinstance(net, expected := _CLASSES[kind]):
        raise InputError(
            f"{where}: expected a folder or a {expected.__name__}, found {type(net).__name__}"
        )
    _check_model(model, kind, where)
    shapes = unet_residuals(model.config, kind)
    wrong = (_wrong_adapter if kind == T2I_ADAPTER else _wrong_controlnet)(net, model, shapes)
    if wrong:
        raise InputError(
            f"{where}: expected a {expected.__name__} that was made for {model.name}, and this one "
            f"was not: {', '.join(wrong)} {'differ' if len(wrong) > 1 else 'differs'}"
        )


def _check_model(model: PipelineModel, kind: str, where: str) -> None:
    if model.asked_for != "prompt" or model.channels.image_kind == EDITING:
        raise InputError(
            f"{where}: expected a text-to-image or inpainting model, not {model.name}, for whose "
            f"kind diffusers has no pipeline with a {_CLASSES[kind].__name__}"
        )


def _wrong_controlnet(net: Any, model: PipelineModel, shapes: Mapping[str, Any]) -> list[str]:
    """What differs in a ControlNet for another UNet."""
    config, pixels = net.config, model.image_size[0] // model.sample_shape[1]
    halvings = len(config["conditioning_embedding_out_channels"] or ()) - 1
    compared = {
        "in_channels": (config["in_channels"], model.channels.sampled),
        "the shapes that it adds": (controlnet_residuals(config), shapes),
        "pixels of its image to a latent": (2**halvings, pixels),
        "conditioning_channels": (config["conditioning_channels"], 3),
        **{name: (config.get(name), model.config.get(name)) for name in _SAME},
    }
    return [name for name, (found, expected) in compared.items() if found != expected]


@torch.no_grad()
def _wrong_adapter(net: Any, model: PipelineModel, shapes: Mapping[str, Any]) -> list[str]:
    """The same of a T2I-adapter, which may add fewer tensors."""
    height, width = model.image_size
    channels = net.config["in_channels"]
    if height % net.total_downscale_factor or width % net.total_downscale_factor:
        return ["downscale_factor"]
    found = [tuple(x.shape[1:]) for x in net(torch.zeros(1, channels, height, width))]
    expected = [x.shape(*model.sample_shape[1:]) for x in shapes.values()]
    fits = found == expected[: len(found)] and channels in (1, 3)
    return [] if fits else ["the shapes that it adds"]


class Controls:
    """The ControlNets and T2I-adapters that a model is calibrated with, each with its scale, and
    their images.
    """

    def __init__(
        self,
        folders: Mapping[str, Sequence[ScaledFolder]],
        images: Sequence[ImageFolder],
        model: PipelineModel,
    ) -> None:
        """Load them.

        Args:
            folders: by kind.
            images: what each is shown, or one for all of them; none for edges of the model's own
                pictures.

        Raises:
            InputError: one cannot be read or does not fit the model, or there are more or fewer
                folders of images.
        """
        count = sum(map(len, folders.values()))
        if len(images) not in (0, 1, count):
            raise InputError(
                f"--control-images: expected one folder, or one for each of {count} ControlNets "
                f"and T2I-adapters in their order, found {len(images)}"
            )
        self._model = model
        self._nets = [
            (kind, load_control(x.check(), model, kind), x.scale)
            for kind, each in folders.items()
            for x in each
        ]
        given = [_read(folder, model.image_size) for folder in images]
        self._images = given * count if len(given) == 1 else given

    def images(self, latents: NDArray[np.float32]) -> dict[str, Tensor]:
        """What each is shown in samplings, float32 [B, 3, height, width] in [0, 1], by name: the
        user's images in turn, or edges of the pictures of ``latents`` [B, ...].
        """
        count = len(latents)
        own = [] if self._images else [edges(x) for x in drawn(self._model, latents)]
        given = self._images or [own] * len(self._nets)
        return {
            f"{SHOWN}{i}": torch.stack([_tensor(shown[row % len(shown)]) for row in range(count)])
            for i, shown in enumerate(given)
        }

    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> dict[str, Tensor]:
        """The sum of what they add at ``timestep`` to the UNet for ``sample`` [B, ...], by the name
        of its input; ``conditions`` are the UNet's and those of :meth:`images`.
        """
        total: dict[str, Tensor] = {}
        for i, (kind, net, scale) in enumerate(self._nets):
            image = conditions[f"{SHOWN}{i}"]
            if kind == T2I_ADAPTER:
                found = self._of_adapter(net, image, scale)
            else:
                found = _of_controlnet(net, sample, timestep, image, scale, conditions)
            total |= {name: total[name] + x if name in total else x for name, x in found.items()}
        return total

    def _of_adapter(self, net: Any, image: Tensor, scale: float) -> dict[str, Tensor]:
        if net.config["in_channels"] == 1:
            image = image.mean(1, keepdim=True)
        features = [scale * x for x in net(image)]
        shapes = unet_residuals(self._model.config, T2I_ADAPTER).values()
        for x in list(shapes)[len(features) :]:  # what it does not add to
            features.append(image.new_zeros(len(image), *x.shape(*self._model.sample_shape[1:])))
        return {f"{INTRABLOCK}{i}": x for i, x in enumerate(features)}


def _of_controlnet(
    net: Any,
    sample: Tensor,
    timestep: Tensor,
    image: Tensor,
    scale: float,
    conditions: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    added = {name: conditions[name] for name in ADDED_CONDITIONS if name in conditions}
    down, mid = net(
        sample,
        timestep,
        conditions["encoder_hidden_states"],
        controlnet_cond=image,
        conditioning_scale=scale,
        added_cond_kwargs=added or None,
        return_dict=False,
    )
    return unpacked({"down_block_additional_residuals": down, "mid_block_additional_residual": mid})


def _read(folder: ImageFolder, size: tuple[int, int]) -> list[Image.Image]:
    return [resized(read_image(path), size) for path in folder.files()]


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, np.float32).transpose(2, 0, 1) / 255)
