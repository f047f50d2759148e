from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.files import read_json, sha256_of_json
from quest_deploy.finetuning.train import FinetuneOptions
from scripts.bench.methods import recipes
from scripts.bench.methods.cells import (
    ABLATIONS,
    FEWER,
    ROWS,
    SEEDS,
    STEPS,
    SUBJECTS,
    USUAL,
    Cell,
    Float,
    Pipeline,
    Schedule,
    all_cells,
    cells_of,
)
from scripts.bench.methods.model import ComparedModel

TABLES = [(name, table) for name, subject in SUBJECTS.items() for table in subject.tables]
RESULTS = Path(recipes.__file__).parents[1] / "results" / "methods"


@pytest.mark.parametrize(
    "table", [table for _, table in TABLES], ids=[f"{name} {table.title}" for name, table in TABLES]
)
def test_every_row_of_a_table_has_cells_or_a_reason(table: Any) -> None:
    for key in table.rows:
        assert bool(cells_of(key, table.bits, SEEDS)) != bool(
            ROWS[key].elsewhere and table.bits not in ROWS[key].bits
        )


def test_every_row_is_shown() -> None:
    assert {key for _, table in TABLES for key in table.rows} == set(ROWS)


def test_every_cell_is_computed_once_whatever_tables_show_it() -> None:
    cells = all_cells()
    assert len(set(cells)) == len({cell.name for cell in cells}) == len(cells)
    assert sum("quest" in table.rows for table in ABLATIONS) > 1


def test_all_rows_come_before_a_second_seed() -> None:
    seeds = [cell.seed for cell in all_cells()]
    assert seeds == sorted(seeds)


def test_only_the_float_model_of_one_noise_has_one_seed() -> None:
    for key, row in ROWS.items():
        one = isinstance(row.recipe, Float) and not row.recipe.other_noise
        for bits in row.bits:
            assert len(cells_of(key, bits, SEEDS)) == (1 if one else 3)


def test_no_two_cells_have_one_definition(definitions: dict[Cell, dict[str, Any]]) -> None:
    assert len({sha256_of_json(definition) for definition in definitions.values()}) == len(
        definitions
    )


def test_a_definition_is_what_its_file_reads_back(definitions: dict[Cell, dict[str, Any]]) -> None:
    for definition in definitions.values():
        assert json.loads(json.dumps(definition)) == definition


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_what_was_measured_is_what_its_cell_would_measure_today(
    definitions: dict[Cell, dict[str, Any]], path: Path
) -> None:
    cells = {cell.name: cell for cell in definitions}
    digest = read_json(path)["definition_sha256"]
    assert digest == sha256_of_json(definitions[cells[path.stem]])


