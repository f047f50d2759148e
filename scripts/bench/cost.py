"""What a process costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any


def cost_of(*arguments: str) -> dict[str, Any]:
    """Run Python with ``arguments``: its "seconds", its "cpu_seconds", those of all its threads
    together, its "peak_gib" of memory, at least what this process held when it started it; and the
    figures that its last line of output has, where that is a JSON object. Raise
    CalledProcessError where it fails.
    """
    command = [sys.executable, *arguments]
    print(" ".join(arguments), flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        output.seek(0)
        *_, last = "", *output.read().splitlines()
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gib": usage.ru_maxrss / 2**20,  # Linux counts in KiB
        **(json.loads(last) if last.startswith("{") else {}),
    }
