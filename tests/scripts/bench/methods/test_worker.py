"""Cells measured for real, on few samples and images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.errors import InputError
from scripts.bench.methods import recipes, worker
from scripts.bench.methods.cells import PAPER_SENSITIVE, PAPER_TEMPORAL, Cell
from scripts.bench.methods.model import ComparedModel
from scripts.bench.methods.worker import main, measure
from tests.helpers import assert_holds


def silent(phase: str, done: int, total: int, detail: str = "") -> None:
    pass


def test_the_float_model_differs_from_itself_in_nothing_and_costs_nothing(
    mini_emoji: None, few: ComparedModel, tmp_path: Path
) -> None:
    measured = measure(few, Cell("fp32", "fp32", 0), tmp_path, silent)
    assert measured["quality"]["pixel_mse"] == 0
    assert measured["quality"]["epsilon_mse"] == [0.0] * 20
    assert measured["cpu_seconds"] == {}
    redrawn = measure(few, Cell("fp32-redrawn", "fp32", 0), tmp_path, silent)
    assert redrawn["quality"]["pixel_mse"] > 0
    assert redrawn["quality"]["epsilon_mse"] == [0.0] * 20


def test_what_cells_share_is_made_once_and_counted_for_both(
    mini_emoji: None, few: ComparedModel, tmp_path: Path
) -> None:
    first = measure(few, Cell("ptq", "w4a4", 0), tmp_path, silent)
    made = sorted(path.name for path in tmp_path.iterdir())
    second = measure(few, Cell("quest", "w4a4", 0), tmp_path, silent)
    assert {name.split("-")[0] for name in set(made)} == {"trajectories", "checkpoint", "images"}
    added = {path.name for path in tmp_path.iterdir()} - set(made)
    assert {name.split("-")[0] for name in added} == {"checkpoint"}
    assert second["cpu_seconds"] == {
        **first["cpu_seconds"],
        "finetuning": second["cpu_seconds"]["finetuning"],
    }
    assert second["quality"]["psnr"] != first["quality"]["psnr"]
    assert second["payload_bytes"] == first["payload_bytes"]


def test_a_cells_own_buckets_do_not_change_the_buckets_it_is_judged_by(
    mini_emoji: None, few: ComparedModel, tmp_path: Path
) -> None:
    measured = measure(few, Cell("ptq-minmax", "w4a4", 0), tmp_path, silent)
    errors = measured["quality"]["epsilon_mse"]
    assert len(errors) == 20
    assert all(error > 0 for error in errors)


@pytest.mark.parametrize("row", ["quest-low-rank", "quest-attention4-rotated", "qdiff"])
@pytest.mark.slow
def test_every_kind_of_recipe_makes_a_model(
    mini_emoji: None, few: ComparedModel, tmp_path: Path, row: str
) -> None:
    measured = measure(few, Cell(row, "w4a4", 0), tmp_path, silent)
    plain = measure(few, Cell("ptq", "w4a4", 0), tmp_path, silent)
    assert measured["quality"]["psnr"] != plain["quality"]["psnr"]
    if row == "quest-low-rank":
        assert measured["payload_bytes"] > plain["payload_bytes"]
        assert measured["notes"]["sensitive_layers"]


@pytest.mark.slow
def test_a_model_for_few_uneven_steps_has_a_bucket_for_each_and_is_judged_on_them(
    mini_emoji: None, few: ComparedModel, tmp_path: Path
) -> None:
    measured = measure(few, Cell("quantiles8-8-steps", "w4a4", 0), tmp_path, silent)
    visited = [i for i, x in enumerate(measured["quality"]["epsilon_mse"]) if x is not None]
    assert visited == [0, 1, 5, 10, 14, 17, 19]


@pytest.mark.slow
def test_seeds_give_different_models_and_a_seed_the_same_one_again(
    mini_emoji: None, few: ComparedModel, tmp_path: Path
) -> None:
    errors = [
        measure(few, Cell("ptq-minmax", "w4a4", seed), tmp_path / str(i), silent)["quality"]
        for i, seed in enumerate((0, 1, 0))
    ]
    assert errors[0] == errors[2] != errors[1]


def test_the_worker_sends_progress_and_a_result_and_nothing_else(
    mini_emoji: None,
    few: ComparedModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ComparedModel, "load", lambda name: few)
    main(["emoji", "ptq-minmax", "w8a8", "0", str(tmp_path), "1"])
    *progress, result = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert {tuple(value) for value in progress} == {("phase", "done", "total")}
    assert "drawing" in {value["phase"] for value in progress}
    assert result["environment"]["threads"] == 1
    assert "torch" in result["environment"]


@pytest.mark.parametrize(
    ("row", "bits", "module", "extra"),
    [("modelopt", "w8a8", "modelopt", "modelopt"), ("nncf", "w8a8", "nncf", "bench")],
)
def test_a_missing_package_is_the_users_to_install(
    mini_emoji: None,
    few: ComparedModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    row: str,
    bits: str,
    module: str,
    extra: str,
) -> None:
    monkeypatch.setattr(ComparedModel, "load", lambda name: few)
    monkeypatch.setitem(sys.modules, module, None)
    main(["emoji", row, bits, "0", str(tmp_path), "1"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["exit_code"] == InputError.exit_code
    assert_holds(last["error"], f"pip install -c constraints.txt '.[{extra}]'")


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.slow
def test_modelopt_quantizes_nearly_every_layer_to_the_bits_of_its_cell(
    few: ComparedModel, tmp_path: Path, bits: str
) -> None:
    pytest.importorskip("modelopt.torch.quantization", reason="the modelopt extra is not installed")
    measured: dict[str, Any] = measure(few, Cell("modelopt", bits, 0), tmp_path, silent)
    # Its configurations leave out layers called proj_out, as they ship.
    assert measured["notes"] == {"layers": 132, "quantized_layers": 125}
    assert (measured["quality"]["psnr"] > 20) == (bits == "w8a8")
    assert (measured["payload_bytes"] > 3_800_000) == (bits == "w8a8")


@pytest.mark.slow
def test_nncfs_model_runs_through_the_same_loop(
    mini_emoji: None, few: ComparedModel, tmp_path: Path
) -> None:
    pytest.importorskip("nncf", reason="the bench extra is not installed")
    measured = measure(few, Cell("nncf", "w8a8", 0), tmp_path, silent)
    parameters = sum(p.numel() for p in few.load_unet().parameters())
    assert measured["notes"]["quantized_tensors"] > 10
    assert measured["quality"]["psnr"] > 15
    assert parameters < measured["payload_bytes"] < 2 * parameters


@pytest.mark.parametrize("row", ["quest-auto-layers", "nncf", "modelopt"])
@pytest.mark.slow
def test_a_transformer_of_flow_matching_is_measured_as_a_unet_is(
    small_dit: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, row: str
) -> None:
    if row in ("nncf", "modelopt"):
        pytest.importorskip(row, reason="its extra is not installed")
    monkeypatch.setattr(worker, "HELD_OUT_SAMPLES", 1)
    model = ComparedModel.load(small_dit)
    model.calibration_samples, model.evaluation_images = 4, 6
    bits = "w8a8" if row == "nncf" else "w4a4"
    measured = measure(model, Cell(row, bits, 0), tmp_path, silent)
    assert 0 < measured["quality"]["psnr"] < 100
    visited = [x is not None for x in measured["quality"]["epsilon_mse"]]
    assert visited[-1]
    assert not all(visited)  # the shift leaves equally wide buckets near the images out
    if row == "quest-auto-layers":
        assert measured["notes"]["error_shares"][PAPER_SENSITIVE] > 0.5
        assert measured["notes"]["error_shares"][PAPER_TEMPORAL] == 0  # in float


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
