"""Processes that this one starts, or that started it: none goes on alone."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import tempfile
import traceback
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, TypeVar

from quest_deploy.errors import InputError, QuestDeployError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

Result = TypeVar("Result")
PR_SET_PDEATHSIG = 1
SECONDS_TO_END = 10
"""That a process has after its answer, to give back what it holds of the system."""
_MEANT = (QuestDeployError, OSError, MemoryError, ModuleNotFoundError, KeyboardInterrupt)
"""What commands tell by its type; any other exception is a defect, and travels as text."""


def in_own_process(work: Callable[..., Result], *arguments: Any) -> Result:
    """What ``work`` returns or raises in a new process, which ends with this one, however that
    ends, and has its temporary files where this one has them.

    Raises:
        QuestDeployError: the process was ended from outside, as by Linux where memory runs out; or
            ``work`` has a defect, whose traceback the message ends with.
    """
    context = get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(
        target=_answer, args=(sending, os.getpid(), tempfile.tempdir, work, arguments)
    )
    with _without_interrupts():
        process.start()
    try:
        sending.close()
        result, error = receiving.recv()
        # Killed at once, it would leave the semaphores of its locks behind, such as tqdm's.
        process.join(SECONDS_TO_END)
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
    pipe: Connection,
    parent: int,
    scratch: str | None,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    end_with(parent)
    tempfile.tempdir = scratch  # where the parent clears it away: this process may be killed
    try:
        answer = _pickled(work(*arguments), None)
    except (Exception, KeyboardInterrupt) as e:
        answer = _pickled_error(e)
    pipe.send_bytes(answer)


def _pickled(result: Any, error: BaseException | None) -> bytes:
    """An answer that the parent can read: what it cannot raises here."""
    content = pickle.dumps((result, error))
    pickle.loads(content)
    return content


def _pickled_error(error: BaseException) -> bytes:
    if isinstance(error, _MEANT):
        with suppress(Exception):  # one whose __init__ takes other arguments is made anew below
            return _pickled(None, error)
        kind = InputError if isinstance(error, InputError) else QuestDeployError
        return _pickled(None, kind(str(error)))
    summary = f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    return _pickled(None, QuestDeployError(f"{summary}\n{trace}"))


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
