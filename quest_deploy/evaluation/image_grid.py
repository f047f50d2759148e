"""PNG grids of generated images, and models' images side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from quest_deploy.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

MAGNIFY_TO = 64
SHOWN, MOST_LINES = 128, 4
"""The pixels up to which an image's longer side is magnified in a comparison, and the most lines of
a caption.
"""


def save_grid(images: NDArray[np.float32], path: Path, columns: int) -> None:
    """Save images [N, C, H, W] in [-1, 1] as a PNG grid, row by row; small images are magnified
    without smoothing. Where C is neither 1 nor 3, an image's channels lie side by side in grey.
    """
    images = _visible(images)
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    factor = max(1, MAGNIFY_TO // height)
    sheet = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 128, np.uint8)
    for i, picture in enumerate(_pixels(images)):
        top, left = 1 + i // columns * (height + 1), 1 + i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = picture
    image = Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)
    size = (sheet.shape[1] * factor, sheet.shape[0] * factor)
    save_image(image.resize(size, Image.Resampling.NEAREST), path)


def save_images(images: NDArray[np.float32], paths: Sequence[Path]) -> None:
    """Save images [N, C, H, W] in [-1, 1] (C is 1 or 3) as a PNG each, pixel for pixel."""
    for image, path in zip(_pixels(images), paths, strict=True):
        save_image(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), path)


def save_comparison(
    drawn: Mapping[str, NDArray[np.float32]], captions: Sequence[str], path: Path
) -> None:
    """Save a PNG with a row for each model of ``drawn`` and a column for each image.

    Args:
        drawn: each model's images by its name, [N, C, H, W] in [-1, 1]; channels as in
            :func:`save_grid`.
        captions: of the columns, N.
    """
    import matplotlib  # takes a while

    drawn = {name: _visible(images) for name, images in drawn.items()}
    height, width = next(iter(drawn.values())).shape[2:]
    factor = max(1, SHOWN // max(height, width))
    side, gap = (factor * width, factor * height), 4
    # Pillow's own font lacks accents and quotation marks.
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 11)
    left = gap + max(int(font.getlength(name)) for name in drawn) + gap
    lines = [_wrapped(caption, font, side[0]) for caption in captions]
    top = gap + 15 * max((len(each) for each in lines), default=0)
    sheet = Image.new(
        "RGB", (left + len(captions) * (side[0] + gap), top + len(drawn) * (side[1] + gap)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for column, words in enumerate(lines):
        pen.multiline_text(
            (left + column * (side[0] + gap), gap), "\n".join(words), "black", font, spacing=2
        )
    for row, (name, images) in enumerate(drawn.items()):
        y = top + row * (side[1] + gap)
        pen.text((gap, y + side[1] // 2), name, "black", font, anchor="lm")
        for column, image in enumerate(_pixels(images)):
            picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
            place = (left + column * (side[0] + gap), y)
            sheet.paste(picture.resize(side, Image.Resampling.NEAREST), place)
    save_image(sheet, path)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines of at most ``width`` pixels; a longer word is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    for i in range(len(lines)):
        while font.getlength(lines[i]) > width and len(lines[i]) > 1:
            lines[i] = lines[i][:-1]
    return lines[:MOST_LINES]


def _visible(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Images [N, C, H, W] as grey or RGB ones: those of other channels as [N, 1, H, C x W]."""
    count, channels, height, width = images.shape
    if channels in (1, 3):
        return images
    return images.transpose(0, 2, 1, 3).reshape(count, 1, height, channels * width)


def _pixels(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8 [N, H, W, C] of images [N, C, H, W] in [-1, 1]."""
    scaled = np.round((images.transpose(0, 2, 3, 1) + 1) * 127.5)
    return scaled.clip(0, 255).astype(np.uint8)


def save_image(image: Image.Image, path: Path) -> None:
    """Save a PNG; where that fails, what is at ``path`` stays as it is."""
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        image.save(stream, format="PNG")
