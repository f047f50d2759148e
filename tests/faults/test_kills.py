"""Commands that are ended at random moments, by SIGKILL, SIGTERM and SIGINT in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.quest_deploy.support import CHAIN

if TYPE_CHECKING:
    from tests.quest_deploy.conftest import Chain

HERE = Path(__file__).parent
KILLS = int(os.environ.get("FUZZ_KILLS", "3"))
COMMANDS = {step: options for step, options in CHAIN.items() if step != "build-engine tensorrt-rtx"}


@pytest.mark.slow
@pytest.mark.parametrize("step", COMMANDS)
def test_a_command_that_is_ended_at_any_moment_leaves_a_whole_workspace_and_goes_on(
    mini_chain: Chain, tmp_path: Path, step: str
) -> None:
    command, _, backend = step.partition(" ")
    options = [*COMMANDS[step], *(["--backend", backend] if backend else [])]
    seed = int(time.time()) if "FUZZ_KILLS" in os.environ else 0
    printed = subprocess.run(
        [
            sys.executable,
            HERE / "killed.py",
            mini_chain.root,
            tmp_path,
            str(KILLS),
            str(seed),
            command,
            *options,
        ],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
    ).stdout
    runs = json.loads(printed)["runs"]
    assert len(runs) == KILLS
    for run in runs:
        assert "broken" not in run, run
        assert "again" not in run, run
        assert run["orphans"] == [], run
        if run["said"] is not None:  # where it was not killed before it could
            assert run["said"]["code"] in (0, 130, "early"), run
            assert "Traceback" not in run["said"].get("error", ""), run
