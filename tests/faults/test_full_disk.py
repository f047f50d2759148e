"""Commands on a disk that fills up at any of their writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.quest_deploy.conftest import Chain

HERE = Path(__file__).parent
COMMANDS = {
    "calibrate": (1, ["--samples", "8", "--buckets", "3", "--seed", "1"]),
    "finetune": (1, ["--temporal-steps", "1", "--sensitive-steps", "1", "--batch", "4"]),
    "build-engine": (1, ["--backend", "onnxruntime", "--max-batch", "3"]),
    "generate": (1, ["--backend", "onnxruntime", "--steps", "1", "--rows", "1"]),
    "sensitivity": (2, ["--samples", "1", "--batch", "20"]),
    "export": (5, []),
    "reference": (5, ["--seed", "1"]),
    "verify": (3, ["--backend", "onnxruntime"]),
}
"""By command, every how manieth write is tried, and its options, which are others than those that
it has run with.
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes a disk full."""
    compiler, library = shutil.which("cc"), tmp_path_factory.mktemp("shim") / "libfull_disk.so"
    if compiler is None:
        pytest.skip("there is no C compiler")
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", library, HERE / "full_disk.c", "-ldl"],
        check=True,
    )
    return library


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_fills_up_at_any_write_is_one_message_and_leaves_a_whole_workspace(
    mini_chain: Chain, shim: Path, tmp_path: Path, command: str
) -> None:
    stride, options = COMMANDS[command]
    printed = subprocess.run(
        [
            sys.executable,
            HERE / "on_a_full_disk.py",
            mini_chain.root,
            tmp_path,
            str(stride),
            command,
            *options,
        ],
        check=True,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "LD_PRELOAD": str(shim),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(HERE.parents[1]),
        },
    ).stdout
    runs = json.loads(printed)
    assert len(runs) > 3
    for run in runs[:-1]:
        assert run["code"] == 1, run
        assert "the disk is full" in run["error"][0], run
    assert [run for run in runs if "broken" in run or run["left"]] == []
