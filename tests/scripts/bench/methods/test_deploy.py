"""The answer to which bits one should deploy follows from the figures."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from scripts.bench.methods.cells import MAIN_BITS, all_cells, cells_of
from scripts.bench.methods.deploy import answer, missing
from scripts.bench.methods.report import readme

if TYPE_CHECKING:
    from scripts.bench.methods.cells import Cell
    from scripts.bench.methods.results import Result
    from tests.scripts.bench.methods.conftest import MakeResult

SEEDS = [0, 1, 2]
SIZES = {"w8a8": 4_000_000, "w4a8": 2_000_000, "w4a4": 2_010_000}


def found(result: MakeResult, **distances: float) -> dict[Cell, Result | None]:
    """Results in which FP32 has 4.5, other noise up to 4.8, and QuEST these distances."""
    results: dict[Cell, Result | None] = dict.fromkeys(all_cells(), None)
    results |= {cell: result(cell, 4.5) for cell in cells_of("fp32", "fp32", SEEDS)}
    for cell in cells_of("fp32-redrawn", "fp32", SEEDS):
        results[cell] = result(cell, 4.6 + cell.seed / 10)
    for bits, distance in distances.items():
        for cell in cells_of("quest", bits, SEEDS):
            results[cell] = result(cell, distance, payload_bytes=SIZES[bits])
    return results


def speeds(**ratios: float) -> dict[str, Any]:
    """The engines' speeds over FP32."""
    return {
        "bits": {
            bits: {
                "openvino": {
                    "speedup_over_fp32": {"2": ratio},
                    "engine_bytes": 3_000_000,
                    "fp32_bytes": 15_000_000,
                }
            }
            for bits, ratio in ratios.items()
        },
        "environment": {"processor": "a CPU", "threads": 1},
    }


@pytest.mark.parametrize(
    ("distances", "ratios", "deployed"),
    [
        # Equal sizes and speeds: the nearer to real pictures.
        ({"w8a8": 4.5, "w4a8": 4.6, "w4a4": 4.7}, {}, "W4A8"),
        ({"w8a8": 4.5, "w4a8": 4.6, "w4a4": 4.55}, {}, "W4A4"),
        # Equal sizes: the faster.
        ({"w8a8": 4.5, "w4a8": 4.6, "w4a4": 4.7}, {"w4a4": 1.5}, "W4A4"),
        # Too far from real pictures, whatever the size.
        ({"w8a8": 4.5, "w4a8": 4.9, "w4a4": 5.5}, {}, "W8A8"),
    ],
)
def test_the_smallest_that_cannot_be_told_from_fp32_is_to_be_deployed(
    result: MakeResult,
    distances: dict[str, float],
    ratios: dict[str, float],
    deployed: str,
) -> None:
    timed = speeds(**{**dict.fromkeys(MAIN_BITS, 1.0), **ratios})
    text = "\n".join(answer(found(result, **distances), SEEDS, timed))
    assert f"**Deploy {deployed}**" in text
    assert "not measured" not in text


def test_what_shows_its_prompts_less_often_than_fp32_is_not_to_be_deployed(
    result: MakeResult,
) -> None:
    results = found(result, w8a8=4.5, w4a8=4.5, w4a4=4.5)
    for cell in cells_of("quest", "w4a4", SEEDS):
        worse = dataclasses.replace(result(cell, 4.5).judgement, top5=0.8)
        results[cell] = result(cell, 4.5, judgement=worse, payload_bytes=1_000_000)
    assert "**Deploy W4A8**" in "\n".join(answer(results, SEEDS, None))


def test_where_none_is_as_good_as_fp32_the_nearest_is_named(result: MakeResult) -> None:
    text = "\n".join(answer(found(result, w8a8=5.0, w4a8=5.1, w4a4=6.0), SEEDS, None))
    assert "**Each is worse than FP32**; W8A8 is the nearest" in text
    assert "W4A4 beside it: 0.50x the size, equal speed, Fréchet distance +1.00" in text
    assert "Speeds are not measured yet" in text


def test_without_a_cell_that_it_needs_there_is_no_answer(result: MakeResult) -> None:
    results = found(result, w8a8=4.5, w4a8=4.6)
    assert missing(results, SEEDS) == ["w4a4-quest"]
    (line,) = answer(results, SEEDS, None)
    assert "w4a4-quest" in line
    assert "Deploy" not in line


def test_the_table_puts_quality_beside_size_and_speed(result: MakeResult) -> None:
    results = found(result, w8a8=4.5, w4a8=4.6, w4a4=4.7)
    text = readme("a command", results, SEEDS, speeds(w8a8=1.1, w4a8=1.2, w4a4=1.3))
    assert "| FP32 | 50.0 | 90.0 | 4.50 | \N{EN DASH} | 2.00 | 1.00x |" in text
    assert "| W4A4 | 50.0 | 90.0 | 4.70 | 20.0 | 2.01 | 1.30x | 3.00 (15.00) |" in text
