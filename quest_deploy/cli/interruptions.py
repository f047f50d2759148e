"""SIGINT (Ctrl-C) and SIGTERM: one message and one exit code, at any moment.

The program ends in order where it can: KeyboardInterrupt goes up through whatever it is doing. But
libraries lose that exception, above all while they are imported, or turn it into another. So a
second signal, or time, ends the process where it stands, which hurts nothing: files change whole or
not at all, and the next command clears away what was left.

This module imports nothing that takes time: it is there before the program is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERRUPTED = 130
MESSAGE = (
    "interrupted; finished stages are kept, and the same command goes on or starts its stage again"
)
GRACE_SECONDS = 10
"""What the program may take to end in order."""


class Interruption:
    """Whether a signal has come."""

    came = False

    def answer(self, number: int, frame: object) -> NoReturn:
        """Raise KeyboardInterrupt; leave what follows to :func:`end_at_once`."""
        self.came = True
        end_at_once()
        if hasattr(signal, "alarm"):  # Windows has none
            signal.signal(signal.SIGALRM, _end)
            signal.alarm(GRACE_SECONDS)
        raise KeyboardInterrupt


def end_at_once() -> None:
    """Have a signal end the process where it stands."""
    _handle(_end)


def ignore() -> None:
    """Have a signal do nothing."""
    _handle(signal.SIG_IGN)


@contextmanager
def raised() -> Iterator[Interruption]:
    """Have a signal raise KeyboardInterrupt in the main thread, and at the end do what it did."""
    interruption, hook = Interruption(), sys.unraisablehook

    def end_if_interrupted(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:  # where Python would print it and go on
            _end(signal.SIGINT, None)
        hook(unraisable)

    before = _handle(interruption.answer)
    sys.unraisablehook = end_if_interrupted
    try:
        yield interruption
    finally:
        sys.unraisablehook = hook
        if interruption.came and hasattr(signal, "alarm"):
            signal.alarm(0)
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


def _end(number: int, frame: object) -> NoReturn:
    texts = {2: f"error: {MESSAGE}"}
    if "--json" in sys.argv:
        import json

        texts[1] = json.dumps({"error": MESSAGE, "exit_code": INTERRUPTED})
    for descriptor, text in texts.items():
        with contextlib.suppress(OSError):  # closed, or full
            os.write(descriptor, f"{text}\n".encode())
    os._exit(INTERRUPTED)
