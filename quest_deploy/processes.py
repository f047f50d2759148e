"""Processes that this one starts, or that started it: none goes on alone."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, TypeVar

from quest_deploy.errors import QuestDeployError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

Result = TypeVar("Result")
PR_SET_PDEATHSIG = 1


def in_own_process(work: Callable[..., Result], *arguments: Any) -> Result:
    """What ``work`` returns or raises in a new process, which ends with this one, however that
    ends.

    Raises:
        QuestDeployError: the process was ended from outside, as by Linux where memory runs out.
    """
    context = get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, os.getpid(), work, arguments))
    with _without_interrupts():
        process.start()
    try:
        sending.close()
        result, error = receiving.recv()
    except EOFError as e:
        process.join()
        raise QuestDeployError(
            f"a process of its own, for {work.__name__.strip('_')}, ended with exit code "
            f"{process.exitcode}; where it was killed, memory may have run out"
        ) from e
    finally:
        process.kill()
        process.join()
    if error is not None:
        raise error
    returned: Result = result
    return returned


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Have a process that is started now ignore what interrupts a whole group of processes, as
    Ctrl-C does: its parent answers that.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer(
    pipe: Connection, parent: int, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    end_with(parent)
    try:
        pipe.send((work(*arguments), None))
    except Exception as e:
        pipe.send((None, e))


def end_with(parent: int) -> None:
    """Have Linux kill this process when its parent ends, however that ends; ``parent`` is the
    parent's process ID, which may have ended before this is called. See prctl(2). Other systems do
    nothing.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
