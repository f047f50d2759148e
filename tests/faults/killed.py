"""Run in a process of its own: ends a command at random moments, looks at what it left, and lets it
go on; prints how each went, as JSON.

    python tests/faults/killed.py WORKSPACE COPIES KILLS SEED COMMAND...
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from quest_deploy.artifacts.workspace import Workspace
from tests.quest_deploy import conftest
from tests.quest_deploy.support import cli

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(command: list[str], root: Path, report: Path) -> int:
    """The process ID of a child that runs the command as the program would."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with conftest._mini_tiny():
                ended = cli(*command, "-w", root)
            told = {"code": ended.code, "error": ended.err[-300:]}
        except BaseException as e:  # such as an interrupt before the program handles any
            told = {"code": "early" if isinstance(e, KeyboardInterrupt) else repr(e)}
        report.write_text(json.dumps(told))
        os._exit(0)
    return child


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in listed]


def kill(command: list[str], root: Path, report: Path, moment: float, ending: int) -> Any:
    """What the command said, None where it could not, and whether a process of its is left."""
    report.unlink(missing_ok=True)
    child = start(command, root, report)
    time.sleep(moment)
    started = children(child) if Path(f"/proc/{child}").exists() else []
    os.kill(child, ending)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < deadline:
        time.sleep(0.02)
    orphans = [pid for pid in started if Path(f"/proc/{pid}").exists()]
    return (json.loads(report.read_text()) if report.exists() else None), orphans


def main(source: Path, copies: Path, kills: int, seed: int, command: list[str]) -> Any:
    rng, report, runs = random.Random(seed), copies / "report.json", []
    root = copies / "workspace"
    shutil.copytree(source, root, ignore=shutil.ignore_patterns("model.engine"))
    began = time.monotonic()
    os.waitpid(start(command, root, report), 0)
    seconds = time.monotonic() - began
    assert json.loads(report.read_text())["code"] == 0, report.read_text()
    for i in range(kills):
        shutil.rmtree(root)
        shutil.copytree(source, root, ignore=shutil.ignore_patterns("model.engine"))
        ending = SIGNALS[i % len(SIGNALS)]
        said, orphans = kill(command, root, report, rng.uniform(0, seconds), ending)
        found: dict[str, Any] = {"signal": ending.name, "said": said, "orphans": orphans}
        try:
            workspace = Workspace.open(root)
            with workspace.locked():
                for stage in workspace.stages:
                    workspace.require(stage)
        except Exception as e:
            found["broken"] = repr(e)
        report.unlink(missing_ok=True)
        os.waitpid(start(command, root, report), 0)
        again = json.loads(report.read_text())
        if again["code"] != 0:
            found["again"] = again
        runs.append(found)
    return {"seconds": seconds, "runs": runs}


if __name__ == "__main__":
    folder, target, count, seed, *rest = sys.argv[1:]
    print(json.dumps(main(Path(folder), Path(target), int(count), int(seed), rest)))
