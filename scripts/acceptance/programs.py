"""Runs programs within a time limit, and reads what they answer."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from quest_deploy.backends.cuda import gpu_memory_in_use
from quest_deploy.errors import QuestDeployError
from quest_deploy.files import read_json
from quest_deploy.processes import end_with

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scripts.acceptance.steps import Answer

ROOT = Path(__file__).parents[2]
MIB = 2**20


@dataclass(frozen=True)
class Ran:
    """How a command ended. ``code`` is None where it was out of time; ``gpu_mib`` is the most of
    the GPU's memory that was in use meanwhile, by all processes, None where nothing tells.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    gpu_mib: int | None = None


class Run(Protocol):
    """Runs a program; tests give another."""

    def __call__(
        self, words: Sequence[str], environment: Mapping[str, str], seconds: float
    ) -> Ran: ...


def words_of(line: str, names: Mapping[str, str]) -> list[str]:
    """The words of a command line, with its program where it is here."""
    program, *rest = (word.format(**names) for word in shlex.split(line))
    programs = {"quest-deploy": ["-m", "quest_deploy"], "python": []}
    return [sys.executable, *programs[program], *rest] if program in programs else [program, *rest]


def answer_of(ran: Ran, reads: Path | None = None) -> Answer:
    """What a command answered; its last lines where that is no JSON object, and of a command that
    failed the first error, of standard error where it has any.
    """
    try:
        value = json.loads(ran.out) if reads is None else read_json(reads)
        if isinstance(value, dict):
            return value
    except (ValueError, QuestDeployError):
        pass
    both = (ran.out, ran.err) if ran.code == 0 else (ran.err, ran.out)
    text = next((text for text in both if text.strip()), "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = (i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE))
    first = next(errors, None) if ran.code != 0 else None
    told = lines[-3:] if first is None else [*lines[first : first + 2], lines[-1]]
    return {"output": "; ".join(dict.fromkeys(told))}


def run_program(words: Sequence[str], environment: Mapping[str, str], seconds: float) -> Ran:
    """Run a program in the checkout; where it is out of time, or this process ends, it ends with
    all that it started.
    """
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment),
            cwd=ROOT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=partial(end_with, os.getpid()),  # also where this one is killed
        )
    except OSError as e:
        return Ran(127, "", str(e), 0.0)
    with GpuMemory() as memory:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            out, err = process.communicate()
            return Ran(None, out, err, time.monotonic() - started, memory.peak)
        except BaseException:  # Ctrl-C, which reaches this process alone
            _end(process)
            raise
    return Ran(process.returncode, out, err, time.monotonic() - started, memory.peak)


def _end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class GpuMemory:
    """A context manager: the most of the first GPU's memory that is in use meanwhile, in MiB;
    ``peak`` is None where nothing tells.
    """

    def __init__(self) -> None:
        self.peak: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> GpuMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5) and (held := gpu_memory_in_use()) is not None:
            self.peak = max(self.peak or 0, held // MIB)
