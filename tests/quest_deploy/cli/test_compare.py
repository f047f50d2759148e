"""`quest-deploy compare`, with workers that are stubs but for one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from quest_deploy.compare import campaign
from quest_deploy.compare.cells import Cell, all_cells
from quest_deploy.files import read_json
from tests.quest_deploy.compare.conftest import measurement
from tests.quest_deploy.support import cli, snapshot

if TYPE_CHECKING:
    from pathlib import Path

STUB = f"import json; print(json.dumps({measurement()!r}))"
FEW = """
import sys
from quest_deploy.evaluation.quality import SamplingOptions
from quest_deploy.models.tiny import TinyModel
TinyModel.calibration_samples = 8
SamplingOptions.__init__.__defaults__ = (10, 4, *SamplingOptions.__init__.__defaults__[2:])
from quest_deploy.compare.worker import main
main(sys.argv[1:])
"""


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the cells that were computed, by stubs."""
    names: list[str] = []

    def command(model: str, cell: Cell, scratch: Path, threads: int) -> list[str]:
        names.append(cell.name)
        return [sys.executable, "-S", "-c", STUB]

    monkeypatch.setattr(campaign, "worker_command", command)
    return names


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing: it takes seconds."""
    monkeypatch.setattr("quest_deploy.compare.plot.plot", lambda *_: None)


@pytest.mark.slow
def test_one_cell_for_real_from_the_command_to_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = campaign.worker_command
    monkeypatch.setattr(
        campaign, "worker_command", lambda *given: [sys.executable, "-c", FEW, *command(*given)[3:]]
    )
    ended = cli("compare", "--folder", tmp_path, "--only", "w8a8-ptq-minmax-seed0", "--json")
    assert ended.code == 0, ended.err
    cell = ended.json["cells"]["w8a8-ptq-minmax-seed0"]
    assert cell["environment"]["threads"] == 1
    assert cell["wall_seconds"] > sum(cell["seconds"].values()) > 0
    assert (
        read_json(tmp_path / "cells" / "w8a8-ptq-minmax-seed0.json")["quality"] == cell["quality"]
    )
    assert (
        f"{cell['quality']['frechet_distance']:.2f}, not run, not run"
        in (tmp_path / "table.md").read_text()
    )
    assert (tmp_path / "plot.png").exists()


def test_only_what_is_missing_is_computed(
    no_plot: None, tmp_path: Path, computed: list[str]
) -> None:
    assert cli("compare", "--folder", tmp_path, "--only", "*-ptq-minmax-seed1").code == 0
    assert computed == [f"{bits}-ptq-minmax-seed1" for bits in ("w8a8", "w4a8", "w4a4")]
    computed.clear()
    ended = cli("compare", "--folder", tmp_path, "--only", "w4a4-ptq-minmax-*", "--only", "fp32-*")
    assert ended.code == 0
    assert computed == ["fp32-fp32-seed0", "w4a4-ptq-minmax-seed0", "w4a4-ptq-minmax-seed2"]
    assert "6 of" in ended.out


def test_a_second_run_computes_nothing_and_writes_the_same_files(
    tmp_path: Path, computed: list[str]
) -> None:
    only = ("compare", "--folder", tmp_path, "--only", "fp32-*")
    assert cli(*only).code == 0
    table, picture = (tmp_path / "table.md").read_bytes(), (tmp_path / "plot.png").read_bytes()
    computed.clear()
    ended = cli(*only)
    assert (ended.code, computed) == (0, [])
    assert "nothing to compute" in ended.out
    assert ((tmp_path / "table.md").read_bytes(), (tmp_path / "plot.png").read_bytes()) == (
        table,
        picture,
    )


def test_a_cell_whose_definition_changed_is_not_shown_and_computed_again(
    no_plot: None, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("compare", "--folder", tmp_path, "--only", "fp32-*").code == 0
    monkeypatch.setattr("quest_deploy.compare.methods.REVISION", 999)
    assert "fp32-fp32-seed0: not run" in cli("compare", "--folder", tmp_path, "--list").out
    computed.clear()
    assert cli("compare", "--folder", tmp_path, "--only", "fp32-*").code == 0
    assert computed == ["fp32-fp32-seed0"]
    assert "fp32-fp32-seed0: measured" in cli("compare", "--folder", tmp_path, "--list").out


def test_list_names_every_cell_and_writes_nothing(tmp_path: Path, computed: list[str]) -> None:
    ended = cli("compare", "--folder", tmp_path, "--list", "--json")
    assert ended.json == {"cells": {cell.name: False for cell in all_cells()}}
    assert (computed, snapshot(tmp_path)) == ([], {})


def test_other_seeds_are_other_cells_and_stand_in_the_command(
    no_plot: None, tmp_path: Path, computed: list[str]
) -> None:
    assert (
        cli("compare", "--folder", tmp_path, "--seeds", "7,5", "--only", "w4a4-ptq-minmax-*").code
        == 0
    )
    assert computed == ["w4a4-ptq-minmax-seed7", "w4a4-ptq-minmax-seed5"]
    assert "`quest-deploy compare --model tiny --seeds 7,5`" in (tmp_path / "table.md").read_text()


def test_what_failed_is_reported_after_the_table_was_written(
    no_plot: None, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = (
        "import json; print(json.dumps({'error': 'w8a8-modelopt-seed0 needs "
        "nvidia-modelopt', 'exit_code': 2}))"
    )

    def command(model: str, cell: Cell, scratch: Path, threads: int) -> list[str]:
        return [sys.executable, "-S", "-c", failing if cell.row == "modelopt" else STUB]

    monkeypatch.setattr(campaign, "worker_command", command)
    ended = cli("compare", "--folder", tmp_path, "--only", "w8a8-*modelopt*-seed0")
    assert ended.code == 2
    assert ended.message == "1 of 2 cells failed: w8a8-modelopt-seed0 needs nvidia-modelopt"
    assert (tmp_path / "cells" / "w8a8-modelopt-smoothquant-seed0.json").exists()
    assert "1.00 (1.00, not run, not run)" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "w2a2-*"], "no cell matches w2a2-*"),
        (["--seeds", "one"], "expected seeds such as 0,1,2, not 'one'"),
        (["--seeds", "1,1"], "expected different seeds of 0 or more, not '1,1'"),
        (["--model", "sd99"], "unknown model 'sd99'"),
    ],
)
def test_bad_choices_are_refused_before_anything_is_written(
    tmp_path: Path, computed: list[str], arguments: list[str], message: str
) -> None:
    ended = cli("compare", "--folder", tmp_path, *arguments)
    assert ended.code == 2
    assert message in ended.message
    assert (computed, snapshot(tmp_path)) == ([], {})
