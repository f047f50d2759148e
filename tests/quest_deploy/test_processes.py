from __future__ import annotations

import os
import signal

import pytest

from quest_deploy.errors import QuestDeployError
from quest_deploy.processes import in_own_process
from tests.helpers import refused


def test_a_process_of_its_own_gives_back_what_is_returned_or_raised() -> None:
    assert in_own_process(os.getppid) == os.getpid()
    with pytest.raises(ValueError, match="no number"):
        in_own_process(int, "no number")


def test_a_process_that_ends_before_it_answers_is_a_failed_job() -> None:
    with refused(7, error=QuestDeployError):
        in_own_process(os._exit, 7)


def test_what_interrupts_a_whole_group_of_processes_is_left_to_the_first() -> None:
    held = in_own_process(signal.pthread_sigmask, signal.SIG_BLOCK, [])
    assert held == {signal.SIGINT, signal.SIGTERM}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
