from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import bench_sd15 as script
from tests.helpers import refused

TENSORRT = {
    "whole": {
        "seconds": 50.4,
        "processor_seconds": 61.0,
        "peak_gib": 3.5,
        "engine_bytes": 1_800_000_000,
    }
}
PRECISION = {
    "int8_share": 0.988,
    "asked_int8_share": 1.0,
    "fell_back": ["conv_in"],
    "sizes": {
        "engine": 440_000_000,
        "fp16": 1_720_000_000,
        "ideal": 432_000_000,
        "graph": 435_000_000,
    },
}


def entry(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "processor": "a processor",
        "date": "2026-11-21",
        "versions": {"torch": "2.13.0"},
        "found": found,
    }


def test_the_table_has_what_was_measured_and_names_what_was_not() -> None:
    page = script.table({"tensorrt": entry(TENSORRT), "precision": entry(PRECISION)})
    assert "| 50 s (61 s of processor) |  |  | 60 s |" in page
    assert (
        "| openvino, multiply-adds in INT8 | 98.8% | asked for 100.0% |  | 1 layers fell back to "
        "float |" in page
    )
    assert "0.256x" in page
    assert (
        "Not measured: export, openvino, onnxruntime, verification, openvino-float-attention, "
        "export-pixart-sigma, export-sd35-medium, export-flux-dev, openvino-pixart-sigma." in page
    )
    assert "Measured on: a processor, 2026-11-21." in page


def test_a_transformers_rows_say_which_and_compare_files_with_the_payload() -> None:
    cost = {"seconds": 60.0, "cpu_seconds": 50.0, "peak_gib": 1.5, "bytes": 330_000_000}
    plain = {**cost, "bytes": 2_440_000_000, "call_seconds": 48.0, "call_cpu_seconds": 40.0}
    ratios = ("seconds", "cpu_seconds", "process_seconds", "peak", "bytes")
    figures = {
        "ours": [cost],
        "plain": [plain],
        "payload_bytes": 327_000_000,
        "exact_bytes": 329_000_000,
        "summary": {f"{x}_ratio": 1.25 for x in ratios}
        | {"payload_ratio": 1.009, "exact_ratio": 1.003},
        "calibration": {"cpu_seconds": 90.4, "peak_gib": 3.25},
    }
    page = script.table({"export-pixart-sigma": entry(figures)})
    rows = [row for row in page.splitlines() if row.startswith("| pixart-sigma: ")]
    assert len(rows) == 9
    assert (
        "| pixart-sigma: graph, files | 330.0 MB | 4-bit payload 327.0 MB | 1.009x | 1.1x |" in rows
    )
    assert "| pixart-sigma: calibration, peak memory | 3.25 GiB |  |  |  |" in rows


def test_the_rows_of_shapes_compare_files_with_the_payload() -> None:
    figures = {"seconds": 200.4, "cpu_seconds": 150.0, "peak_gib": 2.5, "bytes": 11_000_000_000}
    figures |= {"nodes": 9000, "quantized_weights": 8_000_000_000, "float_weights": 3_500_000_000}
    figures["payload_bytes"] = 11_000_000_000
    page = script.table({"export-flux-dev": entry(figures)})
    rows = [row for row in page.splitlines() if row.startswith("| flux-dev, of its shapes: ")]
    assert len(rows) == 5
    assert "export | 200.4 s | 11.5 billion weights |" in rows[0]
    assert "| 11000.0 MB | 4-bit payload 11000.0 MB | 1.000x | 1.1x |" in rows[3]


def test_a_timed_transformers_rows_name_it_and_what_is_aimed_at() -> None:
    def row(variant: str, seconds: float, ratio: float) -> dict[str, Any]:
        return {
            "variant": variant,
            "dtype": "fp32",
            "seconds": seconds,
            "speedup": 2.5 / ratio,
            "against_engine": ratio,
            "profile": {"norm": 1.0},
        }

    rows = [row("engine", 2, 1), row("fp32", 5, 2.5), row("static scales", 2, 1.0)]
    page = script.table({"openvino-pixart-sigma": entry({"rows": rows})})
    found = [x for x in page.splitlines() if "pixart-sigma at 512 px" in x and x[0] == "|"]
    assert [x.rpartition(" | ")[2] for x in found] == [" |", "2 or more |", "0.97 or more |"]
    assert "- openvino-pixart-sigma, fp32, engine: norm 1" in page


def test_a_step_that_was_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(workspace: Path, folder: Path) -> dict[str, Any]:
        measured.append(folder.name)
        return TENSORRT

    monkeypatch.setattr(script, "ensure_graph", lambda *arguments: None)
    monkeypatch.setattr(
        script,
        "STEPS",
        {name: script.Step(measure, script.tensorrt_lines) for name in ("tensorrt", "another")},
    )
    kept = tmp_path / "sd15.json"
    kept.write_text(json.dumps({"tensorrt": entry(TENSORRT)}))
    script.main(tmp_path / "ws", tmp_path / "docs", kept, None, None)
    assert measured == ["another"]
    script.main(tmp_path / "ws", tmp_path / "docs", kept, ["tensorrt"], None)
    assert measured == ["another", "tensorrt"]
    assert json.loads(kept.read_text()).keys() == {"tensorrt", "another"}


def test_a_command_that_fails_ends_the_measurement_with_its_message(tmp_path: Path) -> None:
    with refused(tmp_path / "nothing", "quest-deploy calibrate", error=SystemExit):
        script.quest_deploy("benchmark", "-w", str(tmp_path / "nothing"))
