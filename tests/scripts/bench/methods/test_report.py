from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from quest_deploy.evaluation.quality import SamplingOptions
from scripts.bench.methods.cells import (
    ABLATIONS,
    MAIN_TABLES,
    PAPER_SENSITIVE,
    PAPER_TEMPORAL,
    Cell,
    all_cells,
    cells_of,
)
from scripts.bench.methods.plot import plot
from scripts.bench.methods.report import everything, markdown, readme
from tests.quest_deploy.support import strict_json

if TYPE_CHECKING:
    from pathlib import Path

    from scripts.bench.methods.results import Result
    from tests.scripts.bench.methods.conftest import MakeResult

COMMAND = "python -m scripts.bench.methods"
SAMPLING = SamplingOptions(images=256)
SEEDS = [0, 1, 2]
QUEST = [Cell("quest", "w4a4", seed) for seed in SEEDS]


def page(results: dict[Cell, Result | None]) -> str:
    return markdown("emoji", SAMPLING, COMMAND, results, SEEDS)


def lines(text: str, title: str) -> dict[str, list[str]]:
    """The cells of the table under ``title``, by their row's label."""
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows}


def nothing() -> dict[Cell, Result | None]:
    return dict.fromkeys(all_cells(), None)


def test_a_row_shows_the_mean_and_every_seeds_value(result: MakeResult) -> None:
    found = nothing() | {
        cell: result(cell, distance) for cell, distance in zip(QUEST, (0.5, 0.75, 1.0), strict=True)
    }
    assert lines(page(found), "W4A4")["QuEST"] == [
        "smoothing, 20",
        "float",
        "50.0",
        "90.0 (90.0, 90.0, 90.0)",
        "0.75 (0.50, 0.75, 1.00)",
        "0.0750 (0.0500, 0.0750, 0.1000)",
        "20.0",
        "0.750",
        "0.0010",
        "0.0300",
        "0.5000",
        "2.00",
        "15",
    ]


def test_a_baseline_is_shown_in_every_table_that_has_it(result: MakeResult) -> None:
    found = nothing() | {QUEST[0]: result(QUEST[0], 0.123)}
    shown = page(found).count("| 0.12 (0.12, not computed, not computed) |")
    assert shown == sum("quest" in table.rows for table in ABLATIONS) + 1


def test_what_was_not_computed_is_said_not_to_be(result: MakeResult) -> None:
    rows = lines(page(nothing()), "W8A8")
    shown = [cells[0] for label, cells in rows.items() if label not in ("method", "---")]
    assert {text for text in shown if not text.startswith("\N{EN DASH} (")} == {"not computed"}
    every = len(all_cells())
    assert f"0 of {every} cells are computed; {every} are not." in page(nothing())


def test_the_page_names_every_cell_that_is_not_computed_and_shows_no_figure_of_it(
    result: MakeResult,
) -> None:
    text = readme(COMMAND, nothing() | {QUEST[1]: result(QUEST[1])}, SEEDS, None)
    absent = text.split("## Not computed yet\n")[1]
    assert "- `w4a4-quest`: seed 0, 2" in absent
    assert "- `fp32-fp32`: seed 0" in absent
    assert len(absent.strip().splitlines()) == len({(c.row, c.bits) for c in all_cells()})
    assert f"1 of {len(all_cells())} cells" in text
    answer = text.split("## Which bits should one deploy?\n")[1]
    assert "Open: not computed yet: `fp32-fp32`" in answer
    assert "W8A8 |" not in text
    complete = {cell: result(cell) for cell in all_cells()}
    assert "Nothing: all cells are computed." in readme(COMMAND, complete, SEEDS, None)


def test_a_method_that_does_not_exist_at_some_bits_says_why(result: MakeResult) -> None:
    for label in ("PTQ, NNCF INT8", "Q-Diffusion"):
        assert lines(page(nothing()), "W8A8" if label[0] == "Q" else "W4A4")[label][0].startswith(
            "\N{EN DASH} ("
        )


def test_a_cell_that_took_too_long_is_named(result: MakeResult) -> None:
    slow = dataclasses.replace(result(QUEST[0]), process_seconds=361.0)
    text = page(nothing() | {QUEST[0]: slow, QUEST[1]: result(QUEST[1])})
    assert "took more than 6 CPU minutes: w4a4-quest-seed0.\n" in text


def test_the_bits_of_the_attention_products_are_stated(result: MakeResult) -> None:
    cell = Cell("quest-attention4", "w4a4", 0)
    rows = lines(page(nothing() | {cell: result(cell)}), "W4A4: Rotation of q, k and v")
    assert rows["none, q, k and v at 4 bits, softmax at 8"][1] == "4 / 8"


def test_the_error_of_every_bucket_is_shown_from_the_noisiest(result: MakeResult) -> None:
    rows = lines(page(nothing() | {QUEST[0]: result(QUEST[0])}), "ε-MSE per timestep bucket, W4A4")
    assert list(rows)[2] == "950 ≤ t < 1000"
    assert rows["0 ≤ t < 50"] == ["0.50000"]
    assert len(rows) == 2 + 20


def test_the_table_names_the_command_and_the_environment(result: MakeResult) -> None:
    text = page(nothing() | {QUEST[0]: result(QUEST[0])})
    assert f"`{COMMAND}`" in text
    assert "a CPU, 1 thread, Python 3.11.7, torch 2.13.0" in text


