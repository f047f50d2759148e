"""The two ways a command ends badly, and nothing else: a traceback is always a defect."""

from __future__ import annotations


class QuestDeployError(Exception):
    """A job failed: the input was fine, the work could not be finished. Exit code 1."""

    exit_code = 1


class InputError(QuestDeployError):
    """The user gave something that cannot work; the message says what was expected. Exit code 2."""

    exit_code = 2
