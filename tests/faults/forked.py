"""Commands in processes that are forked from one which has their imports done: a command of the
very small model then takes a second or two, and hundreds of them can be ended or starved.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import hashlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 15
"""What a process may take to end after its parent."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code, negative where a signal killed it.
        err: what it printed on standard error.
        done: when all was done but for the interpreter's tidying up, as time.monotonic() counts; 0
            where it never was.
        orphans: the commands of the processes that outlived it.
    """

    code: int
    err: str
    done: float
    orphans: list[str]


class Nursery:
    """Where commands are forked. The process that makes one adopts whoever loses its parent."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._started = folder, set[int]()
        self.scratch = folder / "scratch"
        self.scratch.mkdir(parents=True)
        os.environ |= {"TMPDIR": str(self.scratch), "XDG_CACHE_HOME": str(folder / "cache")}
        os.chdir(self.scratch)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        from tests.quest_deploy.conftest import _mini_emoji

        self._patch = _mini_emoji()  # undone where nobody holds it
        self._patch.__enter__()

    def start(
        self,
        arguments: list[str],
        *,
        environment: Mapping[str, str] | None = None,
        at_first: Callable[[], None] = lambda: None,
        at_last: Callable[[], None] = lambda: None,
    ) -> int:
        """The ID of a new process, the leader of a group of its own, that runs `quest-deploy` with
        the arguments as a shell would have it.
        """
        sys.stdout.flush()
        # Before the program's first line no signal is its own.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        child = os.fork()
        if child:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            with contextlib.suppress(PermissionError):  # it has done so itself
                os.setpgid(child, child)
            self._started.add(child)
            return child
        os.setpgid(0, 0)
        for number, flags in enumerate((os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT | os.O_TRUNC] * 2)):
            name = self.folder / f"{os.getpid()}-{number}" if number else "/dev/null"
            os.dup2(os.open(name, flags), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["quest-deploy", *arguments]
        os.environ.update(environment or {})
        done = self.folder / f"{os.getpid()}-3"
        atexit.register(lambda: done.write_text(str(time.monotonic())))
        atexit.register(at_last)
        at_first()
        from quest_deploy.__main__ import main
        from quest_deploy.cli.interruptions import end_at_once

        end_at_once()  # as its first line does
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        main()
        raise SystemExit  # and no way back to those who called

    def wait(self, child: int) -> Ended:
        """How the process ended, once all that it had started have ended too, or had the time to."""
        _, status = os.waitpid(child, 0)
        self._started.remove(child)
        printed = ["", "", "", "0"]
        for number in (1, 2, 3):
            path = self.folder / f"{child}-{number}"
            if path.exists():
                printed[number] = path.read_text(errors="replace")
                path.unlink()
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, printed[2], float(printed[3] or 0), self._orphans())

    def _orphans(self) -> list[str]:
        """The commands of the processes that were adopted and do not end; they are ended."""
        deadline = time.monotonic() + GRACE_SECONDS
        while left := [pid for pid in _children() if pid not in self._started]:
            if time.monotonic() > deadline:
                break
            for pid in left:
                os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)
        commands = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in left]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return commands

    def left(self) -> list[str]:
        """What lies where temporary files do, but for the cache that torch keeps there."""
        found = (str(path.relative_to(self.scratch)) for path in self.scratch.rglob("*"))
        return sorted(name for name in found if not name.startswith("torchinductor_"))

    def run(self, arguments: list[str], **how: Any) -> Ended:
        """Start it and wait for its end."""
        return self.wait(self.start(arguments, **how))

    def rehearse(self, arguments: list[str], **how: Any) -> Ended:
        """Run it, and import here what it has imported."""
        listed = self.folder / "modules.json"
        ended = self.run(
            arguments, at_last=lambda: listed.write_text(json.dumps([*sys.modules])) and None, **how
        )
        assert ended.code == 0, ended.err
        for name in json.loads(listed.read_text()):
            if name not in sys.modules:
                with contextlib.suppress(Exception):  # some hide parts of themselves
                    importlib.import_module(name)
        gc.collect()
        gc.freeze()  # or every child would copy the pages of what it only counts
        threads = len(list(Path("/proc/self/task").iterdir()))
        assert threads == 1, f"{threads} threads, and a fork would copy one"
        return ended


def _children() -> list[int]:
    me = os.getpid()
    return [int(each) for each in Path(f"/proc/{me}/task/{me}/children").read_text().split()]


def digests(root: Path) -> dict[str, str]:
    """The SHA-256 of every file below ``root``, by its path there."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def broken(root: Path) -> list[str]:
    """The files of a workspace that are not what its manifest says; its plans are no copies."""
    stages = json.loads((root / "manifest.json").read_text())["stages"]
    found = digests(root)
    return [
        name
        for stage in stages.values()
        for name, entry in stage["files"].items()
        if found.get(name) != entry["sha256"] and not name.endswith("model.engine")
    ]
