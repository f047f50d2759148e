"""What a command prints: progress on standard error, its result on standard output, as text or as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Update = Callable[[str, int, int], None]


class Console:
    """One command's output."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    @contextmanager
    def progress(self, title: str) -> Iterator[Update]:
        """Show a bar for the phase that was last reported with update(phase, done, total); one line per title where piped."""
        started = time.monotonic()
        if not sys.stderr.isatty():
            print(f"{title} ...", file=sys.stderr, flush=True)
            yield lambda phase, done, total: None
            print(f"{title}: done in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=RichConsole(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=None)

            def update(phase: str, done: int, total: int) -> None:
                bar.update(task, description=f"{title}: {phase}", completed=done, total=total)

            yield update

    def note(self, message: str) -> None:
        """Tell something beside the result."""
        print(message, file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        """Warn on standard error."""
        self.note(f"warning: {message}")

    def result(self, value: dict[str, Any], *lines: str) -> None:
        """Print the result: ``value`` as JSON with --json, else the ``lines``."""
        if self.as_json:
            print(json.dumps(value, indent=1))
        else:
            print("\n".join(lines), flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table, the first column left-aligned, the others right-aligned."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def in_float(float_sites: dict[str, str], sites: int) -> list[str]:
    """The line that says how many of a checkpoint's ``sites`` compute in float and why (``Checkpoint.float_sites``), if any do."""
    if not float_sites:
        return []
    counts = Counter(float_sites.values()).most_common()
    reasons = counts[0][0] if len(counts) == 1 else "; ".join(f"{count}: {reason}" for reason, count in counts)
    return [f"{len(float_sites)} of {sites} tensors and the layers that read them compute in float ({reasons})"]


def size(count: float) -> str:
    """A number of bytes as people read it (1 MB = 10^6 bytes)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
