from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quest_deploy.backends.cuda import gpu_count
from scripts.bench import measure_plugin as script
from tests.helpers import assert_holds

ROOT = Path(__file__).parents[3]
RESULTS: dict[str, Any] = {
    "date": "2026-01-02",
    "device": "A GPU",
    "compute_capability": "9.0",
    "cuda_driver": 13000,
    "cuda_runtime": 13000,
    "repeats": 51,
    "lines": [
        {
            "kernel": "TimestepQuantize",
            "site": "conv 64x64",
            "shape": [2, 1, 320, 4096],
            "type": "fp16",
            "formats": "HWC8 to CHW32",
            "bytes": 7864320,
            "kernel_us": 4.0,
            "copy_us": 3.8,
        },
        {
            "kernel": "TimestepQuantize",
            "site": "tokens",
            "shape": [2, 64, 1280, 1],
            "type": "fp32",
            "formats": "linear to linear",
            "bytes": 819200,
            "kernel_us": 4.0,
            "copy_us": 3.0,
        },
        {
            "kernel": "GegluTimestepQuantize",
            "site": "GEGLU",
            "shape": [16, 4096, 1280, 1],
            "type": "fp16",
            "formats": "linear to linear",
            "bytes": 419430400,
            "kernel_us": 100.0,
            "copy_us": 95.0,
            "apart_us": 180.0,
        },
    ],
}


def tabulated(results: Path, folder: Path) -> Any:
    """How the script ends that writes the table of ``results`` into ``folder``."""
    app = script.typer.Typer()
    app.command()(script.main)
    places = ["--docs", str(folder / "docs"), "--json", str(folder / "kept.json")]
    return CliRunner().invoke(app, ["--results", str(results), *places])


@pytest.mark.skipif(gpu_count() > 0, reason="a GPU is here")
def test_without_a_gpu_it_ends_at_once_with_one_clear_message_and_writes_nothing(
    tmp_path: Path,
) -> None:
    command = [
        *(sys.executable, "-m", "scripts.bench.measure_plugin", "--docs", tmp_path / "docs"),
        *("--json", tmp_path / "plugin.json", "--build", tmp_path / "b"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"},
    )
    assert done.returncode == 2
    (message,) = done.stderr.splitlines()
    assert_holds(message, "error", "GPU")
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_each_line_what_was_measured_where_and_how_many_reach_the_aim(
    tmp_path: Path,
) -> None:
    printed = tmp_path / "measured.json"
    printed.write_text(json.dumps(RESULTS))
    done = tabulated(printed, tmp_path)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "docs" / "table.md").read_text()
    assert (
        "| TimestepQuantize | conv 64x64 | 2x320x4096 | fp16 | HWC8 to CHW32 | 7.9 | 4.0 | 3.8 | "
        "95% |  |" in text
    )
    assert (
        "| TimestepQuantize | tokens | 2x64x1280 | fp32 | linear to linear | 0.8 | 4.0 | 3.0 | 75% "
        "|  |" in text
    )
    assert "| 95% | 180.0 |" in text
    assert (
        "Batch 2: 1 of 2 lines reach 90% of the copy's bandwidth; median 95%, least 75%; batch 16: "
        "1 of 1 lines" in text
    )
    assert "A GPU (compute capability 9.0),\n2026-01-02, CUDA" in text
    assert "compute-sanitizer: not run" in text
    assert json.loads((tmp_path / "kept.json").read_text()) == RESULTS


def test_results_that_are_not_there_end_in_one_message(tmp_path: Path) -> None:
    assert tabulated(tmp_path / "none.json", tmp_path).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_every_key_that_the_program_prints_is_one_that_the_table_reads() -> None:
    source = (ROOT / "trt_plugins" / "measure" / "measure.cu").read_text()
    printed = set(re.findall(r'\\"(\w+)\\": ', source))
    assert printed == set(RESULTS) | {key for line in RESULTS["lines"] for key in line}
