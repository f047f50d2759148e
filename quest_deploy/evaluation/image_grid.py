"""PNG grids of generated images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from quest_deploy.files import atomic_file

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MAGNIFY_TO = 64


def save_grid(images: NDArray[np.float32], path: Path, columns: int) -> None:
    """Save images [N, C, H, W] in [-1, 1] (C is 1 or 3) as a PNG grid, row by row; small images are
    magnified without smoothing.
    """
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    factor = max(1, MAGNIFY_TO // height)
    sheet = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 128, np.uint8)
    pixels = np.round((images.transpose(0, 2, 3, 1) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    for i, picture in enumerate(pixels):
        top, left = 1 + i // columns * (height + 1), 1 + i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = picture
    image = Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        image.resize(
            (sheet.shape[1] * factor, sheet.shape[0] * factor), Image.Resampling.NEAREST
        ).save(stream, format="PNG")
