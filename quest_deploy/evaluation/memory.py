"""How much memory a process has needed."""

from __future__ import annotations

from pathlib import Path


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
