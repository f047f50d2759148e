"""Serve this package with Triton Inference Server: on a GPU, or with --cpu through the stand-in for
Triton's TensorRT backend.

Finds `tritonserver`, checks the package's files, starts the server with what this package needs,
and clears away behind it, however it ends. Needs nothing but Python 3.10 and the server: a
container of NVIDIA's, or on a CPU the wheel nvidia-pytriton. What follows ``--`` goes to the server
as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CONTAINER = Path("/opt/tritonserver")
"""Where NVIDIA's containers have the server."""
SHARED_MEMORY = Path("/dev/shm")
PREFIX = "quest-deploy-triton-"
"""Of the names of shared memory and temporary folders, before this process's id and a random part.
"""
LOCK = "lock"
CLOSED = "shared-memory,logging,trace"
"""Services of Triton's by which a client would reach the server's memory and files: nobody is told
the key that opens them.
"""
KEY_HEADER, KEY_VARIABLE = "quest-deploy-key", "QUEST_DEPLOY_HTTP_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
EXIT_TIMEOUT = 20
START_TIMEOUT = 300
"""Seconds that a Python process may take to start; with Triton's 30, the server of a busy machine
was seen to abort.
"""
PR_SET_PDEATHSIG = 1


class Server:
    """Where a tritonserver lies, with its python backend.

    Attributes:
        libraries: folders that the dynamic linker must know for it.
    """

    def __init__(
        self, program: Path, python_backend: Path, stub: Path, libraries: tuple[Path, ...] = ()
    ) -> None:
        self.program, self.python_backend, self.stub, self.libraries = (
            program,
            python_backend,
            stub,
            libraries,
        )

    @classmethod
    def find(cls, program: str | None) -> Server:
        """The given program, the one on the path, the container's, or the wheel's; end with a
        message where there is none.
        """
        wheel = importlib.util.find_spec("pytriton")
        if (
            program is None
            and shutil.which("tritonserver") is None
            and not CONTAINER.exists()
            and wheel is not None
        ):
            return cls._of_wheel(Path(str(wheel.origin)).parent)
        found = program or shutil.which("tritonserver") or str(CONTAINER / "bin" / "tritonserver")
        if not Path(found).is_file():
            sys.exit(
                f"error: {found} does not exist; run this in a container of Triton Inference "
                "Server, or give --tritonserver PATH; on a "
                "CPU, run it with the Python of an environment that README.md says how to make"
            )
        backend = Path(found).resolve().parents[1] / "backends" / "python"
        return cls(Path(found), backend, backend / "triton_python_backend_stub")

    @classmethod
    def _of_wheel(cls, package: Path) -> Server:
        root, version = (
            package / "tritonserver",
            f"{sys.version_info.major}.{sys.version_info.minor}",
        )
        stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
        # Built against libpython, which it would take from elsewhere.
        libraries = (
            Path(sysconfig.get_config_var("LIBDIR")),
            package.parent / "nvidia_pytriton.libs",
        )
        return cls(root / "bin" / "tritonserver", root / "backends" / "python", stub, libraries)


def command(
    server: Server, arguments: argparse.Namespace, backends: Path | None, shared_memory: str
) -> list[str]:
    """The server's command line; ``backends`` replaces the server's own."""
    package = json.loads((PACKAGE / "package.json").read_text())
    closed = f"{CLOSED}:{KEY_HEADER}={secrets.token_hex(16)}"
    options = [
        f"--model-repository={PACKAGE / 'models'}",
        f"--http-address={arguments.host}",
        f"--http-port={arguments.http_port}",
        f"--grpc-address={arguments.host}",
        f"--grpc-port={arguments.grpc_port}",
        f"--metrics-address={arguments.host}",
        f"--metrics-port={arguments.metrics_port}",
        f"--http-restricted-api={closed}",
        f"--grpc-restricted-protocol={closed}",
        f"--exit-timeout-secs={EXIT_TIMEOUT}",
        # The configurations are complete, and asking the python models would start each twice.
        "--disable-auto-complete-config",
        f"--backend-config=python,shm-region-prefix-name={shared_memory}",
        f"--backend-config=python,stub-timeout-seconds={START_TIMEOUT}",
        # A thread for each call of the pipelines, and for each response.
        f"--backend-config=python,thread-pool-size={2 * package['options']['max_in_flight']}",
    ]
    # A few bytes of JSON with the shape of terabytes end the server (Triton 2.51), over HTTP alone.
    key = os.environ.get(KEY_VARIABLE)
    if key or arguments.host not in LOOPBACK:
        key = key or secrets.token_hex(16)
        options.append(f"--http-restricted-api=inference:{KEY_HEADER}={key}")
    if backends is not None:
        options += [
            f"--backend-directory={backends}",
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
        ]
    else:
        plugins = sorted(PACKAGE / name for name in package["files"] if name.startswith("plugins/"))
        options += (
            [f"--backend-config=tensorrt,plugins={';'.join(map(str, plugins))}"] if plugins else []
        )
        # Such a plan brings code that is run: the hashes below are of what `quest-deploy package`
        # wrote.
        options += (
            ["--backend-config=tensorrt,version-compatible=true"]
            if package["version_compatible"]
            else []
        )
    return [str(server.program), *options, *arguments.server_options]


