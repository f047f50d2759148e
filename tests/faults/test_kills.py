"""Commands that are ended at random moments, by SIGKILL, SIGTERM and SIGINT in turn.

``make kills COUNT=200`` ends as many, at other moments in every run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.kill import COMMANDS
from tests.faults.results import keep

if TYPE_CHECKING:
    from pathlib import Path

    from tests.faults.conftest import CampaignOf
    from tests.quest_deploy.conftest import Chain

KILLS = int(os.environ.get("KILLS", "0"))
"""Over all commands, each at least once by each signal."""
INTERRUPTED = 130
PROGRAM = """
import os, sys
number, moment = int(sys.argv[1]), sys.argv[2]

class Dying:
    def __del__(self):
        os.kill(os.getpid(), number)

class Interrupting:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == moment:
            os.kill(os.getpid(), number)
        elif name == "numpy" and moment == "turned into another exception":
            try:
                os.kill(os.getpid(), number)
            except KeyboardInterrupt:
                raise ImportError from None
        elif name == "numpy" and moment == "lost":
            try:
                os.kill(os.getpid(), number)
            except KeyboardInterrupt:
                import time
                time.sleep(60)
        elif name == "numpy" and moment == "where nothing can be raised":
            Dying()

if moment == "the end":
    import atexit
    atexit.register(os.kill, os.getpid(), number)
sys.meta_path.insert(0, Interrupting)
sys.argv[1:] = sys.argv[3:]
from quest_deploy.__main__ import main
main()
"""


def interrupted(number: int, moment: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program, which gets a signal when it imports the module ``moment``, or numpy and then
    what ``moment`` says happens to KeyboardInterrupt.
    """
    program = [sys.executable, "-c", PROGRAM, str(int(number)), moment, *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    "moment",
    [
        "quest_deploy.cli.main",
        "typer",
        "turned into another exception",
        "where nothing can be raised",
        pytest.param("lost", marks=pytest.mark.slow),
        pytest.param("numpy", marks=pytest.mark.slow),
        pytest.param("quest_deploy.stages.api", marks=pytest.mark.slow),
        pytest.param("torch", marks=pytest.mark.slow),
    ],
)
def test_an_interruption_while_the_program_is_loaded_is_one_message(
    number: signal.Signals, moment: str, tmp_path: Path
) -> None:
    ended = interrupted(number, moment, "calibrate", "-w", str(tmp_path / "new"))
    assert ended.returncode == INTERRUPTED, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in ended.stderr


def test_an_interruption_at_the_very_end_changes_nothing() -> None:
    ended = interrupted(signal.SIGINT, "the end", "--version")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.fixture(scope="module")
def kills(mini_chain: Chain, campaign_of: CampaignOf) -> dict[str, list[dict[str, Any]]]:
    """How each kill went, by command."""
    seed = str(int(time.time()) if KILLS else 0)
    found = campaign_of("kill", mini_chain.root, str(KILLS), seed)
    counts = {name: Counter(map(outcome, rows)) for name, rows in found.items()}
    if KILLS:
        wrong = [str(row) for rows in found.values() for row in rows if problems(row)]
        keep("kills", {name: dict(each) for name, each in counts.items()}, wrong)
        print(*counts.items(), *wrong, sep="\n")
    return found


def outcome(row: dict[str, Any]) -> str:
    """What came of one kill, in the words of the page."""
    if problems(row):
        return "wrong"
    codes = {ended["code"] for ended in row["ended"]}
    if codes == {0}:
        return "was done"
    return "killed" if -signal.SIGKILL in codes else "one message"


def problems(row: dict[str, Any]) -> list[str]:
    """What went wrong at a kill and after it."""
    found = [name for name in ("lost", "broken", "again", "other", "scratch") if row[name]]
    for ended in row["ended"]:
        if ended["orphans"]:
            found.append("orphan")
        if "Traceback" in ended["err"]:
            found.append("traceback")
        alone = len(row["ended"]) == 1  # else it may have failed with another one
        if ended["code"] not in {0, INTERRUPTED, -signal.SIGKILL, *([] if alone else [1])}:
            found.append(f"exit code {ended['code']}")
        if ended["code"] in (1, INTERRUPTED) and ended["err"].count("error: ") != 1:
            found.append("no message")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_ended_at_any_moment_leaves_nothing_behind_and_goes_on(
    kills: dict[str, list[dict[str, Any]]], name: str
) -> None:
    rows = kills[name]
    assert {row["signal"] for row in rows} == {"SIGKILL", "SIGTERM", "SIGINT"}
    assert [(problems(row), row) for row in rows if problems(row)] == []
