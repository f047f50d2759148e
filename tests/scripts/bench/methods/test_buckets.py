"""Where buckets pay follows from the figures, beside what noise does to FP32's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from scripts.bench.methods.buckets import where_buckets_pay
from scripts.bench.methods.cells import BUCKETS, Cell, all_cells

if TYPE_CHECKING:
    from scripts.bench.methods.results import Result
    from tests.scripts.bench.methods.conftest import MakeResult

SEEDS = [0, 1, 2]


def results(result: MakeResult, one_bucket: float) -> dict[Cell, Result | None]:
    """FP32 has 1.0, other noise up to 1.2; all rows have 1.0 but that of one bucket."""
    found: dict[Cell, Result | None] = {cell: result(cell, 1.0) for cell in all_cells(SEEDS)}
    for cell in found:
        if cell.row == "fp32-redrawn":
            found[cell] = result(cell, 1.0 + cell.seed / 10)
        elif cell.row == "quest-k1":
            found[cell] = result(cell, one_bucket)
    return found


def test_each_schedule_has_a_sentence() -> None:
    assert len(BUCKETS) == 4


@pytest.mark.parametrize(("one_bucket", "more"), [(1.19, False), (1.5, True)])
def test_rows_that_lie_no_further_apart_than_noise_moves_fp32_are_said_to(
    result: MakeResult, one_bucket: float, more: bool
) -> None:
    usual, *others = where_buckets_pay(results(result, one_bucket), SEEDS)
    assert f"1 bucket: {one_bucket:.2f}" in usual
    assert ("no more than" in usual) is not more
    assert all("no more than" in line for line in others)


def test_nothing_is_said_of_a_schedule_with_a_cell_that_is_not_computed(
    result: MakeResult,
) -> None:
    found = results(result, 1.5) | {Cell("quest-k4", "w4a4", 2): None}
    usual, *others = where_buckets_pay(found, SEEDS)
    assert "open" in usual
    assert "1.50" not in usual
    assert not any("open" in line for line in others)
