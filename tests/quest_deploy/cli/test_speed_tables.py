"""What `benchmark` says of its figures: of made ones, whose sums and ratios are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.cli import speed

PRECISION = {
    "shares": {},
    "asked_int8_share": 0.5,
    "unavailable": "",
    "sizes": {"engine": None, "graph": 10, "fp16": 20, "ideal": 5},
    "warnings": [],
}


def images(draws: int = 1, count: int = 1) -> dict[str, Any]:
    def engine(name: str, unet: float, rest: float, memory: int) -> dict[str, Any]:
        parts = {"text encoder": 0.01, "unet": unet, "decoder": 0.03}
        total = sum(parts.values()) + rest
        return {
            "engine": name,
            "parts": parts,
            "unet_call_s": unet / 20,
            "unet_calls": 20,
            "total_s": total,
            "images_per_s": count / total,
            "peak_memory_bytes": memory,
        }

    return {
        "images": count,
        "draws": draws,
        "height": 64,
        "width": 32,
        "steps": 20,
        "scheduler": "ddim",
        "guidance": 4.0,
        "speedup_over_fp32": 0.9,
        "engines": [engine("quantized", 0.2, 0.02, 600), engine("fp32", 0.1, 0.03, 300)],
    }


def details(gain: float, **others: Any) -> Any:
    """A quantized engine ``gain`` times as fast, as small and as frugal as FP32's."""
    return {
        "backend": "openvino",
        "buckets": 3,
        "timings": [
            {
                "engine": name,
                "batch": 1,
                "median_s": seconds,
                "p90_s": seconds,
                "samples_per_s": 1 / seconds,
            }
            for name, seconds in (("quantized", 1.0), ("fp32", gain))
        ],
        "footprints": [
            {"engine": name, "file_bytes": count, "peak_memory_bytes": count}
            for name, count in (("quantized", 1000), ("fp32", round(1000 * gain)))
        ],
        "speedup_over_fp32": {"1": gain},
        "bucket_selection_cost": {},
        "size_ratio_to_fp32": gain,
        "precision": PRECISION,
        **others,
    }


def test_the_parts_of_an_image_and_the_rest_add_up_to_the_whole() -> None:
    header, rows = speed.image_times("Module", images())
    assert header == ["Module", "quantized", "fp32", "gain over FP32"]
    found = {row[0]: row[1:] for row in rows}
    names = list(found)
    whole = names.index("Whole image")
    assert names[:whole] == ["Text encoder", "UNet, 20 calls", "Decoder", names[whole - 1]]
    for column in (0, 1):
        parts = [float(found[name][column].removesuffix(" ms")) for name in names[:whole]]
        total = float(found["Whole image"][column].removesuffix(" ms"))
        assert sum(parts) == pytest.approx(total, abs=0.03)
    gains = {name: cells[-1] for name, cells in found.items()}
    assert gains["UNet, 20 calls"] == "0.50x"
    assert gains[names[whole - 1]] == "1.50x"
    assert gains["Images per second"] == gains["Whole image"] == f"{0.17 / 0.26:.2f}x"
    assert gains["Peak memory"] == "0.50x"


def test_a_rest_that_is_lost_in_noise_has_no_ratio() -> None:
    made = images()
    made["engines"][0]["total_s"] -= 0.021
    [rest] = [row for row in speed.image_times("Module", made)[1] if row[0].startswith("Rest")]
    assert rest[1:] == ["-1.00 ms", "30.00 ms", "-"]


@pytest.mark.parametrize(
    ("draws", "count", "said", "unsaid"),
    [
        (1, 1, ("1 image of 64x32,", "1 drawing of each"), ("images", "median", "at once")),
        (3, 2, ("2 images of 64x32 at once,", "medians of 3 drawings"), ("1 drawing",)),
    ],
)
def test_one_is_singular(
    draws: int, count: int, said: tuple[str, ...], unsaid: tuple[str, ...]
) -> None:
    text = speed.drawings(images(draws, count))
    assert all(x in text for x in said)
    assert not any(x in text for x in unsaid)


@pytest.mark.parametrize("gain", [0.5, 0.99, 0.996, 1.0, 2.0])
def test_what_is_worse_than_fp32_is_said_in_words(tmp_path: Path, gain: float) -> None:
    workspace = Workspace.create(tmp_path / "w", "emoji", Scheme.parse("w4a4", buckets=3))
    text = speed.benchmark(workspace, details(gain))
    worse = gain < 0.995  # as it is printed
    for word in ("slower", "larger", "higher"):
        assert (f"{word} than FP32" in text) == worse
    assert (f"inspect {workspace.root}/engines/openvino --layers" in text) == worse
    if worse:
        assert f"{1 / gain:.2f}x larger than FP32" in text
    assert ("slower" in speed.speeds(details(gain))) == worse


def test_every_engine_has_its_ratios_to_fp32() -> None:
    header, rows = speed.timings("engine", details(0.5))
    assert [row[header.index("gain over FP32")] for row in rows] == ["0.50x", "1.00x"]
    header, rows = speed.footprints("engine", details(2.0))
    assert [row[2::2] for row in rows] == [["2.00x", "2.00x"], ["1.00x", "1.00x"]]


def test_the_gpus_memory_is_shown_where_it_was_told_of_every_engine() -> None:
    found = details(2.0)
    for footprint, held in zip(found["footprints"], (3 << 20, None), strict=True):
        footprint["gpu_bytes"] = held
    assert "GPU memory" not in speed.footprints("engine", found)[0]
    found["footprints"][1]["gpu_bytes"] = 6 << 20
    header, rows = speed.footprints("engine", found)
    column = header.index("GPU memory")
    assert [row[column + 1] for row in rows] == ["2.00x", "1.00x"]


def test_whole_images_follow_where_they_were_timed(tmp_path: Path) -> None:
    workspace = Workspace.create(tmp_path / "w", "emoji", Scheme.parse("w4a4", buckets=3))
    text = speed.benchmark(workspace, details(2.0, pipeline=images()))
    assert "whole images: 0.90x the speed of FP32, slower than FP32" in text
