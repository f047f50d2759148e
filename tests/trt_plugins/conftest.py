from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nlohmann_json
import pytest

PLUGINS = Path(__file__).parents[2] / "trt_plugins"
HEADERS = "TENSORRT_INCLUDE_DIR"
JSON_HEADERS = Path(nlohmann_json.__file__).parent / "include"
ARCHITECTURE = "90"
"""One is enough to see that the kernels compile."""


def configure(
    folder: Path, *options: str, headers: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run cmake on the plugins for ``folder``, with TensorRT's ``headers`` or, whatever the
    environment says, without.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("TENSORRT_")
    }
    if headers is not None:
        options = (*options, f"-DTENSORRT_INCLUDE_DIR={headers}")
    command = [
        "cmake",
        "-S",
        str(PLUGINS),
        "-B",
        str(folder),
        f"-DCMAKE_CUDA_ARCHITECTURES={ARCHITECTURE}",
        f"-DNLOHMANN_JSON_INCLUDE_DIR={JSON_HEADERS}",
        *options,
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def require_compilers() -> None:
    """Skip where there is no cmake or no CUDA compiler."""
    for program, reason in (
        ("cmake", "cmake is not here"),
        ("nvcc", "the CUDA compiler, nvcc, is not here"),
    ):
        if shutil.which(program) is None:
            pytest.skip(reason)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the kernels, the plugins if their headers are here, and the test programs are built,
    once for all of pytest's workers.

    With a warning of the compiler's or of clang-tidy's, nothing is.
    """
    require_compilers()
    tidy = Path(sys.executable).parent / "clang-tidy"
    if not tidy.exists():
        pytest.skip("clang-tidy, of the dev extra, is not installed")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trt_plugins_build"
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "built").exists():
            checks = ("-DQUEST_SANITIZE=ON", "-DQUEST_CLANG_TIDY=ON", f"-DCLANG_TIDY={tidy}")
            configured = configure(folder, *checks, headers=os.environ.get(HEADERS))
            assert configured.returncode == 0, configured.stderr
            made = subprocess.run(
                ["cmake", "--build", str(folder), "-j", "2"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert made.returncode == 0, made.stdout[-4000:] + made.stderr
            (folder / "built").touch()
    return folder
