"""The engine side where Python lacks what only POSIX has, as on Windows: the modules, the flags of
``os.open``, folders that can be opened, Linux's /proc. A stand-in gives Windows' locks of bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from quest_deploy import files
from tests.quest_deploy.cli.test_without_torch import RUNS_ENGINES

SITE = """
import multiprocessing, os, subprocess, sys, types  # which ask for msvcrt whether it is Windows
POSIX = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "crypt", "spwd")
sys.modules.update(dict.fromkeys(POSIX))
for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_DIRECTORY", "getuid", "geteuid", "fork"):
    if hasattr(os, name):
        delattr(os, name)
msvcrt = types.ModuleType("msvcrt")
msvcrt.LK_UNLCK, msvcrt.LK_NBLCK = 0, 2
msvcrt.locking = lambda descriptor, mode, count: None
sys.modules["msvcrt"] = msvcrt
_open = os.open
def open_no_folder(path, *arguments, **options):
    if not isinstance(path, int) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return _open(path, *arguments, **options)
os.open = open_no_folder
"""
ENGINE_SIDE = (
    "quest_deploy.backends.engine_unet",
    "quest_deploy.backends.onnxruntime",
    "quest_deploy.backends.openvino.backend",
    "quest_deploy.backends.tensorrt.base",
    "quest_deploy.cli.main",
    "quest_deploy.evaluation.benchmark",
    "quest_deploy.serving.client",
    "quest_deploy.stages.benchmark",
    "quest_deploy.stages.verify",
    "quest_deploy.verification.checks.engine",
)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a process, and of those that it starts, without POSIX."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    return {**os.environ, "PYTHONPATH": str(site)}


@pytest.mark.parametrize("module", ENGINE_SIDE)
def test_the_engine_side_is_imported_without_posix(
    environment: dict[str, str], module: str
) -> None:
    script = f"import sys, {module}; assert sys.modules['fcntl'] is None"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_an_engine_is_built_verified_timed_and_run_without_posix(
    workspace: Path, environment: dict[str, str]
) -> None:
    script = textwrap.dedent("""
        import contextlib, io, json, sys
        import numpy as np
        from pathlib import Path
        from quest_deploy.artifacts.workspace import Workspace
        from quest_deploy.backends.engine_unet import EngineUNet
        from quest_deploy.cli.main import main
        for command in json.loads(sys.argv[1]):
            sys.argv[1:] = command
            with contextlib.suppress(SystemExit):
                main()
        with EngineUNet.load(Workspace.open(Path(command[2])), "onnxruntime") as unet:
            states = np.zeros((1, 24, 128))
            print(unet.predict(np.zeros((1, 8, 8, 8)), 5, encoder_hidden_states=states).shape)
    """)
    here = ("-w", str(workspace), "--backend", "onnxruntime")
    commands = [(command, *here, *options) for command, options in RUNS_ENGINES.items()]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "error: " not in done.stderr
    assert done.stdout.splitlines()[-1] == "(1, 8, 8, 8)"


class Ranges:
    """Windows' locks of ranges of bytes, as msvcrt has them, for one file in one process."""

    LK_UNLCK, LK_NBLCK = 0, 2

    def __init__(self) -> None:
        self.held: list[tuple[int, range]] = []

    def locking(self, descriptor: int, mode: int, count: int) -> None:
        start = os.lseek(descriptor, 0, os.SEEK_CUR)
        wanted = range(start, start + count)
        if mode == self.LK_UNLCK:
            self.held.remove((descriptor, wanted))
            return
        for _, held in self.held:
            if wanted.start < held.stop and held.start < wanted.stop:
                raise PermissionError(13, "Permission denied")
        self.held.append((descriptor, wanted))


@pytest.mark.parametrize("windows", [False, True], ids=["POSIX", "Windows"])
@pytest.mark.parametrize(
    ("held", "wanted", "granted"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_readers_share_and_a_writer_is_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    windows: bool,
    held: bool,
    wanted: bool,
    granted: bool,
) -> None:
    if windows:
        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.setitem(sys.modules, "msvcrt", Ranges())  # type: ignore[arg-type]

    def locked(*, shared: bool) -> Any:
        stream = stack.enter_context((tmp_path / "lock").open("ab"))
        return files.lock(stream.fileno(), shared=shared)

    with ExitStack() as stack, locked(shared=held):
        if granted:
            stack.enter_context(locked(shared=wanted))
        else:
            with pytest.raises(BlockingIOError), locked(shared=wanted):
                pass
    with ExitStack() as stack, locked(shared=False):
        pass
