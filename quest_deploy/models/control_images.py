"""What ControlNets and IP-Adapters are shown while a model is calibrated: the user's images, the
model's own pictures, or their edges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quest_deploy.models.pipeline_model import PipelineModel

    Plane = NDArray[np.float64]

LOW, HIGH = 100.0, 200.0
"""Of the gradient, as ControlNet's authors give them to OpenCV's Canny (arXiv 2302.05543)."""


def drawn(model: PipelineModel, latents: NDArray[np.float32]) -> list[Image.Image]:
    """The pictures of ``latents`` [B, ...]; made ones of a model with random weights, which draws
    nothing.
    """
    if model.source.random_weights:
        return [model.image_input(i).image for i in range(len(latents))]
    levels = (127.5 * (model.images(latents) + 1)).round().astype(np.uint8)
    return [Image.fromarray(x.transpose(1, 2, 0)) for x in levels]


def edges(image: Image.Image) -> Image.Image:
    """The edges of an RGB image, white on black in RGB, as Canny's detector finds them: the ridges
    of the gradient, those above ``HIGH`` and what is above ``LOW`` and connected with them.
    """
    gray = np.asarray(image.convert("L"), np.float64)
    slope, mean = np.array([-1.0, 0.0, 1.0]), np.array([1.0, 2.0, 1.0])  # Sobel's
    down, right = (_filtered(_filtered(gray, slope, axis), mean, 1 - axis) for axis in (0, 1))
    size = abs(down) + abs(right)
    ridges = np.where(_is_ridge(size, down, right), size, 0.0)
    found, candidates = ridges > HIGH, ridges > LOW
    while (grown := _neighbours(found) & candidates).sum() > found.sum():
        found = grown
    return Image.fromarray(np.uint8(255) * found.astype(np.uint8)).convert("RGB")


def _filtered(plane: Plane, kernel: Plane, axis: int) -> Plane:
    """The correlation of ``plane`` with ``kernel`` along ``axis``, its border continued."""
    reach = len(kernel) // 2
    padded = np.pad(plane, [(reach, reach) if i == axis else (0, 0) for i in (0, 1)], "edge")
    taps = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis)
    filtered: Plane = taps @ kernel
    return filtered


def _is_ridge(size: Plane, down: Plane, right: Plane) -> NDArray[np.bool_]:
    """Where ``size`` is not less than at both neighbours in the gradient's direction."""
    angle = np.round(np.arctan2(down, right) / (np.pi / 4)).astype(int) % 4
    ridge = np.zeros(size.shape, bool)
    for direction, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        before, after = _shifted(size, y, x), _shifted(size, -y, -x)
        ridge |= (angle == direction) & (size > before) & (size >= after)
    return ridge


def _shifted(plane: NDArray[Any], y: int, x: int) -> NDArray[Any]:
    """``plane`` at (row + y, column + x), zero beyond its border."""
    rows, columns = plane.shape
    padded = np.pad(plane, 1)
    return padded[1 + y : 1 + y + rows, 1 + x : 1 + x + columns]


def _neighbours(found: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """``found`` and what touches it."""
    touching = np.zeros_like(found)
    for y in (-1, 0, 1):
        for x in (-1, 0, 1):
            touching |= _shifted(found, y, x)
    return touching
