from __future__ import annotations

import json
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest
import typer

from scripts.bench import measure_stages as script
from tests.helpers import refused

STAGES = {
    "calibrate": {"seconds": 20.0, "cpu_seconds": 30.0, "peak_gib": 1.0},
    "step": {"seconds": 9.0, "cpu_seconds": 9.0, "step_cpu_seconds": 0.5, "peak_gib": 0.5},
}


def entry(weights: int, times: float, **stages: dict[str, float]) -> dict[str, Any]:
    grown = {
        name: {key: value * times for key, value in cost.items()} for name, cost in stages.items()
    }
    return {
        "processor": "a processor",
        "date": "2026-11-30",
        "versions": {},
        "weights": weights,
        "stages": grown,
    }


def test_the_table_has_each_cost_and_the_power_of_the_weights_that_it_grows_with() -> None:
    results = {
        "tiny": entry(10**7, 1, **STAGES),
        "sd15": entry(10**8, 100, calibrate=STAGES["calibrate"]),
    }
    page = script.table(results, {"latents": 32, "buckets": 20, "method": "minmax"})
    assert "| calibrate | 30.0 / 1.00 | 3000.0 / 100.00 | 2.00 / 2.00 |" in page
    assert "| step | 0.5 / 0.50 | not measured |" in page


def test_an_interrupted_measurement_goes_on_with_the_next_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def cost_of(*command: str) -> dict[str, float]:
        ran.append(next(name for name in ("calibrate", "export", "-c") if name in command))
        if ran == ["calibrate", "export"]:
            raise CalledProcessError(1, command)
        return STAGES["calibrate"]

    stages = {"calibrate": ["calibrate"], "export": ["export"], "step": ["-c"]}
    monkeypatch.setattr(script, "commands", lambda *arguments: stages)
    monkeypatch.setattr(script, "weights_of", lambda workspace: 10**7)
    monkeypatch.setattr(script, "cost_of", cost_of)
    choices: dict[str, Any] = {
        "size": ["tiny"],
        "folder": tmp_path / "ws",
        "docs": tmp_path / "docs",
        "kept": tmp_path / "stages.json",
    }
    with pytest.raises(CalledProcessError):
        script.main(**choices)
    script.main(**choices)
    assert ran == ["calibrate", "export", "export", "-c"]
    assert json.loads(choices["kept"].read_text())["sizes"]["tiny"]["stages"].keys() == {*stages}
    assert (tmp_path / "docs" / "table.md").exists()
    assert (tmp_path / "docs" / "cost.svg").read_text().count("<svg") == 1
    with refused(choices["kept"], "latents", error=typer.BadParameter):
        script.main(**choices, latents=64)


def test_a_narrower_model_has_its_architectures_configurations_but_for_widths_and_size(
    tmp_path: Path,
) -> None:
    folder = script.model_folder(script.SIZES["tiny"], tmp_path / "model", 16)
    config = json.loads((folder / "unet" / "config.json").read_text())
    assert config["sample_size"] == 16
    assert config["block_out_channels"] == [64, 128, 256, 256]
    assert config["cross_attention_dim"] == 768
    assert (folder / "model_index.json").exists()