def check_files() -> None:
    """End with a message where a model, plugin or program of the package is not as `quest-deploy
    package` wrote it, or was added.
    """
    # Python would run the bytecode of an earlier time, or of somebody else, which no hash covers.
    for bytecode in list(PACKAGE.rglob("__pycache__")):
        try:
            bytecode.unlink() if bytecode.is_symlink() else shutil.rmtree(bytecode)
        except OSError as e:
            sys.exit(f"error: {bytecode} cannot be removed ({e.strerror}); remove it")
    listed = json.loads((PACKAGE / "package.json").read_text())["files"]
    for name, digest in listed.items():
        path = PACKAGE / name
        if not path.is_file() or _sha256(path) != digest:
            sys.exit(
                f"error: {path} is missing or was changed since it was packaged; run `quest-deploy "
                "package` again"
            )
    found = [
        path for x in ("models", "plugins", "backends_cpu") for path in (PACKAGE / x).rglob("*")
    ]
    for path in [*PACKAGE.glob("*.py"), *found]:
        name = path.relative_to(PACKAGE)
        allowed = path.name == "config.pbtxt" or str(name) in listed
        if not allowed and (path.is_symlink() or not path.is_dir()):
            sys.exit(
                f"error: {path} is not a file of this package; remove it, or run "
                "`quest-deploy package` again"
            )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _backends(server: Server, folder: Path) -> Path:
    """The python backend and the stand-in, side by side in ``folder``. The server does not follow
    links there.
    """
    shutil.copytree(PACKAGE / "backends_cpu", folder, dirs_exist_ok=True)
    (folder / "python").mkdir()
    for source in (
        server.python_backend / "libtriton_python.so",
        server.python_backend / "triton_python_backend_utils.py",
        server.stub,
    ):
        shutil.copy2(source, folder / "python" / source.name)
    return folder


def _environment(server: Server) -> dict[str, str]:
    """The stubs find this Python's packages through the path alone."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    libraries = os.pathsep.join(
        [*map(str, server.libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    )
    # Since 1.29 onnxruntime sends the names and hashes of models to Microsoft unless told not to.
    quiet = {"ORT_DISABLE_TELEMETRY": os.environ.get("ORT_DISABLE_TELEMETRY", "1")}
    return {**os.environ, "PATH": path, "LD_LIBRARY_PATH": libraries, **quiet}


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _run(line: list[str], environment: dict[str, str], shared_memory: str, lock: int) -> int:
    """Run the server until it ends; pass signals on; leave no stub process and no shared memory
    behind.

    The server and its stubs inherit ``lock``: where this process is killed, they still need the
    memory until they have ended.
    """
    process = subprocess.Popen(
        line, env=environment, start_new_session=True, preexec_fn=_die_with_parent, pass_fds=(lock,)
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, frame: process.send_signal(signal.SIGTERM))
    try:
        code = process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        _clear(shared_memory)
    return 128 - code if code < 0 else code


def _claim() -> tuple[str, int]:
    """A prefix of its own for what the server leaves in shared memory, and the descriptor of the
    file there whose lock says: in use.

    Shared memory can be common to containers, where a process id says nothing: who holds the lock
    lives.
    """
    while True:
        name = f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}-"
        lock = os.open(SHARED_MEMORY / (name + LOCK), os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o644)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return name, lock
        os.close(lock)  # another serve.py took it for left behind before it was locked


def _clear_stale() -> None:
    """Delete what a serve.py that was killed could not, and this user may."""
    for path in SHARED_MEMORY.glob(f"{PREFIX}*{LOCK}"):
        with contextlib.suppress(OSError):  # in use, or another user's
            lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _clear(path.name.removesuffix(LOCK))
            finally:
                os.close(lock)


def _clear(prefix: str) -> None:
    """Delete the regions and temporary folders whose names begin with ``prefix``."""
    for folder in (Path(tempfile.gettempdir()), SHARED_MEMORY):
        for left in folder.glob(f"{prefix}*"):
            with contextlib.suppress(OSError):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="serve the ONNX files on the CPU")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to bind to (default: %(default)s; nothing checks who asks). Beyond this "
        f"machine, images are drawn over gRPC alone, unless {KEY_VARIABLE} in the environment is "
        f"the value that HTTP requests have in the header {KEY_HEADER}",
    )
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--tritonserver", metavar="PATH", help="the server's program")
    parser.add_argument(
        "--print", action="store_true", help="print the server's command line for a GPU and end"
    )
    parser.add_argument(
        "server_options", nargs="*", help="further options of tritonserver, after --"
    )
    arguments = parser.parse_args()
    if arguments.print:
        program = Path(arguments.tritonserver or CONTAINER / "bin" / "tritonserver")
        print(
            shlex.join(command(Server(program, program, program), arguments, None, f"{PREFIX}1-"))
        )
        return
    server = Server.find(arguments.tritonserver)
    check_files()
    _clear_stale()
    shared_memory, lock = _claim()
    with tempfile.TemporaryDirectory(prefix=shared_memory) as folder:
        backends = _backends(server, Path(folder)) if arguments.cpu else None
        code = _run(
            command(server, arguments, backends, shared_memory),
            _environment(server),
            shared_memory,
            lock,
        )
    sys.exit(code)


if __name__ == "__main__":
    main()
