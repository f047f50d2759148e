"""A package's ``serve.py`` as a process of ours, for tests and benchmarks: started, waited for,
watched, stopped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from quest_deploy.errors import QuestDeployError

if TYPE_CHECKING:
    from collections.abc import Sequence

SERVING = Path(sys.prefix) / "serving" / "bin" / "python"
"""The Python of the environment that the Makefile makes for Triton's python backend."""
_PAUSE = 0.1


def missing_server() -> str | None:
    """Why no Triton server can be started here without a GPU; None where one can."""
    if not SERVING.is_file():
        return f"{SERVING} does not exist; run `make test`, or `make .venv/serving`"
    probes = {
        "there is no wheel of nvidia-pytriton for this machine": (
            "import importlib.util, sys; sys.exit(importlib.util.find_spec('pytriton') is None)"
        ),
        "Triton's python backend needs Python's shared library": (
            "import ctypes, sys, sysconfig; "
            "ctypes.CDLL(sysconfig.get_config_var('LIBDIR') + '/libpython3.%d.so.1.0' % "
            "sys.version_info[1])"
        ),
    }
    for reason, probe in probes.items():
        if subprocess.run([SERVING, "-c", probe], capture_output=True, check=False).returncode:
            return reason
    return None


class PackageServer:
    """A context manager: a package served on free ports of 127.0.0.1.

    Args:
        log: where what the server prints goes.
        cpu: whether through the stand-in for the TensorRT backend.
        options: further options of tritonserver.
        python: the interpreter that runs the package's serve.py.

    Attributes:
        http, grpc: "host:port" of its services.
        process: of serve.py.
    """

    def __init__(
        self,
        package: Path,
        log: Path,
        *,
        cpu: bool = True,
        options: Sequence[str] = (),
        python: Path = SERVING,
    ) -> None:
        self.package, self.log = package, log
        self._python = python
        self._options = [*(["--cpu"] if cpu else []), *(["--", *options] if options else [])]

    def __enter__(self) -> PackageServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self, seconds: float = 300.0) -> None:
        """Start and wait until every model is loaded; raise QuestDeployError where that fails."""
        http, grpc, metrics = _free_ports(3)
        self.http, self.grpc = f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        line = [
            self._python,
            self.package / "serve.py",
            "--http-port",
            http,
            "--grpc-port",
            grpc,
            "--metrics-port",
            metrics,
        ]
        environment = {
            name: value for name, value in os.environ.items() if name != "PYTHONPATH"
        }  # as an operator's would be
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [str(part) for part in [*line, *self._options]],
                stdout=stream,
                stderr=stream,
                env=environment,
            )
        deadline = time.monotonic() + seconds
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise QuestDeployError(
                    "the server has not started; the end of "
                    f"{self.log}:\n{self.log.read_text(errors='replace')[-3000:]}"
                )
            time.sleep(_PAUSE)

    def ready(self) -> bool:
        """Whether the server says so."""
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self, seconds: float = 60.0) -> int:
        """Ask it to end, and return its exit code; kill it where it does not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for pid in (*self.processes().values(), self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            raise QuestDeployError(
                f"the server did not end within {seconds:g} s of SIGTERM"
            ) from None

    def processes(self) -> dict[str, int]:
        """The ids of the server, "tritonserver", and of its python processes, by what each
        serves.
        """
        children = {pid: name for pid, parent, name in _processes() if parent == self.process.pid}
        server = next((pid for pid, name in children.items() if name == "tritonserver"), None)
        if server is None:
            return {}
        found = {"tritonserver": server}
        for pid, parent, _ in _processes():
            if parent == server:
                found[_model_of(pid)] = pid
        return found

    def memory(self) -> dict[str, int]:
        """The anonymous memory of each of :meth:`processes`, and what they share, "shared memory",
        in bytes.

        Not the pages of libraries: their share depends on who else has them open.
        """
        found = {}
        for name, pid in self.processes().items():
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:  # it has ended meanwhile
                continue
            found[name] = (
                next(
                    int(line.split()[1])
                    for line in text.splitlines()
                    if line.startswith("Anonymous:")
                )
                * 1024
            )
        shared = Path("/dev/shm").glob(f"quest-deploy-triton-{self.process.pid}-*")
        return {**found, "shared memory": sum(512 * path.stat().st_blocks for path in shared)}


def _processes() -> list[tuple[int, int, str]]:
    """Every process's id, its parent's, and the first 15 characters of its name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text()
        except OSError:  # it has ended meanwhile
            continue
        name, rest = (
            text[text.index("(") + 1 : text.rindex(")")],
            text[text.rindex(")") + 2 :].split(),
        )
        if rest[0] != "Z":
            found.append((int(folder.name), int(rest[1]), name))
    return found


def _model_of(pid: int) -> str:
    """Return what a stub process serves: its first argument is the model's file."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return str(pid)
    return (
        Path(words[1]).parents[1].name
        if len(words) > 1 and len(Path(words[1]).parts) > 2
        else str(pid)
    )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
