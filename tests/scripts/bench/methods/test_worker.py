"""One cell measured for real, on few samples and images."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from quest_deploy.errors import InputError
from quest_deploy.evaluation.quality import SamplingOptions
from scripts.bench.methods import recipes, worker
from scripts.bench.methods.cells import PAPER_SENSITIVE, PAPER_TEMPORAL, ROWS, Cell, ModelOpt
from scripts.bench.methods.worker import main, measure
from tests.helpers import assert_holds

if TYPE_CHECKING:
    from pathlib import Path

    from scripts.bench.methods.digits.model import DigitsModel


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight samplings to calibrate on, ten images to judge."""
    monkeypatch.setattr(recipes, "SAMPLES", 8)
    monkeypatch.setattr(worker, "JUDGED_SAMPLING", SamplingOptions(images=10, steps=4))


def silent(phase: str, done: int, total: int, detail: str = "") -> None:
    pass


def test_the_float_model_differs_from_itself_in_nothing_and_costs_nothing(
    digits: DigitsModel, tmp_path: Path
) -> None:
    measured = measure(digits, Cell("fp32", "fp32", 0), tmp_path, silent)
    assert measured["quality"]["pixel_mse"] == 0
    assert measured["quality"]["epsilon_mse"] == [0.0] * 20
    assert measured["seconds"] == {}


def test_a_cells_own_buckets_do_not_change_the_buckets_it_is_judged_by(
    mini_digits: None, digits: DigitsModel, tmp_path: Path
) -> None:
    measured = measure(digits, Cell("ptq-minmax", "w4a4", 0), tmp_path, silent)
    errors = measured["quality"]["epsilon_mse"]
    assert len(errors) == 20
    assert all(error > 0 for error in errors)
    assert (
        set(measured["seconds"])
        == set(measured["peak_memory_bytes"])
        == {"trajectories", "calibration"}
    )
    assert all(100e6 < peak < 10e9 for peak in measured["peak_memory_bytes"].values())


@pytest.mark.slow
def test_seeds_give_different_models_and_a_seed_the_same_one_again(
    mini_digits: None, digits: DigitsModel, tmp_path: Path
) -> None:
    distances = [
        measure(digits, Cell("ptq-minmax", "w4a4", seed), tmp_path, silent)["quality"]["pixel_mse"]
        for seed in (0, 1, 0)
    ]
    assert distances[0] == distances[2] != distances[1]


def test_the_worker_sends_progress_and_a_result_and_nothing_else(
    mini_digits: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["ptq-minmax", "w8a8", "0", str(tmp_path), "1"])
    *progress, result = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert {tuple(value) for value in progress} == {("phase", "done", "total")}
    assert "drawing" in {value["phase"] for value in progress}
    assert result["environment"]["threads"] == 1
    assert "torch" in result["environment"]


def test_a_missing_package_is_the_users_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    main(["modelopt", "w8a8", "0", str(tmp_path), "1"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["exit_code"] == InputError.exit_code
    assert_holds(last["error"], "pip install -c constraints.txt '.[modelopt]'")


@pytest.mark.parametrize(
    "row", [key for key, row in ROWS.items() if isinstance(row.recipe, ModelOpt)]
)
def test_modelopt_quantizes_nearly_every_layer_to_eight_bits(
    digits: DigitsModel, tmp_path: Path, row: str
) -> None:
    pytest.importorskip("modelopt.torch.quantization", reason="the modelopt extra is not installed")
    measured: dict[str, Any] = measure(digits, Cell(row, "w8a8", 0), tmp_path, silent)
    # Its configurations leave out layers called proj_out, as they ship.
    assert measured["notes"] == {"layers": 132, "quantized_layers": 125}
    assert 0 < measured["quality"]["pixel_mse"] < 0.01


def test_shares_of_the_error_are_added_up_by_the_papers_sets_and_else_by_kind() -> None:
    shares = {
        "a.time_emb_proj": 0.125,
        "a.ff.net.2": 0.25,
        "a.attn1.to_q": 0.125,
        "a.attn1.to_out.0": 0.25,
        "conv_in": 0.25,
    }
    assert recipes.paper_shares(shares, "class-conditional") == {
        PAPER_TEMPORAL: 0.125,
        PAPER_SENSITIVE: 0.375,
        "attn1.to_out": 0.25,
        "conv_in/conv_out": 0.25,
    }


def test_every_revision_is_part_of_the_definition(
    digits: DigitsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = recipes.definition_of(Cell("fp32", "fp32", 0), digits)
    monkeypatch.setattr(recipes, "REVISION", recipes.REVISION + 1)
    assert recipes.definition_of(Cell("fp32", "fp32", 0), digits) != before
