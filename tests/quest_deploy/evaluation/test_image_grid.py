from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quest_deploy.evaluation.image_grid import save_comparison, save_grid


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


NAMES = ("FP32", "PTQ, W4A4", "onnxruntime")


def comparison(path: Path, captions: list[str], height: int = 32, width: int = 64) -> np.ndarray:
    """A sheet of three models' images, the m-th model's n-th image of the levels m and n."""
    levels = np.linspace(-1, 0.5, len(captions), dtype=np.float32).reshape(-1, 1, 1, 1)
    plain = np.ones((len(captions), 3, height, width), np.float32)
    drawn = {}
    for row, name in enumerate(NAMES):
        drawn[name] = levels * plain
        drawn[name][:, 2] = row / 4
    save_comparison(drawn, captions, path)
    return pixels(path)


def test_models_are_compared_in_a_row_each_and_images_in_a_column_each(tmp_path: Path) -> None:
    sheet = comparison(tmp_path / "compare.png", ["a", "b", "c", "d"])
    height, width = sheet.shape[:2]
    # The images of 32 by 64 are shown twice as large, with four pixels between them.
    left, top = width - 4 * (128 + 4), height - 3 * (64 + 4)
    for row in range(3):
        for column, red in enumerate((0, 64, 128, 191)):
            y, x = top + row * 68, left + column * 132
            image = sheet[y : y + 64, x : x + 128].reshape(-1, 3)
            assert len(np.unique(image, axis=0)) == 1
            assert image[0].tolist() == [red, red, (128, 159, 191)[row]]
            assert (sheet[y - 1, x : x + 128] == 255).all() or row == 0
            assert (sheet[y : y + 64, x + 128 : x + 132] == 255).all()
        assert (sheet[top + row * 68 : top + row * 68 + 64, :left] < 128).any()  # its name
    assert (sheet[:top, left:] < 128).any()


@pytest.mark.parametrize(
    "caption",
    ["a very long prompt of many words " * 9, "w" * 400, "two " + "words" * 99],
    ids=["words", "a word", "both"],
)
def test_a_long_caption_is_wrapped_and_cut_within_its_column(tmp_path: Path, caption: str) -> None:
    whole = comparison(tmp_path / "a.png", ["", caption, ""], height=64)
    short = comparison(tmp_path / "b.png", ["", "one", ""], height=64)
    top = whole.shape[0] - 3 * (128 + 4)
    assert whole.shape[1] == short.shape[1]
    assert 15 < top <= 4 + 15 * 4
    start = whole.shape[1] - 2 * (128 + 4)
    dark = np.argwhere((whole[:top] < 128).all(axis=2))
    assert dark[:, 0].max() < top - 1
    assert start <= dark[:, 1].min() < start + 8
    assert start + 90 < dark[:, 1].max() < start + 128


def test_grey_images_of_one_channel_and_large_ones_are_compared_too(tmp_path: Path) -> None:
    large = {"FP32": np.zeros((2, 1, 256, 200), np.float32)}
    save_comparison(large, ["3", "0"], tmp_path / "compare.png")
    sheet = pixels(tmp_path / "compare.png")
    assert sheet.shape[0] == 4 + 15 + 256 + 4
    np.testing.assert_array_equal(sheet[-5, -5], [128, 128, 128])


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_of_other_images_than_grey_and_colour_each_channel_is_shown_in_grey(
    tmp_path: Path, channels: int
) -> None:
    levels = np.linspace(-1, 0.5, channels, dtype=np.float32)
    images = levels.reshape(1, -1, 1, 1) * np.ones((2, channels, 64, 64), np.float32)
    save_grid(images, tmp_path / "grid.png", columns=2)
    sheet = pixels(tmp_path / "grid.png")
    assert sheet.shape == (1 + 65, 1 + 2 * (64 * channels + 1))
    greys = np.round((levels + 1) * 127.5).tolist()
    for left in (1, 1 + 64 * channels + 1):
        assert sheet[32, left : left + 64 * channels : 64].tolist() == greys
    save_comparison({"FP32": images}, ["a", "b"], tmp_path / "compare.png")
    compared = pixels(tmp_path / "compare.png")[-5, :, 0].astype(float)
    assert set(greys) <= set(compared.tolist())


def test_captions_have_accents_and_quotation_marks(tmp_path: Path) -> None:
    sheets = [
        comparison(tmp_path / "compare.png", [letter])
        for letter in ("ñ", "é", "\u2019", "\U0010ffff")
    ]
    assert len({sheet.tobytes() for sheet in sheets}) == 4
