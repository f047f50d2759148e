"""Standard streams that are closed, full or of another encoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.forked import broken, digests
from tests.quest_deploy.support import Chain

PROGRAM = [sys.executable, "-m", "quest_deploy"]


def run(*arguments: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the program through a shell, which redirects its streams as ``shell`` says."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {shell}', "sh", *PROGRAM, *arguments],
        capture_output=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_a_full_standard_output_is_a_failed_job_with_one_message(
    mini_chain: Chain, json_flag: list[str]
) -> None:
    ended = run("inspect", str(mini_chain.root / "unet.onnx"), *json_flag, shell="> /dev/full")
    assert ended.returncode == 1
    assert ended.stderr.count(b"\n") == 1
    assert ended.stderr.startswith(b"error: ")


def test_a_closed_standard_error_changes_nothing_in_the_result(mini_chain: Chain) -> None:
    arguments = ("inspect", str(mini_chain.root / "unet.onnx"), "--json")
    closed = run(*arguments, shell="2>&-")
    assert (closed.returncode, closed.stderr) == (0, b"")
    assert json.loads(closed.stdout) == json.loads(run(*arguments).stdout)


def test_closed_streams_change_nothing_in_what_a_stage_writes(workspace: Path) -> None:
    # Whatever is printed or logged would go into the first files that are opened.
    kept = digests(workspace)
    (workspace / "reports" / "verify-onnxruntime.json").unlink()
    verify = ("verify", "-w", str(workspace), "--backend", "onnxruntime")
    ended = run(*verify, shell="<&- >&- 2>&-")
    assert ended.returncode == 0
    assert broken(workspace) == []
    assert digests(workspace) | {"manifest.json": ""} == kept | {"manifest.json": ""}


def test_a_name_that_the_locale_cannot_write_is_printed_all_the_same(tmp_path: Path) -> None:
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xc3\xa4\xff"))
    ended = run("inspect", str(strange), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"error: ")
    assert b"Traceback" not in ended.stderr
