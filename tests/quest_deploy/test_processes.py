from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.processes import in_own_process
from tests.helpers import refused

ROOT = Path(__file__).parents[2]


def test_a_process_of_its_own_gives_back_what_is_returned_or_raised() -> None:
    assert in_own_process(os.getppid) == os.getpid()
    with pytest.raises(FileNotFoundError, match="nowhere") as caught:
        in_own_process(os.stat, "nowhere")
    assert caught.value.filename == "nowhere"


def test_a_process_of_its_own_has_its_temporary_files_where_its_parent_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert in_own_process(tempfile.gettempdir) == str(tmp_path)


def holds_a_lock() -> bool:
    """A lock that lives as long as its process, which takes its time to end, as tqdm's does."""
    global held
    held = get_context("spawn").RLock()
    Finalize(None, time.sleep, args=(0.5,), exitpriority=1)  # before the lock's
    return True


def test_a_process_of_its_own_leaves_no_semaphore_behind() -> None:
    code = (
        "from tests.quest_deploy.test_processes import holds_a_lock, in_own_process\n"
        "if __name__ == '__main__': print(in_own_process(holds_a_lock))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True
    )
    assert (ended.stdout, ended.stderr) == ("True\n", "")


class TwoPartsError(InputError):
    """One that pickle cannot make again."""

    def __init__(self, name: str, reason: str) -> None:
        """Join them."""
        super().__init__(f"{name}: {reason}")


class DefectError(Exception):
    """The same, that no command expects."""

    def __init__(self, name: str, reason: str) -> None:
        """Join them."""
        super().__init__(f"{name}: {reason}")


def fails(error: type[Exception]) -> None:
    raise error("the file", "is empty")


def unpicklable() -> object:
    return lambda: None


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("work", "arguments", "error", "facts"),
    [
        (fails, (TwoPartsError,), InputError, ["the file: is empty"]),
        (fails, (DefectError,), QuestDeployError, ["DefectError: the file: is empty", "in fails"]),
        (int, ("no number",), QuestDeployError, ["ValueError", "no number"]),
        (unpicklable, (), QuestDeployError, ["unpicklable", "pickle"]),
    ],
    ids=["two arguments", "a defect of two arguments", "a defect", "an unpicklable result"],
)
def test_what_pickle_cannot_carry_arrives_as_text(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    error: type[QuestDeployError],
    facts: list[str],
) -> None:
    with refused(*facts, error=error):
        in_own_process(work, *arguments)


def test_an_interruption_stays_one() -> None:
    with pytest.raises(KeyboardInterrupt):
        in_own_process(interrupted)


def test_a_process_that_ends_before_it_answers_is_a_failed_job() -> None:
    with refused(7, error=QuestDeployError):
        in_own_process(os._exit, 7)


def test_what_interrupts_a_whole_group_of_processes_is_left_to_the_first() -> None:
    held = in_own_process(signal.pthread_sigmask, signal.SIG_BLOCK, [])
    assert held == {signal.SIGINT, signal.SIGTERM}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
