"""Run in a process of its own that has ``full_disk.c`` preloaded: runs a command on a disk that is
full from its first, second, ... write on, until it succeeds, and prints how each run ended, as
JSON.

    python tests/faults/on_a_full_disk.py WORKSPACE COPIES COMMAND...
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from quest_deploy.artifacts.workspace import Workspace
from tests.quest_deploy import conftest
from tests.quest_deploy.support import cli


def run(root: Path, command: list[str], nth: int) -> dict[str, Any]:
    """How the command ended in a child process where the disk is full from ``nth`` on."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        shim = ctypes.CDLL(None)
        shim.full_disk_from(str(root).encode(), ctypes.c_long(nth))
        try:
            with conftest._mini_tiny():
                ended = cli(*command, "-w", root)
            told = {"code": ended.code, "error": ended.err.splitlines()[-1:]}
        except BaseException as e:
            told = {"code": "traceback", "error": [repr(e)]}
        told["counted"] = shim.full_disk_counted()
        shim.full_disk_from(b"", ctypes.c_long(0))
        os.write(write, json.dumps(told).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        content = stream.read()
    os.waitpid(child, 0)
    return {"nth": nth, **json.loads(content or b'{"code": "died", "error": []}')}


def state(root: Path) -> dict[str, Any]:
    """What is wrong with a workspace, once the next command would have looked at it."""
    try:
        workspace = Workspace.open(root)
        with workspace.locked():
            for stage in workspace.stages:
                workspace.require(stage)
    except Exception as e:
        return {"broken": repr(e)}
    return {"left": [str(path) for path in root.rglob(".tmp-*")]}


def main(source: Path, copies: Path, command: list[str], stride: int) -> list[dict[str, Any]]:
    runs, nth = [], 1
    while True:
        root = copies / str(nth)
        shutil.copytree(source, root, ignore=shutil.ignore_patterns("model.engine"))
        ended = run(root, command, nth)
        runs.append({**ended, **state(root)})
        shutil.rmtree(root)
        if ended["code"] == 0:
            return runs
        nth += stride


if __name__ == "__main__":
    folder, target, step, *rest = sys.argv[1:]
    print(json.dumps(main(Path(folder), Path(target), rest, int(step))))
