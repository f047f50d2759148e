from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from quest_deploy.files import read_json, write_json
from scripts.bench.methods.cells import Cell
from scripts.bench.methods.results import cell_path, load_result, save_result
from tests.helpers import refused
from tests.quest_deploy.support import truncate

if TYPE_CHECKING:
    from pathlib import Path

    from tests.scripts.bench.methods.conftest import MakeResult

CELL = Cell("quest", "w4a4", 0)


def test_a_result_reads_back_as_it_was_saved(tmp_path: Path, result: MakeResult) -> None:
    saved = result(CELL, 0.75)
    save_result(tmp_path, CELL, saved)
    assert cell_path(tmp_path, CELL) == tmp_path / "w4a4-quest-seed0.json"
    assert load_result(tmp_path, CELL, saved.definition) == saved


def test_a_cell_that_was_never_measured_has_no_result(tmp_path: Path, result: MakeResult) -> None:
    assert load_result(tmp_path, CELL, result(CELL).definition) is None


def test_a_result_of_another_definition_counts_as_none(tmp_path: Path, result: MakeResult) -> None:
    save_result(tmp_path, CELL, result(CELL))
    assert load_result(tmp_path, CELL, {**result(CELL).definition, "revision": 999}) is None


def test_a_file_under_another_cells_name_is_refused(tmp_path: Path, result: MakeResult) -> None:
    save_result(tmp_path, CELL, result(CELL))
    other = Cell("quest", "w4a4", 1)
    cell_path(tmp_path, CELL).rename(cell_path(tmp_path, other))
    with refused(cell_path(tmp_path, other)):
        load_result(tmp_path, other, result(other).definition)


@pytest.mark.parametrize(
    "damage", ["truncated", "no quality", "unknown key", "edited definition", "a list"]
)
def test_a_damaged_file_is_refused_with_what_to_do(
    tmp_path: Path, result: MakeResult, damage: str
) -> None:
    saved = result(CELL)
    save_result(tmp_path, CELL, saved)
    path = cell_path(tmp_path, CELL)
    value = read_json(path)
    if damage == "truncated":
        truncate(path)
    elif damage == "no quality":
        write_json(path, {key: part for key, part in value.items() if key != "quality"})
    elif damage == "unknown key":
        write_json(path, {**value, "more": 1})
    elif damage == "edited definition":
        write_json(path, {**value, "definition": {**value["definition"], "seed": 7}})
    else:
        write_json(path, [value])
    with refused(path):
        load_result(tmp_path, CELL, saved.definition)