def test_a_definition_changes_with_a_default_it_does_not_name(
    compared: ComparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell("quest", "w4a4", 0)
    before = recipes.definition_of(cell, compared)
    monkeypatch.setattr(
        recipes, "FinetuneOptions", lambda **given: FinetuneOptions(**{"output_loss": 0.5, **given})
    )
    assert recipes.definition_of(cell, compared) != before


def test_every_finetuned_row_takes_the_same_number_of_steps(
    definitions: dict[Cell, dict[str, Any]],
) -> None:
    steps = {}
    for cell, definition in definitions.items():
        if options := definition["recipe"].get("finetuning"):
            steps[cell.row] = sum(options[f"{stage}_steps"] for stage in options["stages"])
    assert set(steps.values()) == {STEPS}
    recipes_of = {cell.row: ROWS[cell.row].recipe for cell in definitions}
    assert set(steps) == {
        key
        for key, recipe in recipes_of.items()
        if isinstance(recipe, Pipeline) and recipe.finetuning is not None
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
        } | {
            name: recipe[name]
            for name in (
                "trajectories",
                "rotated",
                "low_rank",
                "reconstruction",
                "sensitivity",
                "reported_layers",
            )
        }

    baseline = options("quest")

    def differences(row: str) -> set[str]:
        return {name for name, value in options(row).items() if value != baseline[name]}

    assert differences("quest-k4") == {"scheme.bucket_edges"}
    assert differences("quest-stage1") == {"finetuning.stages", "finetuning.temporal_steps"}
    assert (
        differences("quest-per-tensor")
        == differences("quest-free-channel")
        == {"scheme.granularity"}
    )
    assert differences("quest-all-layers") == {"finetuning.sensitive_layers"}
    assert differences("quest-auto-layers") == {"reported_layers", "sensitivity"}
    assert differences("quest-attention4") == {"scheme.attention_bits", "scheme.softmax_bits"}
    assert differences("quest-rotated") == {"rotated"}
    assert differences("quest-attention4-rotated") == differences("quest-attention4") | {"rotated"}
    assert differences("quest-four-bits") == {"scheme.eight_bit_layers"}
    assert differences("quest-low-rank") == differences("quest-four-bits") | {
        "low_rank",
        "sensitivity",
    }
    assert differences("quest-8-steps") == differences("quest-4-steps") == set()
    few = differences("equal4-8-steps")
    assert few == differences("quantiles4-8-steps") == {"scheme.bucket_edges", "trajectories"}


def test_quantiles_of_few_uneven_steps_are_other_buckets_than_equally_wide_ones(
    definitions: dict[Cell, dict[str, Any]],
) -> None:
    def edges(row: str) -> list[float]:
        found: list[float] = definitions[Cell(row, "w4a4", 0)]["recipe"]["scheme"]["bucket_edges"]
        return found

    assert edges("equal4-8-steps") == edges("equal4-4-steps") == [250.0, 500.0, 750.0]
    assert edges("quantiles4-8-steps") == [51.0, 424.0, 818.0]
    assert len(edges("quantiles8-8-steps")) == 7


@pytest.mark.slow
def test_a_transformers_buckets_hold_equally_many_steps_unless_a_row_says_otherwise(
    small_dit: str,
) -> None:
    model = ComparedModel.load(small_dit)

    def edges(row: str) -> list[float]:
        definition = recipes.definition_of(Cell(row, "w4a4", 0), model)
        assert definition["recipe"]["scheme"]["float_layers"]
        found: list[float] = definition["recipe"]["scheme"]["bucket_edges"]
        return found

    def held(row: str, schedule: Schedule = USUAL) -> list[int]:
        timesteps = model.on(schedule).timesteps
        ends = pairwise([0, *edges(row), 1001])
        return [sum(low <= t < high for t in timesteps) for low, high in ends]

    assert edges("quest-equal10") == [100.0 * i for i in range(1, 10)]
    assert held("quest-k1") == [20]
    assert held("quest-k10") == [2] * 10
    assert held("quest") == [1] * 20
    assert held("quantiles4-4-steps", FEWER) == [1] * 4


@pytest.mark.slow
def test_no_two_cells_of_a_transformer_have_one_definition(small_dit: str) -> None:
    model = ComparedModel.load(small_dit)
    cells = all_cells(model=small_dit)
    digests = {sha256_of_json(recipes.definition_of(cell, model)) for cell in cells}
    assert len(digests) == len(cells)


def test_every_row_starts_from_as_much_recorded_data_in_whole_samplings(
    definitions: dict[Cell, dict[str, Any]], compared: ComparedModel
) -> None:
    usual = compared.calibration_samples * compared.calibration_steps
    for cell, definition in definitions.items():
        if recorded := definition["recipe"].get("trajectories"):
            steps = recorded["schedule"]["steps"]
            assert usual - steps < recorded["samples"] * steps <= usual, cell


def test_every_revision_and_every_part_of_the_model_is_in_the_definition(
    compared: ComparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell("fp32", "fp32", 0)
    before = recipes.definition_of(cell, compared)
    assert set(before["parts"]) == {
        "judge",
        "model_index.json",
        "prompts.txt",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "unet",
        "vae",
    }
    monkeypatch.setattr(recipes, "REVISION", recipes.REVISION + 1)
    assert recipes.definition_of(cell, compared) != before
