from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from quest_deploy.evaluation.image_grid import save_grid

if TYPE_CHECKING:
    from pathlib import Path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_images_lie_row_by_row_between_grey_lines(tmp_path: Path) -> None:
    images = np.linspace(-1, 1, 5, dtype=np.float32).reshape(5, 1, 1, 1) * np.ones(
        (1, 1, 64, 64), np.float32
    )
    save_grid(images, tmp_path / "grid.png", columns=3)
    sheet = pixels(tmp_path / "grid.png")
    assert sheet.shape == (2 * 65 + 1, 3 * 65 + 1)
    np.testing.assert_array_equal(sheet[32, 32::65], [0, 64, 128])
    np.testing.assert_array_equal(sheet[32 + 65, 32::65], [191, 255, 128])
    np.testing.assert_array_equal(sheet[0], 128)


def test_small_images_are_magnified_without_smoothing(tmp_path: Path) -> None:
    image = np.asarray([[-1, 1], [1, -1]], np.float32).reshape(1, 1, 2, 2)
    save_grid(image, tmp_path / "grid.png", columns=1)
    sheet = pixels(tmp_path / "grid.png")
    assert set(np.unique(sheet)) == {0, 128, 255}
    assert sheet.shape == (4 * 32, 4 * 32)
    assert (sheet[32:64, 32:64] == 0).all()


def test_colour_images_keep_their_channels(tmp_path: Path) -> None:
    image = np.zeros((1, 3, 64, 64), np.float32)
    image[0, 0], image[0, 1] = 1, -1
    save_grid(image, tmp_path / "grid.png", columns=1)
    np.testing.assert_array_equal(pixels(tmp_path / "grid.png")[32, 32], [255, 0, 128])


def test_values_outside_the_range_are_clipped(tmp_path: Path) -> None:
    image = np.asarray([-3.0, 3.0], np.float32).reshape(2, 1, 1, 1) * np.ones(
        (1, 1, 64, 64), np.float32
    )
    save_grid(image, tmp_path / "grid.png", columns=2)
    np.testing.assert_array_equal(pixels(tmp_path / "grid.png")[32, 32::65], [0, 255])


def test_a_picture_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.zeros((1, 1, 64, 64), np.float32)
    save_grid(image, tmp_path / "grid.png", columns=1)
    before = (tmp_path / "grid.png").read_bytes()

    def fail(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_grid(image + 1, tmp_path / "grid.png", columns=1)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    assert (tmp_path / "grid.png").read_bytes() == before
