"""`python -m scripts.bench.methods`, with workers that are stubs but for one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Protocol

import pytest

from quest_deploy.files import read_json
from scripts.bench.methods import __main__ as program
from scripts.bench.methods import recipes, runner
from scripts.bench.methods.cells import Cell, all_cells
from tests.quest_deploy.support import Outcome, snapshot
from tests.scripts.bench.methods.conftest import measurement


class Compare(Protocol):
    """Runs the program with these arguments, its cells, its table and its plot in one folder."""

    def __call__(self, *arguments: str) -> Outcome: ...


PAGES = ("README.md", "table.md", "plot.png")
STUB = f"import json; print(json.dumps({measurement()!r}))"
FEW = """
import sys
from scripts.bench.methods import worker
from scripts.bench.methods.model import ComparedModel
ComparedModel.load_as_is = ComparedModel.load
def load(name):
    model = ComparedModel.load_as_is(name)
    model.calibration_samples, model.evaluation_images = 4, 6
    return model
ComparedModel.load, worker.HELD_OUT_SAMPLES = load, 2
worker.main(sys.argv[1:])
"""


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    def run(*arguments: str) -> Outcome:
        folders = [
            *("--cells", str(tmp_path / "cells"), "--shared", str(tmp_path / "shared")),
            *("--docs", str(tmp_path)),
        ]
        with pytest.raises(SystemExit) as ended:
            program.main([*folders, *arguments])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, out, err)

    return run


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the cells that were computed, by stubs."""
    names: list[str] = []

    def command(model: str, cell: Cell, store: Path, threads: int) -> list[str]:
        names.append(cell.name if model == "emoji" else f"{model} {cell.name}")
        return [sys.executable, "-S", "-c", STUB]

    monkeypatch.setattr(runner, "worker_command", command)
    return names


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing: it takes seconds."""
    monkeypatch.setattr(program, "plot", lambda *_: None)


@pytest.mark.slow
def test_one_cell_for_real_from_the_command_to_the_table(
    compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = runner.worker_command
    monkeypatch.setattr(
        runner, "worker_command", lambda *given: [sys.executable, "-c", FEW, *command(*given)[3:]]
    )
    ended = compare("--only", "w8a8-ptq-minmax-seed0", "--json")
    assert ended.code == 0, ended.err
    cell = ended.json["cells"]["w8a8-ptq-minmax-seed0"]
    assert cell["environment"]["threads"] == 1
    assert cell["process_seconds"] > sum(cell["cpu_seconds"].values()) > 0
    assert (
        read_json(tmp_path / "cells" / "w8a8-ptq-minmax-seed0.json")["quality"] == cell["quality"]
    )
    assert (
        f"{cell['quality']['frechet_distance']:.2f}, not computed, not computed"
        in (tmp_path / "table.md").read_text()
    )
    assert (
        f"**1 of {len(all_cells())} cells are computed.**" in (tmp_path / "README.md").read_text()
    )
    assert (tmp_path / "plot.png").exists()


def test_only_what_is_missing_is_computed(
    compare: Compare, no_plot: None, tmp_path: Path, computed: list[str]
) -> None:
    assert compare("--only", "*-ptq-minmax-seed1").code == 0
    assert computed == [f"{bits}-ptq-minmax-seed1" for bits in ("w8a8", "w4a8", "w4a4")]
    computed.clear()
    ended = compare("--only", "w4a4-ptq-minmax-*", "--only", "fp32-fp32-seed*")
    assert ended.code == 0
    assert computed == ["fp32-fp32-seed0", "w4a4-ptq-minmax-seed0", "w4a4-ptq-minmax-seed2"]
    assert "6 of" in ended.out


def test_a_second_run_computes_nothing_and_writes_the_same_files(
    compare: Compare, tmp_path: Path, computed: list[str]
) -> None:
    only = ("--only", "fp32-fp32-seed*")
    assert compare(*only).code == 0
    pages = {name: (tmp_path / name).read_bytes() for name in PAGES}
    computed.clear()
    ended = compare(*only)
    assert (ended.code, computed) == (0, [])
    assert {name: (tmp_path / name).read_bytes() for name in PAGES} == pages


def test_a_cell_whose_definition_changed_is_not_shown_and_computed_again(
    compare: Compare,
    no_plot: None,
    tmp_path: Path,
    computed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert compare("--only", "fp32-fp32-seed*").code == 0
    monkeypatch.setattr(recipes, "REVISION", 999)
    assert "fp32-fp32-seed0: not computed" in compare("--list").out
    computed.clear()
    assert compare("--only", "fp32-fp32-seed*").code == 0
    assert computed == ["fp32-fp32-seed0"]
    assert "fp32-fp32-seed0: computed" in compare("--list").out


def test_list_names_every_cell_and_writes_nothing(
    compare: Compare, tmp_path: Path, computed: list[str]
) -> None:
    ended = compare("--list", "--json")
    assert ended.json == {"cells": {cell.name: False for cell in all_cells()}}
    assert (computed, snapshot(tmp_path)) == ([], {})


def test_the_pages_are_written_without_computing_a_cell(
    compare: Compare, tmp_path: Path, computed: list[str]
) -> None:
    ended = compare("--pages")
    assert (ended.code, computed) == (0, [])
    assert {path.name for path in tmp_path.iterdir()} == set(PAGES)
    assert (
        f"**0 of {len(all_cells())} cells are computed.**" in (tmp_path / "README.md").read_text()
    )


def test_other_seeds_are_other_cells_and_stand_in_the_command(
    compare: Compare, no_plot: None, tmp_path: Path, computed: list[str]
) -> None:
    assert compare("--seeds", "7,5", "--only", "w4a4-ptq-minmax-*").code == 0
    assert computed == ["w4a4-ptq-minmax-seed7", "w4a4-ptq-minmax-seed5"]
    assert "`python -m scripts.bench.methods --seeds 7,5`" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_the_cells_of_a_transformer_stand_apart_with_a_page_of_their_own(
    compare: Compare, small_dit: str, tmp_path: Path, computed: list[str]
) -> None:
    assert compare("--pages").code == 0
    page = (tmp_path / "README.md").read_text()
    ended = compare("--model", small_dit, "--only", "w4a4-quest-seed*")
    assert ended.code == 0, ended.err
    assert computed == [f"{small_dit} w4a4-quest-seed{seed}" for seed in range(3)]
    assert (tmp_path / "README.md").read_text() == page
    own = (tmp_path / f"{small_dit}.md").read_text()
    assert f"3 of {len(all_cells(model=small_dit))} cells" in own
    assert f"`python -m scripts.bench.methods --model {small_dit}`" in own
    assert "Q-Diffusion" not in own
    assert compare("--pages").code == 0
    assert f"({small_dit}.md)" in (tmp_path / "README.md").read_text()


def test_what_failed_is_reported_after_the_table_was_written(
    compare: Compare,
    no_plot: None,
    tmp_path: Path,
    computed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing = (
        "import json; print(json.dumps({'error': 'w8a8-nncf-seed0 needs nncf', 'exit_code': 2}))"
    )

    def command(model: str, cell: Cell, store: Path, threads: int) -> list[str]:
        return [sys.executable, "-S", "-c", failing if cell.row == "nncf" else STUB]

    monkeypatch.setattr(runner, "worker_command", command)
    ended = compare("--only", "w8a8-nncf-seed0", "--only", "w8a8-ptq-seed0")
    ended.assert_refused("1 of 2", "w8a8-nncf-seed0 needs nncf")
    assert (tmp_path / "cells" / "w8a8-ptq-seed0.json").exists()
    assert "1.00 (1.00, not computed, not computed)" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--only", "w2a2-*"], "w2a2-* --list"),
        (["--seeds", "one"], "seeds 'one'"),
        (["--model", "sd15"], "--model sd15 emoji emoji-dit"),
        (["--seeds", "1,1"], "seeds '1,1'"),
    ],
)
def test_bad_choices_are_refused_before_anything_is_written(
    compare: Compare, tmp_path: Path, computed: list[str], arguments: list[str], facts: str
) -> None:
    compare(*arguments).assert_refused(*facts.split())
    assert (computed, snapshot(tmp_path)) == ([], {})
