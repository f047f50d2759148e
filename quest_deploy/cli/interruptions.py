"""SIGINT (Ctrl-C) and SIGTERM: one message and one exit code, at any moment.

This module imports nothing that takes time: it is there before the program is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERRUPTED = 130
MESSAGE = (
    "interrupted; finished stages are kept, and the same command goes on or starts its stage again"
)


def end_at_once() -> None:
    """Have a signal end the process where it stands: nothing is under way that must be tidied."""
    _handle(_end)


def ignore() -> None:
    """Have a signal do nothing."""
    _handle(signal.SIG_IGN)


@contextmanager
def raised() -> Iterator[None]:
    """Have a signal raise KeyboardInterrupt in the main thread, and at the end do what it did."""
    before = _handle(signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(handler: Any) -> dict[int, Any]:
    """Install a handler but where the caller of the program ignores the signal, as a shell does for
    its background jobs; return what was there.
    """
    handled = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    return {number: signal.signal(number, handler) for number in handled}


def _end(number: int, frame: object) -> None:
    texts = {2: f"error: {MESSAGE}"}
    if "--json" in sys.argv:
        import json

        texts[1] = json.dumps({"error": MESSAGE, "exit_code": INTERRUPTED})
    for descriptor, text in texts.items():
        with contextlib.suppress(OSError):  # closed, or full
            os.write(descriptor, f"{text}\n".encode())
    os._exit(INTERRUPTED)
