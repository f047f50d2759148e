"""The sensitivity report as a picture: one bar a layer, in execution order, coloured by kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from quest_deploy.files import atomic_file
from quest_deploy.quantization.layer_kinds import GROUPS

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from matplotlib.axes import Axes

    from quest_deploy.calibration.sensitivity import LayerSensitivity, Sensitivity

ROWS = 75
"""Layers in one column of the picture; a model with more gets further columns."""
ROW_INCHES, BAR_INCHES, LETTER_INCHES, FRAME_INCHES = 0.16, 4.0, 0.058, 1.3
FONT_SIZE, DPI = 7, 110
DECADES = 8
"""The axis shows no more than this below the largest error: what is smaller hurts nothing."""


def plot_sensitivity(sensitivity: Sensitivity, chosen: Collection[str], path: Path) -> None:
    """Save a PNG of each layer's ``mse`` on a logarithmic axis; the names of the ``chosen`` layers
    are bold and starred.
    """
    layers = sensitivity.layers
    columns = [layers[start : start + ROWS] for start in range(0, len(layers), ROWS)] or [()]
    names = LETTER_INCHES * max((len(layer.layer) for layer in layers), default=0)
    size = ((names + BAR_INCHES) * len(columns), ROW_INCHES * min(len(layers), ROWS) + FRAME_INCHES)
    figure = Figure(
        size, dpi=DPI, layout="constrained"
    )  # drawn by the Agg canvas, as every figure outside pyplot
    largest = max((layer.mse for layer in layers), default=0.0) or 1.0
    smallest = min(
        (layer.mse for layer in layers if layer.mse > largest / 10**DECADES), default=largest
    )
    for axes, column in zip(
        figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True
    ):
        axes.set_xlim(smallest / 2, largest * 2)
        axes.set_ylim(min(len(layers), ROWS) - 0.4, -0.6)
        _draw(axes, column, chosen)
    present = {layer.group for layer in layers}
    patches = [
        Patch(color=color, label=group) for group, color in _colors().items() if group in present
    ]
    figure.legend(
        handles=patches, loc="outside lower center", ncols=5 * len(columns), fontsize=FONT_SIZE + 1
    )
    figure.suptitle(
        f"{sensitivity.model} at {sensitivity.scheme}: error of the output with one layer "
        "quantized (* picked for stage 2)",
        fontsize=FONT_SIZE + 3,
    )
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _draw(axes: Axes, layers: tuple[LayerSensitivity, ...], chosen: Collection[str]) -> None:
    rows = range(len(layers))
    colors = _colors()
    axes.barh(
        rows,
        [layer.mse for layer in layers],
        height=0.8,
        color=[colors[layer.group] for layer in layers],
    )
    axes.set_xscale("log")
    axes.set_xlabel(
        "mean squared error of the output, mean over timestep buckets", fontsize=FONT_SIZE
    )
    axes.set_yticks(
        rows, [f"{layer.layer} *" if layer.layer in chosen else layer.layer for layer in layers]
    )
    axes.tick_params(labelsize=FONT_SIZE)
    axes.grid(axis="x", alpha=0.4)
    axes.set_axisbelow(True)
    for label, layer in zip(axes.get_yticklabels(), layers, strict=True):
        label.set_fontweight("bold" if layer.layer in chosen else "normal")


def _colors() -> dict[str, str]:
    """Hues that stay apart, and grey for the rest."""
    hues = [to_hex(colormaps["tab20"](i)) for i in (6, 9, 4, 0, 1, 2, 8, 16, 10, 12, 18, 3, 5, 14)]
    return dict(zip(GROUPS, hues, strict=True))
