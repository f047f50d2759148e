"""What a command prints: progress on standard error, its result on standard output, as text or as
JSON.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from quest_deploy.progress import Progress

SECONDS_BETWEEN_LINES = 30.0


class Console:
    """One command's output; ``clock`` gives the seconds that pass."""

    def __init__(self, *, as_json: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.as_json = as_json
        self._clock = clock

    def progress(self, title: str) -> AbstractContextManager[Progress]:
        """Show the phase that was last reported and its time left: in a bar, or where piped in a
        line every 30 s at most.
        """
        return self._bar(title) if sys.stderr.isatty() else self._lines(title)

    @contextmanager
    def _lines(self, title: str) -> Iterator[Progress]:
        pace = _Pace(self._clock)
        printed = started = self._clock()
        self.note(f"{title} ...")

        def progress(phase: str, done: int, total: int, detail: str = "") -> None:
            nonlocal printed
            left = pace.left(phase, done, total)  # also where nothing is printed: it measures
            if (now := self._clock()) - printed >= SECONDS_BETWEEN_LINES:
                printed = now
                self.note(_listing(f"{title}: {phase}", detail, f"{done} of {total}", left))

        yield progress
        self.note(f"{title}: done in {self._clock() - started:.1f} s")

    @contextmanager
    def _bar(self, title: str) -> Iterator[Progress]:
        import rich.progress as rich  # imported where there is a terminal
        from rich.console import Console as RichConsole
        from rich.table import Column

        pace = _Pace(self._clock)
        columns = (
            # Wraps, where rich's own would cut off what is behind it.
            rich.TextColumn("{task.description}", table_column=Column()),
            rich.BarColumn(10),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
            rich.TextColumn("{task.fields[left]}"),
        )
        with rich.Progress(*columns, console=RichConsole(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=None, left="")

            def progress(phase: str, done: int, total: int, detail: str = "") -> None:
                bar.update(
                    task,
                    description=_listing(f"{title}: {phase}", detail),
                    completed=done,
                    total=total,
                    left=pace.left(phase, done, total),
                )

            yield progress

    def note(self, message: str) -> None:
        """Tell something beside the result."""
        print(message, file=sys.stderr, flush=True)

    def result(self, value: dict[str, Any], *lines: str) -> None:
        """Print the result: ``value`` as JSON with --json, else the ``lines``."""
        if self.as_json:
            print(json.dumps(value, indent=1))
        else:
            print("\n".join(lines), flush=True)


def discard_output() -> None:
    """Keep the interpreter from writing what could not be written once more when it ends."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Messages(logging.Handler):
    """Prints what the library logs on standard error, a warning as such."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        kind = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(f"{kind}{record.getMessage()}", file=sys.stderr, flush=True)


@contextmanager
def messages() -> Iterator[None]:
    """Show what the library logs while the context is open."""
    logger, handler = logging.getLogger("quest_deploy"), Messages()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Pace:
    """How long phases will still take, each from the time since this process saw its first step.

    Where phases alternate, the turns of the others are part of that time: they will come again.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first: dict[str, tuple[float, int]] = {}

    def left(self, phase: str, done: int, total: int) -> str:
        """The time left of ``phase`` in words; nothing where it is done, or no step's time is known
        yet.
        """
        now = self._clock()
        since, first = self._first.setdefault(phase, (now, done))
        if done <= first:  # seen for the first time, or it starts over
            self._first[phase] = now, done
            return ""
        return time_left((now - since) / (done - first) * (total - done)) if done < total else ""


def _listing(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def time_left(seconds: float) -> str:
    """A time left as people read it."""
    if seconds < 60:
        return "less than a minute left"
    minutes = seconds / 60
    return f"about {minutes:.0f} min left" if minutes < 120 else f"about {minutes / 60:.0f} h left"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table, the first column left-aligned, the others right-aligned."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def in_float(float_sites: dict[str, str], quantizers: int) -> list[str]:
    """The line that says how many of a checkpoint's ``quantizers`` compute in float and why
    (``Checkpoint.float_sites``), if any do.
    """
    if not float_sites:
        return []
    counts = Counter(float_sites.values()).most_common()
    reasons = (
        counts[0][0]
        if len(counts) == 1
        else "; ".join(f"{count}: {reason}" for reason, count in counts)
    )
    return [
        f"{len(float_sites)} of {quantizers} tensors and the layers that read them compute in "
        f"float ({reasons})"
    ]
