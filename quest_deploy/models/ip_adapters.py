"""IP-Adapters (arXiv 2308.06721): an image as a condition of the UNet's cross-attention.

Its keys and values are layers of the UNet and quantized with it. What makes tokens of an image
stays in torch, outside the graph: CLIP's image encoder and the adapter's projection.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from quest_deploy.artifacts.model_source import IMAGE_ENCODER
from quest_deploy.artifacts.tensors import open_tensors
from quest_deploy.errors import InputError
from quest_deploy.models.attention import add_image_attentions
from quest_deploy.models.channels import EDITING
from quest_deploy.models.control_images import drawn
from quest_deploy.models.image_inputs import read_image
from quest_deploy.models.residuals import IMAGE_SCALE, IMAGE_TOKENS
from quest_deploy.models.weights import check_weights, listed, load_part

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

    from quest_deploy.artifacts.image_folder import ImageFolder
    from quest_deploy.artifacts.model_source import IPAdapter
    from quest_deploy.models.pipeline_model import PipelineModel

_PROJECTION, _LAYERS = "image_proj.", "ip_adapter."
"""The two parts of a file."""
_KINDS = {
    "proj.weight": ("norm.weight", "proj.weight", "projection_dim"),
    "latents": ("norm_out.weight", "proj_in.weight", "hidden_size"),
    "proj.3.weight": ("proj.3.weight", "proj.0.weight", "hidden_size"),
}
"""By a weight that plain, Plus and Full adapters alone have: the norm behind their projection, the
layer that reads what the image encoder gives, and what its configuration calls that width.
"""
_CONFIGURATION = "config.json"
IMAGE_PARTS = (IMAGE_ENCODER, "feature_extractor")
"""The parts of diffusers' pipelines that encode images."""


def check_model(adapter: IPAdapter, model: PipelineModel) -> None:
    """Raise InputError where ``model`` takes no IP-Adapter, its text states are not as wide as the
    tokens of ``adapter``, or there is no image encoder as wide as what that reads.
    """
    # Here, since it speaks of packages that are missing, to users of no adapter too.
    from diffusers.loaders.ip_adapter import IPAdapterMixin

    name = model.index["_class_name"]
    kind = getattr(diffusers, name, object)
    prompted = model.asked_for == "prompt" and model.channels.image_kind != EDITING
    if not prompted or not issubclass(kind, IPAdapterMixin):
        raise InputError(
            f"--ip-adapter: expected a text-to-image or inpainting model whose pipeline takes one, "
            f"not {model.name}, a {name}"
        )
    (found, read, name), expected = _widths(adapter), model.config["cross_attention_dim"]
    if found != expected:
        raise InputError(
            f"the IP-Adapter {adapter.path}: expected one for {model.name}, whose text states have "
            f"{expected} channels; its tokens have {found}"
        )
    folder = _encoder_folder(adapter, model)
    try:
        encodes = getattr(CLIPVisionConfig.from_pretrained(folder, local_files_only=True), name)
    except Exception as e:  # transformers raises whatever a configuration provokes
        reason = " ".join(str(e).split())
        raise InputError(f"{folder}: not the folder of an image encoder ({reason})") from e
    if encodes != read:
        raise InputError(
            f"{folder}: expected an image encoder with a {name} of {read}, which the IP-Adapter "
            f"{adapter.path} reads, found {encodes}; give another with --image-encoder"
        )


def _encoder_folder(adapter: IPAdapter, model: PipelineModel) -> Path:
    folder = Path(adapter.image_encoder or model.folder / IMAGE_ENCODER)
    if not (folder / _CONFIGURATION).is_file():
        raise InputError(
            f"the IP-Adapter {adapter.path}: expected its image encoder in {folder}, which has no "
            f"{_CONFIGURATION}; give the folder with --image-encoder, in a new workspace"
        )
    return folder


