from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.quest_deploy.support import Chain


def test_onnxruntime_keeps_no_device_id_in_home_and_no_session_in_scratch(
    mini_chain: Chain, tmp_path: Path
) -> None:
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    environment.pop("XDG_CACHE_HOME", None)
    graph = mini_chain.root / "engines" / "onnxruntime"
    subprocess.run(
        [sys.executable, "-m", "quest_deploy", "inspect", graph],
        check=True,
        capture_output=True,
        env={**environment, "HOME": str(home), "TMPDIR": str(scratch)},
    )
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in written if "quest-deploy" not in name} == set()
