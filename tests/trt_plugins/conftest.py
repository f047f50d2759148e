from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import nlohmann_json
import numpy as np
import onnx_ir as ir
import pytest

from exporters.graph_info import save_graph
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import GRAPH, Workspace
from quest_deploy.backends.base import build_engine
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.tensorrt import base as shared
from quest_deploy.files import sha256_of

if TYPE_CHECKING:
    import onnx

    from quest_deploy.progress import Progress

PLUGINS = Path(__file__).parents[2] / "trt_plugins"
HEADERS = "TENSORRT_INCLUDE_DIR"
RUNTIME = PLUGINS / "runtime"
JSON_HEADERS = Path(nlohmann_json.__file__).parent / "include"
INCLUDES = (f"-I{RUNTIME / 'include'}", "-isystem", str(JSON_HEADERS))
RTX = "tensorrt-rtx"
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


class _Unbuilt(shared.TensorRtRtxBackend):
    """Does all but build: no engine is loaded here."""

    def compile(
        self,
        lowered: Path,
        folder: Path,
        options: EngineOptions,
        progress: Progress,
    ) -> None:
        (folder / shared.ENGINE).write_bytes(np.random.default_rng(0).bytes(100_003))


@pytest.fixture(scope="session")
def built(small_proto: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with an engine of TensorRT for RTX as quest-deploy records it, its plan made up;
    not to be changed.
    """
    root = tmp_path_factory.mktemp("built") / "workspace"
    workspace = Workspace.create(root, "emoji", Scheme.parse("w4a4", buckets=3))
    model = ir.from_proto(small_proto)
    save_graph(model, root / GRAPH)
    workspace.record(
        "export",
        inputs=(),
        options={},
        files=[root / GRAPH],
        details={"share": 0.1 + 0.2, "name": "Grüße 🙂"},
    )
    folder = root / "engines" / RTX
    folder.mkdir(parents=True)
    options = EngineOptions(compute_capability=("89",), max_batch=4)
    build_engine(_Unbuilt(), model, folder, options, sha256_of(root / GRAPH))
    workspace.record(
        f"build-engine/{RTX}",
        inputs=("export",),
        options={},
        files=sorted(folder.iterdir()),
        details={},
    )
    return root