def _widths(adapter: IPAdapter) -> tuple[int, int, str]:
    """The channels of its tokens and of what it reads, from the file's header, and what the image
    encoder's configuration calls the latter; raise InputError where it is of a kind that is not
    known.
    """
    where, path = f"the IP-Adapter {adapter.path}", Path(adapter.path)
    try:
        with open_tensors(path, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise InputError(f"{where}: not a readable safetensors file ({e}); get it again") from e
    known = (_PROJECTION, _LAYERS)
    if strange := [key for key in shapes if not key.startswith(known)]:
        raise InputError(
            f"{where}: expected tensors called {'* and '.join(known)}*, found {listed(strange)}"
        )
    if any("_lora." in key for key in shapes) or any(
        key.startswith(f"{_PROJECTION}perceiver_resampler.") for key in shapes
    ):
        raise InputError(
            f"{where}: a FaceID adapter reads a face recognizer's embeddings and brings a LoRA, "
            "which is not supported; expected one that reads CLIP's"
        )
    for kind, (norm, reads, name) in _KINDS.items():
        if all(shapes.get(f"{_PROJECTION}{x}") for x in (kind, norm, reads)):
            return shapes[f"{_PROJECTION}{norm}"][-1], shapes[f"{_PROJECTION}{reads}"][-1], name
    raise InputError(
        f"{where}: expected the image projection of a plain, a Plus or a Full adapter, found "
        f"{listed(key for key in shapes if key.startswith(_PROJECTION)) or 'none'}"
    )


def _read(adapter: IPAdapter, prefix: str) -> dict[str, Tensor]:
    """The tensors of one of its parts, in float32."""
    with open_tensors(Path(adapter.path), "pt") as file:
        names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 - not a dict
        return {key.removeprefix(prefix): file.get_tensor(key).float() for key in names}


def load_projection(adapter: IPAdapter) -> Any:
    """What makes tokens of CLIP's embeddings, as diffusers has it, in float32; raise InputError
    where its weights do not fit together.
    """
    convert: Any = UNet2DConditionLoadersMixin._convert_ip_adapter_image_proj_to_diffusers
    try:
        made = convert(None, _read(adapter, _PROJECTION), low_cpu_mem_usage=False)
    except (KeyError, RuntimeError, IndexError) as e:
        reason = " ".join(str(e).split())
        raise InputError(
            f"the IP-Adapter {adapter.path}: its image projection cannot be loaded "
            f"({type(e).__name__}: {reason})"
        ) from e
    check_weights(made, f"the IP-Adapter {adapter.path}")
    return made.eval().requires_grad_(requires_grad=False)


def add_ip_adapter(unet: nn.Module, adapter: IPAdapter) -> None:
    """Give ``unet`` the keys and values of ``adapter``; raise InputError where they do not fit."""
    found, made = _read(adapter, _LAYERS), add_image_attentions(unet)
    expected = {
        # diffusers counts self-attentions too.
        f"{2 * i + 1}.to_{x}_ip.weight": module.get_parameter(f"to_{x}.weight")
        for i, module in enumerate(made.values())
        for x in "kv"
    }
    wrong = [key for key, x in expected.items() if key not in found or found[key].shape != x.shape]
    if wrong or (wrong := sorted(found.keys() - expected.keys())):
        shapes = (
            f"{key} {list(found[key].shape) if key in found else '(missing)'}" for key in wrong
        )
        raise InputError(
            f"the IP-Adapter {adapter.path}: expected one that was made for this UNet; what does "
            f"not fit: {listed(shapes)}"
        )
    with torch.no_grad():
        for key, weight in expected.items():
            weight.copy_(found[key])
    for name, module in made.items():
        check_weights(module, f"the IP-Adapter {adapter.path}, {name}")


def load_image_parts(model: PipelineModel) -> dict[str, Any]:
    """The ``IMAGE_PARTS`` of a model's IP-Adapter; raise InputError where they cannot be read."""
    adapter = model.source.ip_adapter
    assert adapter is not None
    encoder = load_part(_encoder_folder(adapter, model), CLIPVisionModelWithProjection)
    size = encoder.config.image_size
    # Pillow's, as packages have it, also where torchvision is there.
    extractor = CLIPImageProcessorPil(size=size, crop_size=size)
    own = model.folder / IMAGE_PARTS[1]
    if (own / "preprocessor_config.json").is_file():
        found = CLIPImageProcessorPil.from_pretrained(own)
        crop = found.crop_size or {}
        if (crop.get("height"), crop.get("width")) == (size, size):  # else another encoder's
            extractor = found
    return dict(zip(IMAGE_PARTS, (encoder, extractor), strict=True))


class ImagePrompts:
    """The images that a model with an IP-Adapter is shown, and calibrated with; see
    :class:`quest_deploy.calibration.trajectories.ImagePrompt`. The image encoder, which is large,
    is in memory while it runs and no longer.

    Attributes:
        projection: what makes tokens of CLIP's embeddings.
    """

    def __init__(
        self, model: PipelineModel, images: ImageFolder | None = None, samples: int | None = None
    ) -> None:
        """Load what makes tokens of images, and encode those that are given.

        Args:
            images: what the model is shown, in turn; the model's own pictures where it is None.
            samples: the most samplings that they are shown to; all are encoded where it is None.

        Raises:
            InputError: the image encoder or an image cannot be read.
        """
        adapter = model.source.ip_adapter
        assert adapter is not None
        self._model, self._scale = model, adapter.scale
        self.projection = load_projection(adapter)
        encoder, self._extractor = load_image_parts(model).values()
        self._null = self._no_image(encoder)
        paths = [] if images is None else images.files("--ip-adapter-images")[:samples]
        self._given = self._tokens(encoder, map(read_image, paths)) if paths else None

    def nothing(self, count: int) -> dict[str, Tensor]:
        """Zeros."""
        return {name: torch.zeros_like(value) for name, value in self.null(count).items()}

    def asked(self, latents: NDArray[np.float32]) -> dict[str, Tensor]:
        """The tokens of an image a row, and the scale."""
        tokens = self._given
        if tokens is None:
            tokens = self._tokens(self.encoder, drawn(self._model, latents))
        return self._conditions(tokens[torch.arange(len(latents)) % len(tokens)])

    def null(self, count: int) -> dict[str, Tensor]:
        """The tokens of no image, as diffusers' pipelines give them, and the scale."""
        return self._conditions(self._null.expand(count, -1, -1))

    @property
    def encoder(self) -> Any:
        """CLIP's, read anew."""
        return load_image_parts(self._model)[IMAGE_ENCODER]

    @property
    def crop(self) -> tuple[int, int]:
        """Height and width of what the image encoder reads."""
        size = self._extractor.crop_size
        return size["height"], size["width"]

    @property
    def settings(self) -> dict[str, Any]:
        """How an image becomes what the image encoder reads, for who does it without transformers;
        raise InputError where it is not CLIP's way.
        """
        found = self._extractor.to_dict()
        size = found.get("size") or {}
        usual = {
            **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
            "resample": Image.Resampling.BICUBIC,
            "rescale_factor": 1 / 255,
        }
        wrong = [f"{k} {found.get(k)}" for k, value in usual.items() if found.get(k) != value]
        if wrong or list(size) != ["shortest_edge"]:
            raise InputError(
                f"the feature extractor of {self._model.name}: expected CLIP's, which resizes the "
                "shortest edge, crops and normalizes; found "
                f"{', '.join(wrong) or f'size {size}'}; use quest_deploy.load_pipeline"
            )
        names = {"mean": "image_mean", "deviation": "image_std"}
        return {
            "size": size["shortest_edge"],
            "crop": list(self.crop),
            "scale": self._scale,
            **{name: list(found[key]) for name, key in names.items()},
        }

    def _conditions(self, tokens: Tensor) -> dict[str, Tensor]:
        return {IMAGE_TOKENS: tokens, IMAGE_SCALE: torch.full((len(tokens),), self._scale)}

    @torch.no_grad()
    def _no_image(self, encoder: Any) -> Tensor:
        """The tokens [1, tokens, C] of zeros, in place of CLIP's embedding or of what it reads."""
        embeds = self._embeds(encoder, torch.zeros(1, 3, *self.crop))
        plain = isinstance(self.projection, ImageProjection)
        tokens: Tensor = self.projection(torch.zeros_like(embeds) if plain else embeds)
        return tokens

    @torch.no_grad()
    def _tokens(self, encoder: Any, images: Iterable[Image.Image]) -> Tensor:
        """The tokens [B, tokens, C] of images, one read and encoded after the other."""
        pixels = (self._extractor(x, return_tensors="pt").pixel_values for x in images)
        return torch.cat([self.projection(self._embeds(encoder, x)) for x in pixels])

    def _embeds(self, encoder: Any, pixels: Tensor) -> Any:
        """What the projection reads of images [B, 3, H, W]."""
        if isinstance(self.projection, ImageProjection):
            return encoder(pixels).image_embeds
        return encoder(pixels, output_hidden_states=True).hidden_states[-2]
