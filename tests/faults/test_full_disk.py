"""Commands on a disk that is full from any of their writes on.

``make kills`` tries every write of the short commands, and other ones of the long ones in every
run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.kill import COMMANDS
from tests.faults.results import keep

if TYPE_CHECKING:
    from tests.faults.conftest import CampaignOf
    from tests.quest_deploy.conftest import Chain

WRITES = int(os.environ.get("FULL_DISKS", "0"))
LONG = ("benchmark", "finetune, two processes", "run")
"""They write what the others write."""


@pytest.fixture(scope="module")
def runs(
    mini_chain: Chain, campaign_of: CampaignOf, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """How each command ended on each full disk, by command."""
    compiler, library = shutil.which("cc"), tmp_path_factory.mktemp("shim") / "libfull_disk.so"
    if compiler is None:
        pytest.skip("there is no C compiler")
    source = Path(__file__).with_name("full_disk.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    found = campaign_of(
        "starve",
        mini_chain.root,
        str(WRITES or 5),
        str(int(time.time()) if WRITES else 0),
        *[name for name in COMMANDS if name not in LONG],
        LD_PRELOAD=str(library),
    )
    if WRITES:
        counts = {
            name: {
                "writes": rows[0]["of"],
                **Counter("wrong" if problems(row) else "one message" for row in rows),
            }
            for name, rows in found.items()
        }
        wrong = [str(row) for rows in found.values() for row in rows if problems(row)]
        keep("full disks", counts, wrong)
        print(*counts.items(), *wrong, sep="\n")
    return found


def problems(row: dict[str, Any]) -> list[str]:
    """What went wrong on a full disk and after it."""
    found = [name for name in ("broken", "left", "changed", "again", "other") if row.get(name)]
    *_, last = row["err"].splitlines() or [""]
    if row["code"] != 1 or not last.startswith("error: the disk is full: "):
        found.append(f"exit code {row['code']}: {last}")
    if "Traceback" in row["err"]:
        found.append("traceback")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in LONG])
def test_a_disk_that_is_full_from_any_write_on_is_one_message_and_leaves_what_was_there(
    runs: dict[str, list[dict[str, Any]]], name: str
) -> None:
    rows = runs[name]
    assert len(rows) == min(WRITES or 5, rows[0]["of"])
    assert [(problems(row), row) for row in rows if problems(row)] == []