def test_the_json_holds_every_table_and_every_cell(result: MakeResult) -> None:
    value = strict_json(
        json.dumps(
            everything("emoji", COMMAND, nothing() | {QUEST[0]: result(QUEST[0], 0.5)}, SEEDS)
        )
    )
    assert [table["title"] for table in value["tables"]] == [
        table.title for table in (*MAIN_TABLES, *ABLATIONS)
    ]
    assert value["cells"]["w4a4-quest-seed0"]["quality"]["frechet_distance"] == 0.5
    assert value["cells"]["w4a4-quest-seed1"] is None
    assert {
        name for table in value["tables"] for row in table["rows"] for name in row["cells"]
    } == set(value["cells"])


def test_equal_results_give_equal_pictures_and_other_results_another(
    tmp_path: Path, result: MakeResult
) -> None:
    found = nothing() | {cell: result(cell, 0.5 + cell.seed) for cell in QUEST}
    plot(found, [0, 1, 2], tmp_path / "a.png")
    plot(found, [0, 1, 2], tmp_path / "b.png")
    plot(nothing(), [0, 1, 2], tmp_path / "none.png")
    pictures = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png", "none.png")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] == pictures[1] != pictures[2]


def test_how_many_layers_other_packages_quantized_is_stated(result: MakeResult) -> None:
    modelopt, nncf = Cell("modelopt", "w8a8", 0), Cell("nncf", "w8a8", 0)
    found = nothing() | {
        modelopt: result(modelopt, notes={"layers": 132, "quantized_layers": 125}),
        nncf: result(nncf, notes={"quantized_tensors": 97}),
    }
    rows = lines(page(found), "W8A8")
    label = "PTQ, modelopt's INT8 configuration at these bits"
    assert rows[label][0] == "its own, 1 (125 of 132 layers)"
    assert rows["PTQ, NNCF INT8"][0] == "its own, 1 (97 tensors)"


def verdicts(
    distances: dict[str, tuple[float, float, float]],
    result: MakeResult,
    others: dict[Cell, Result | None] | None = None,
) -> dict[str, tuple[str, str]]:
    """What the claims' section says, by both figures, when rows at W4A4 have these distances."""
    found = dict(others or nothing())
    for row, values in distances.items():
        found |= {
            cell: result(cell, value)
            for cell, value in zip(cells_of(row, "w4a4", SEEDS), values, strict=True)
        }
    rows = lines(page(found), "The papers' claims on this model")
    return {label: (cells[2], cells[5]) for label, cells in rows.items()}


def test_the_critical_groups_are_judged_by_their_share_of_the_error(result: MakeResult) -> None:
    def said(*shares: float) -> str:
        found = nothing()
        for seed, share in enumerate(shares):
            notes = {
                "sensitive_layers": ["conv_out"],
                "error_shares": {
                    PAPER_TEMPORAL: 0.1,
                    PAPER_SENSITIVE: share - 0.1,
                    "conv_in/conv_out": 1 - share,
                },
            }
            cell = Cell("quest-auto-layers", "w4a4", seed)
            found[cell] = result(cell, notes=notes)
        return page(found)

    claim = (
        "QuEST's claim that its temporal and its sensitive layers make most of the error, at W4A4: "
    )
    assert f"{claim}open: 0 of 3 seeds." in said()
    assert f"{claim}open: 2 of 3 seeds." in said(0.3, 0.3)
    assert f"{claim}holds." in said(0.6, 0.7, 0.8)
    assert f"{claim}**the opposite holds**." in said(0.3, 0.4, 0.3)
    listed = (
        "seed 1: conv_in/conv_out 60.0%, QuEST's sensitive layers 30.0%, QuEST's temporal "
        "layers 10.0%. `--layers auto` trains"
    )
    assert listed in said(0.3, 0.4, 0.3)


@pytest.mark.parametrize(
    ("quest", "others", "word"),
    [
        ((0.6, 0.7, 0.8), (0.9, 1.0, 1.1), "holds"),
        ((0.6, 0.7, 0.8), (0.75, 1.0, 1.1), "on average only"),
        ((0.6, 0.7, 1.8), (0.75, 1.0, 1.1), "**not on average**"),
        ((1.2, 1.3, 1.4), (0.9, 1.0, 1.1), "**the opposite holds**"),
    ],
)
def test_a_claim_holds_only_where_every_pair_of_seeds_says_so(
    result: MakeResult,
    quest: tuple[float, float, float],
    others: tuple[float, float, float],
    word: str,
) -> None:
    claim = "A scale for each timestep bucket beats one for all"
    assert verdicts({"quest": quest, "quest-k1": others}, result)[claim] == (word, word)


def test_nothing_is_concluded_from_rows_that_are_not_computed(result: MakeResult) -> None:
    found = verdicts({"quest": (0.6, 0.7, 0.8)}, result)
    assert set(found.values()) <= {
        ("open: 0 of 3 seeds", "open: 0 of 3 seeds"),
        ("so judged", "so judged"),
        ("---:", "---:"),
    }
    found = verdicts(
        {"quest": (0.6, 0.7, 0.8)},
        result,
        nothing() | {Cell("quest-k1", "w4a4", 0): result(QUEST[0], 0.9)},
    )
    assert found["A scale for each timestep bucket beats one for all"][0] == "open: 1 of 3 seeds"
