"""How much memory a process has needed; a process of its own that is measured."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def peak_memory() -> int:
    """The most bytes that this process has held in memory since it began, or since
    :func:`reset_peak_memory`.
    """
    # Not getrusage: its maximum is inherited from the process that started this one.
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # no Linux; Windows has the same measure
        import psutil

        held = psutil.Process().memory_info()
        return int(getattr(held, "peak_wset", held.rss))
    return 1024 * int(
        next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    )


def reset_peak_memory() -> None:
    """Begin anew: the peak is what the process holds now (see proc_pid_clear_refs(5))."""
    Path("/proc/self/clear_refs").write_text("5")


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
