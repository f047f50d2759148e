from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from scripts.bench.methods.cells import (
    ABLATIONS,
    MAIN_TABLES,
    PAPER_SENSITIVE,
    PAPER_TEMPORAL,
    Cell,
    all_cells,
    cells_of,
)
from scripts.bench.methods.claims import AIM_TEXT
from scripts.bench.methods.plot import plot
from scripts.bench.methods.report import everything, markdown
from tests.quest_deploy.support import strict_json

if TYPE_CHECKING:
    from pathlib import Path

    from scripts.bench.methods.results import Result
    from tests.scripts.bench.methods.conftest import MakeResult

COMMAND = "python -m scripts.bench.methods"
QUEST = [Cell("quest", "w4a4", seed) for seed in (0, 1, 2)]


def lines(results: dict[Cell, Result | None], title: str) -> dict[str, list[str]]:
    """The cells of the table under ``title``, by their row's label."""
    section = (
        markdown("tiny", COMMAND, results, [0, 1, 2]).split(f"## {title}\n")[1].split("\n## ")[0]
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows}


def nothing(**known: Any) -> dict[Cell, Result | None]:
    return dict.fromkeys(all_cells(), None)


def test_a_row_shows_the_mean_and_every_seeds_value(result: MakeResult) -> None:
    found = nothing() | {
        cell: result(cell, distance) for cell, distance in zip(QUEST, (0.5, 0.75, 1.0), strict=True)
    }
    assert lines(found, "W4A4")["QuEST"] == [
        "folded channel, 20",
        "float",
        "0.75 (0.50, 0.75, 1.00)",
        "90.0 (90.0, 90.0, 90.0)",
        "0.0100 (0.0100, 0.0100, 0.0100)",
        "0.0010",
        "0.0300",
        "0.5000",
        "15",
        "700 MB",
    ]


def test_a_baseline_is_shown_in_every_table_that_has_it(result: MakeResult) -> None:
    found = nothing() | {QUEST[0]: result(QUEST[0], 0.123)}
    shown = markdown("tiny", COMMAND, found, [0, 1, 2]).count("| 0.12 (0.12, not run, not run) |")
    assert shown == sum("quest" in table.rows for table in ABLATIONS) + 1


def test_what_was_not_run_is_said_to_be_not_run(result: MakeResult) -> None:
    rows = lines(nothing(), "W8A8")
    assert {cells[0] for label, cells in rows.items() if label not in ("method", "---")} == {
        "not run"
    }
    assert (
        f"0 of {len(all_cells())} cells are measured; {len(all_cells())} are not run."
        in markdown("tiny", COMMAND, nothing(), [0, 1, 2])
    )


def test_a_method_that_does_not_exist_at_some_bits_says_why(result: MakeResult) -> None:
    assert (
        lines(nothing(), "W4A4")["PTQ, modelopt INT8"][0]
        == "\N{EN DASH} (modelopt's integer configurations are W8A8)"
    )


def test_a_cell_that_took_too_long_is_named(result: MakeResult) -> None:
    slow = dataclasses.replace(result(QUEST[0]), wall_seconds=301.0)
    text = markdown(
        "tiny", COMMAND, nothing() | {QUEST[0]: slow, QUEST[1]: result(QUEST[1])}, [0, 1, 2]
    )
    assert "took more than 5 minutes, judging included: w4a4-quest-seed0.\n" in text


def test_the_bits_of_the_attention_products_are_stated(result: MakeResult) -> None:
    cell = Cell("quest-attention4", "w4a4", 0)
    rows = lines(nothing() | {cell: result(cell)}, "W4A4 ablation: Bits of the attention products")
    assert rows["q, k, v at 4, softmax at 8"][1] == "4 / 8"


def test_the_error_of_every_bucket_is_shown_from_the_noisiest(result: MakeResult) -> None:
    rows = lines(nothing() | {QUEST[0]: result(QUEST[0])}, "ε-MSE per timestep bucket, W4A4")
    assert list(rows)[2] == "950 ≤ t < 1000"
    assert rows["0 ≤ t < 50"] == ["0.50000"]
    assert len(rows) == 2 + 20


