from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from quest_deploy.files import sha256_of_json
from quest_deploy.finetuning.train import FinetuneOptions
from scripts.bench.methods import recipes
from scripts.bench.methods.cells import (
    ABLATIONS,
    MAIN_TABLES,
    ROWS,
    SEEDS,
    STEPS,
    Cell,
    Pipeline,
    all_cells,
    cells_of,
)

if TYPE_CHECKING:
    from scripts.bench.methods.digits.model import DigitsModel

TABLES = (*MAIN_TABLES, *ABLATIONS)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
def test_every_row_of_a_table_has_cells_or_a_reason(table: Any) -> None:
    for key in table.rows:
        assert bool(cells_of(key, table.bits, SEEDS)) != bool(
            ROWS[key].elsewhere and table.bits not in ROWS[key].bits
        )


def test_every_row_is_shown() -> None:
    assert {key for table in TABLES for key in table.rows} == set(ROWS)


def test_every_cell_is_computed_once_whatever_tables_show_it() -> None:
    cells = all_cells()
    assert len(set(cells)) == len({cell.name for cell in cells}) == len(cells)
    assert sum("quest" in table.rows for table in ABLATIONS) > 1


def test_all_rows_come_before_a_second_seed() -> None:
    seeds = [cell.seed for cell in all_cells()]
    assert seeds == sorted(seeds)


def test_only_the_float_model_has_one_seed() -> None:
    for key, row in ROWS.items():
        for bits in row.bits:
            assert len(cells_of(key, bits, SEEDS)) == (1 if key == "fp32" else 3)


def test_no_two_cells_have_one_definition(definitions: dict[Cell, dict[str, Any]]) -> None:
    assert len({sha256_of_json(definition) for definition in definitions.values()}) == len(
        definitions
    )


def test_a_definition_is_what_its_file_reads_back(definitions: dict[Cell, dict[str, Any]]) -> None:
    for definition in definitions.values():
        assert json.loads(json.dumps(definition)) == definition


def test_a_definition_changes_with_a_default_it_does_not_name(
    digits: DigitsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell("quest", "w4a4", 0)
    before = recipes.definition_of(cell, digits)
    monkeypatch.setattr(
        recipes, "FinetuneOptions", lambda **given: FinetuneOptions(**{"weight_rate": 0.5, **given})
    )
    assert recipes.definition_of(cell, digits) != before


def test_every_finetuned_row_takes_the_same_number_of_steps(
    definitions: dict[Cell, dict[str, Any]],
) -> None:
    steps = {}
    for cell, definition in definitions.items():
        if options := definition["recipe"].get("finetuning"):
            steps[cell.row] = sum(options[f"{stage}_steps"] for stage in options["stages"])
    assert set(steps.values()) == {STEPS}
    assert set(steps) == {
        key
        for key, row in ROWS.items()
        if isinstance(row.recipe, Pipeline) and row.recipe.finetuning is not None
    }


def test_a_row_differs_from_the_baseline_in_what_its_table_is_about(
    definitions: dict[Cell, dict[str, Any]],
) -> None:
    def options(row: str) -> dict[str, Any]:
        recipe = definitions[Cell(row, "w4a4", 0)]["recipe"]
        return {
            f"{stage}.{name}": value
            for stage in ("scheme", "calibration", "finetuning")
            for name, value in recipe[stage].items()
        } | {stage: recipe[stage] is not None for stage in ("reconstruction", "sensitivity")}

    baseline = options("quest")

    def differences(row: str) -> set[str]:
        return {name for name, value in options(row).items() if value != baseline[name]}

    assert differences("quest-k5") == {"scheme.bucket_edges"}
    assert differences("quest-stage1") == {"finetuning.stages", "finetuning.temporal_steps"}
    assert differences("quest-stage2") == {"finetuning.stages", "finetuning.sensitive_steps"}
    assert differences("quest-reversed") == {"finetuning.stages"}
    assert differences("quest-frozen") == {"finetuning.carry_temporal"}
    assert (
        differences("quest-per-tensor")
        == differences("quest-free-channel")
        == {"scheme.granularity"}
    )
    assert differences("quest-all-layers") == {"finetuning.sensitive_layers"}
    assert differences("quest-auto-layers") == {"sensitivity"}
    assert differences("quest-attention4") == {"scheme.attention_bits", "scheme.softmax_bits"}
    assert differences("quest-split-shortcuts") == {"scheme.split_shortcuts"}
    assert differences("quest-from-qdiff") == {
        "scheme.split_shortcuts",
        "calibration.method",
        "reconstruction",
    }


def test_every_row_starts_from_the_same_amount_of_recorded_data(
    definitions: dict[Cell, dict[str, Any]], digits: DigitsModel
) -> None:
    amounts = set()
    for definition in definitions.values():
        recipe = definition["recipe"]
        if "trajectories" in recipe:
            buckets = len(recipe.get("scheme", {}).get("bucket_edges", [])) + 1
            amounts.add(
                recipe["trajectories"]["samples"] * max(recipe["trajectories"]["steps"], buckets)
            )
    most = recipes.SAMPLES * digits.calibration_steps
    assert max(amounts) == most
    assert min(amounts) > 0.99 * most
