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
from quest_deploy.models.control_images import drawn, edges
from quest_deploy.models.image_inputs import read_image, resized
from quest_deploy.models.pipeline_classes import controlled_class
from quest_deploy.models.residuals import (
    CONTROLNET,
    INTRABLOCK,
    PARTS,
    T2I_ADAPTER,
    controlnet_residuals,
    flag,
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
    from quest_deploy.models.residuals import Residual

SHOWN = "control_image_"
"""What each is shown, counted from 0, among the conditions of a sampling."""
_CLASSES: dict[str, Any] = {CONTROLNET: ControlNetModel, T2I_ADAPTER: T2IAdapter}
_SAME = ("cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim")
"""What the configurations of a UNet and of its ControlNets say alike."""


def load_control(folder: Path, model: PipelineModel, kind: str) -> Any:
    """The ControlNet or T2I-adapter in ``folder``, in float32; raise InputError where it is
    damaged, of another kind, or made for another UNet than the one of ``model``.
    """
    _shapes(model, kind, str(folder))  # refused before its weights are read
    expected = _CLASSES[kind]
    if not (folder / CONFIGURATION).is_file():
        raise InputError(
            f"{folder}: expected the folder of a {expected.__name__} in diffusers' layout on this "
            f"machine, and it has no {CONFIGURATION}"
        )
    config = read_json(folder / CONFIGURATION, repair="get it again")
    if not isinstance(config, dict) or config.get("_class_name") != expected.__name__:
        found = config.get("_class_name") if isinstance(config, dict) else config
        raise InputError(f"{folder}: expected a {expected.__name__}, found {found}")
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
    shapes = _shapes(model, kind, where)
    if net.config.get("global_pool_conditions"):
        raise InputError(
            f"{where}: expected residuals with a height and a width, and those of a "
            f"{expected.__name__} with global_pool_conditions have none"
        )
    wrong = (_wrong_adapter if kind == T2I_ADAPTER else _wrong_controlnet)(net, model, shapes)
    if wrong:
        raise InputError(
            f"{where}: expected a {expected.__name__} that was made for {model.name}, and this one "
            f"was not: {', '.join(wrong)} {'differ' if len(wrong) > 1 else 'differs'}"
        )


def _shapes(model: PipelineModel, kind: str, where: str) -> dict[str, Residual]:
    """What a ``kind`` adds to ``model``; raise InputError where it takes none."""
    try:
        shapes = model.network.residuals(model.config, kind)
        controlled_class(model.pipeline_class(), PARTS[kind])
    except InputError as e:
        raise InputError(f"{where}: {model.name} takes none: {e}") from e
    return shapes


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
    image = torch.zeros(1, channels, height, width, dtype=net.dtype, device=net.device)
    found = [tuple(x.shape[1:]) for x in net(image)]
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
        samples: int,
    ) -> None:
        """Load them.

        Args:
            folders: by kind.
            images: what each is shown, or one for all of them; none for edges of the model's own
                pictures.
            samples: the most samplings that they are shown to.

        Raises:
            InputError: one cannot be read, does not fit the model or adds nothing, or there are
                more or fewer folders of images.
        """
        count = sum(map(len, folders.values()))
        if len(images) not in (0, 1, count):
            raise InputError(
                f"--control-images: expected one folder, or one for each of {count} ControlNets "
                f"and T2I-adapters in their order, found {len(images)}"
            )
        self._model = model
        self._nets = [
            (kind, _trained(x, model, kind), x.scale)
            for kind, each in folders.items()
            for x in each
        ]
        given = [_read(folder, model.image_size, samples) for folder in images]
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
        shapes = self._model.network.residuals(self._model.config, T2I_ADAPTER).values()
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


def _trained(given: ScaledFolder, model: PipelineModel, kind: str) -> Any:
    """What is in the folder; raise InputError where it adds nothing, as before any training."""
    net = load_control(given.check(flag(kind)), model, kind)
    ends = [net] if kind == T2I_ADAPTER else [*net.controlnet_down_blocks, net.controlnet_mid_block]
    if not any(weights.any() for end in ends for weights in end.parameters()):
        raise InputError(
            f"{flag(kind)} {given.path}: what it adds is zero everywhere; expected one that was "
            "trained"
        )
    return net


def _read(folder: ImageFolder, size: tuple[int, int], count: int) -> list[Image.Image]:
    return [resized(read_image(path), size) for path in folder.files("--control-images")[:count]]


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, np.float32).transpose(2, 0, 1) / 255)