def test_the_table_names_the_command_and_the_environment(result: MakeResult) -> None:
    text = markdown("tiny", COMMAND, nothing() | {QUEST[0]: result(QUEST[0])}, [0, 1, 2])
    assert f"`{COMMAND}`" in text
    assert "a CPU, 1 thread, Python 3.11.7, torch 2.13.0" in text


def test_the_json_holds_every_table_and_every_cell(result: MakeResult) -> None:
    value = strict_json(
        json.dumps(
            everything("tiny", COMMAND, nothing() | {QUEST[0]: result(QUEST[0], 0.5)}, [0, 1, 2])
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


def test_how_many_layers_modelopt_left_in_float_is_stated(result: MakeResult) -> None:
    cell = Cell("modelopt", "w8a8", 0)
    found = nothing() | {cell: result(cell, notes={"layers": 132, "quantized_layers": 125})}
    assert lines(found, "W8A8")["PTQ, modelopt INT8"][0] == "its own, 1 (125 of 132 layers)"


def verdicts(
    distances: dict[str, tuple[float, float, float]],
    result: MakeResult,
    others: dict[Cell, Result | None] | None = None,
) -> dict[str, str]:
    """What the claims' section says when rows at W4A4 have these distances."""
    found = dict(others or nothing())
    for row, values in distances.items():
        found |= {
            cell: result(cell, value)
            for cell, value in zip(cells_of(row, "w4a4", (0, 1, 2)), values, strict=True)
        }
    return {
        label: cells[-1]
        for label, cells in lines(found, "The papers' claims on this model").items()
    }


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
        return markdown("tiny", COMMAND, found, [0, 1, 2])

    claim = (
        "QuEST's claim that its temporal and its sensitive layers make most of the error, at W4A4: "
    )
    assert f"{claim}open: 0 of 3 seeds." in said()
    assert f"{claim}open: 2 of 3 seeds." in said(0.3, 0.3)
    assert f"{claim}holds." in said(0.6, 0.7, 0.8)
    assert f"{claim}**does not hold: the opposite does**." in said(0.3, 0.4, 0.3)
    listed = (
        "seed 1: conv_in/conv_out 60.0%, QuEST's sensitive layers 30.0%, QuEST's temporal "
        "layers 10.0%. `--layers auto` trains"
    )
    assert listed in said(0.3, 0.4, 0.3)


def test_a_claim_holds_only_where_every_pair_of_seeds_says_so(result: MakeResult) -> None:
    claim = "A scale for each timestep bucket beats one for all"
    assert (
        verdicts({"quest": (0.6, 0.7, 0.8), "quest-k1": (0.9, 1.0, 1.1)}, result)[claim] == "holds"
    )
    assert (
        verdicts({"quest": (0.6, 0.7, 0.8), "quest-k1": (0.75, 1.0, 1.1)}, result)[claim]
        == "on average only"
    )
    assert (
        verdicts({"quest": (0.6, 0.7, 1.8), "quest-k1": (0.75, 1.0, 1.1)}, result)[claim]
        == "**does not hold on average**"
    )
    assert verdicts({"quest": (1.2, 1.3, 1.4), "quest-k1": (0.9, 1.0, 1.1)}, result)[
        claim
    ].startswith("**does not hold: the opp")


def test_nothing_is_concluded_from_rows_that_are_not_run(result: MakeResult) -> None:
    found = verdicts({"quest": (0.6, 0.7, 0.8)}, result)
    assert found.pop(AIM_TEXT) == "reached"
    assert set(found.values()) <= {"open: 0 of 3 seeds", "on this model", "---:"}
    found = verdicts(
        {"quest": (0.6, 0.7, 0.8)},
        result,
        nothing() | {Cell("quest-k1", "w4a4", 0): result(QUEST[0], 0.9)},
    )
    assert found["A scale for each timestep bucket beats one for all"] == "open: 1 of 3 seeds"


def test_an_aim_that_is_missed_is_said_to_be_missed(result: MakeResult) -> None:
    assert verdicts({"quest": (0.6, 0.7, 1.9)}, result)[AIM_TEXT] == "**missed**"
