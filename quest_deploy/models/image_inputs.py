"""The images that an inpainting or instruct-pix2pix model starts from: the user's, or made ones."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from quest_deploy.artifacts.image_folder import MOST_BYTES
from quest_deploy.errors import InputError
from quest_deploy.files import read_bounded

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.artifacts.image_folder import ImageFolder

MASK = "-mask"
"""The mask of ``cat.jpg`` is ``cat-mask.png``, of any of the suffixes."""
MOST_PIXELS = 2**26
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class ImageInput:
    """An RGB image, and where it is inpainted a mask: white is drawn anew, black is kept."""

    image: Image.Image
    mask: Image.Image | None = None


def read_image(path: Path) -> Image.Image:
    """The image of a file, in RGB; raise InputError where it is none, or too large."""
    repair = f"expected an image of {', '.join(_FORMATS)}"
    try:
        content = read_bounded(path, MOST_BYTES, repair)
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise InputError(
                    f"{path}: expected up to {MOST_PIXELS} pixels, found "
                    f"{image.width}x{image.height}"
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise InputError(f"{path}: {repair} ({e})") from e


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """``image`` with this height and width, as diffusers' pipelines resize it."""
    return image.resize(size[::-1], Image.Resampling.LANCZOS)


def read_images(folder: ImageFolder, size: tuple[int, int], *, masked: bool) -> list[ImageInput]:
    """The images of a folder in the order of their names.

    Args:
        size: height and width that they get.
        masked: whether each has a mask beside it.

    Raises:
        InputError: one cannot be read, or a mask is missing or superfluous.
    """
    files = folder.files()
    masks = {p.stem.removesuffix(MASK): p for p in files if p.stem.endswith(MASK)}
    images = {p.stem: p for p in files if not p.stem.endswith(MASK)}
    where = f"--image-folder {folder.path}"
    if not images or len(images) + len(masks) < len(files):
        raise InputError(f"{where}: expected images, one of each name")
    expected = images.keys() if masked else set()
    if wrong := sorted(expected ^ masks.keys()):
        raise InputError(
            f"{where}: expected {'a mask NAME-mask.png' if masked else 'no masks'} "
            f"beside each image NAME.png, and that does not hold for {', '.join(wrong[:10])}"
        )
    return [
        ImageInput(
            resized(read_image(path), size),
            resized(read_image(masks[name]), size).convert("L") if masked else None,
        )
        for name, path in images.items()
    ]


def made_image(number: int, height: int, width: int) -> ImageInput:
    """An image without a source: noise whose power falls as natural images' does, with the square
    of the frequency, and a mask of one box or ellipse over a tenth to a half of it; both depend on
    ``number`` alone.
    """
    rng = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # the mean is drawn apart
    waves = np.fft.irfft2(
        np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency, (height, width)
    )
    shades = waves / (waves.std((1, 2), keepdims=True) + 1e-9)
    # Colours of one place go together, as in photographs.
    mixed = 0.8 * shades[:1] + 0.6 * shades
    levels = 255 * (rng.uniform(0.35, 0.65, (3, 1, 1)) + 0.22 * mixed)
    image = Image.fromarray(levels.clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0))
    return ImageInput(image, _made_mask(rng, height, width))


def _made_mask(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    area, stretch = rng.uniform(0.1, 0.5), np.exp(rng.uniform(-0.4, 0.4))
    high, wide = (min(0.95, (area * x) ** 0.5) for x in (stretch, 1 / stretch))
    y, x = (rng.uniform(side / 2, 1 - side / 2) for side in (high, wide))
    rows = (np.arange(height) + 0.5)[:, None] / height - y
    columns = (np.arange(width) + 0.5) / width - x
    box = (abs(rows) <= high / 2) & (abs(columns) <= wide / 2)
    ellipse = (2 * rows / high) ** 2 + (2 * columns / wide) ** 2 <= 1
    return Image.fromarray(((box if rng.random() < 0.5 else ellipse) * 255).astype(np.uint8))


def random_condition(number: int, latent_shape: tuple[int, ...], *, masked: bool) -> Tensor:
    """What stands for an image's latents, float32 [C, H, W], where there is no encoder: normal
    noise, behind a made mask where there is one.
    """
    latents = torch.randn(latent_shape, generator=torch.Generator().manual_seed(number))
    if not masked:
        return latents
    mask = np.asarray(made_image(number, *latent_shape[1:]).mask, np.float32) / 255
    return torch.cat([torch.from_numpy(mask)[None], latents])
