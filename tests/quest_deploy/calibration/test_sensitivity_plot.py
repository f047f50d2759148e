from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quest_deploy.calibration.sensitivity import LayerSensitivity, Sensitivity
from quest_deploy.calibration.sensitivity_plot import DPI, ROWS, plot_sensitivity


def sensitivity(errors: list[float]) -> Sensitivity:
    """A report of as many layers, with names as long as Stable Diffusion's."""
    kinds = ("attn1.to_q", "attn2.to_v", "ff.net.0.proj")
    names = [
        f"down_blocks.1.attentions.{i}.transformer_blocks.0.{kinds[i % len(kinds)]}"
        for i in range(len(errors))
    ]
    return Sensitivity(
        "model",
        "w4a4",
        1,
        tuple(LayerSensitivity(n, e, e, (e,), (e,)) for n, e in zip(names, errors, strict=True)),
    )


@pytest.mark.parametrize("count", [1, 60, pytest.param(300, marks=pytest.mark.slow)])
def test_every_layer_has_room_for_its_name(tmp_path: Path, count: int) -> None:
    plot_sensitivity(
        sensitivity([10.0 ** -(i % 7) for i in range(count)]), (), tmp_path / "plot.png"
    )
    width, height = Image.open(tmp_path / "plot.png").size
    columns = -(-count // ROWS)
    assert (
        height / min(count, ROWS) >= 14
    )  # pixels a row, for letters of 7 points at 110 dots an inch
    assert width >= columns * 7 * DPI
    assert (width, height) <= (4 * 8 * DPI, 15 * DPI)


def test_a_longer_bar_is_a_larger_error_on_a_logarithmic_axis(tmp_path: Path) -> None:
    plot_sensitivity(sensitivity([1e-1, 1e-3, 1e-3, 1e-5]), (), tmp_path / "plot.png")
    pixels = np.asarray(Image.open(tmp_path / "plot.png").convert("RGB")).astype(int)
    coloured = (pixels.max(2) - pixels.min(2) > 60).sum(
        1
    )  # the bars' pixels in each row of the picture
    starts = np.flatnonzero((coloured[1:] > 20) & (coloured[:-1] <= 20)) + 3
    lengths = [int(coloured[start]) for start in starts[:4]]
    assert lengths[0] > lengths[1] == lengths[2] > lengths[3]
    assert lengths[0] - lengths[1] == pytest.approx(lengths[1] - lengths[3], abs=3)


def test_chosen_layers_are_marked(tmp_path: Path) -> None:
    report = sensitivity([1.0, 0.1])
    plot_sensitivity(report, (), tmp_path / "none.png")
    plot_sensitivity(report, (report.layers[0].layer,), tmp_path / "one.png")
    none, one = (
        np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).max(2)
        for name in ("none", "one")
    )
    assert (one < 100).sum() > (none < 100).sum() + 100  # more ink, and no bar is that dark


@pytest.mark.parametrize(
    "errors", [[], [0.0, 0.0], [1e-30, 1.0]], ids=["no layers", "no errors", "far apart"]
)
def test_extreme_reports_are_drawn(tmp_path: Path, errors: list[float]) -> None:
    plot_sensitivity(sensitivity(errors), (), tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").format == "PNG"


def test_the_same_report_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot_sensitivity(sensitivity([1.0, 0.5]), (), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_drawing_needs_no_display() -> None:
    script = (
        "import sys, pathlib, tempfile\n"
        "from quest_deploy.calibration.sensitivity import LayerSensitivity, Sensitivity\n"
        "from quest_deploy.calibration.sensitivity_plot import plot_sensitivity\n"
        "layer = LayerSensitivity('conv_in', 1.0, 1.0, (1.0,), (1.0,))\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    plot_sensitivity(Sensitivity('m', 'w4a4', 1, (layer,)), (), pathlib.Path(folder) / "
        "'plot.png')\n"
        "print('pyplot' if 'matplotlib.pyplot' in sys.modules else 'no pyplot')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "no pyplot\n"
