"""What this machine has, by the names that steps ask for."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quest_deploy.backends import cuda
from quest_deploy.backends.tensorrt.sdk import GATHERS, HAS_ATTENTION
from quest_deploy.errors import InputError
from scripts.acceptance.programs import ROOT, answer_of, words_of
from scripts.acceptance.steps import LINKED, OURS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from scripts.acceptance.programs import Run

MULTIARCH = f"{platform.machine()}-linux-gnu"
HEADER = "NvInferRuntime.h"
HEADERS = ("include", f"include/{MULTIARCH}", f"targets/{MULTIARCH}/include")
LIBRARIES = ("lib", f"lib/{MULTIARCH}", f"targets/{MULTIARCH}/lib", "lib64")
"""Where TensorRT's archive, Debian's packages and NVIDIA's containers have them."""
SYSTEM = (Path("/usr"), Path("/usr/local"))
PROGRAMS = ("cmake", "nvcc", "compute-sanitizer", "tritonserver")
CUDA_FOLDERS = ("bin", "compute-sanitizer")
TRITON = Path("/opt/tritonserver/bin")
"""Where NVIDIA's containers have the server."""
KERNEL_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Machine:
    """What was found here: by name its version, or why it is missing."""

    found: Mapping[str, str]
    missing: Mapping[str, str]

    def lines(self) -> Iterator[str]:
        """A line for each."""
        yield from (f"{name}: {version}" for name, version in self.found.items())
        yield from (f"no {name}: {reason}" for name, reason in self.missing.items())


@dataclass(frozen=True)
class TensorRtFiles:
    """TensorRT's headers, their version such as "11.4", and libnvinfer; None where they are not
    here. ``bundled`` says that the library is the one that Python's tensorrt brings.
    """

    headers: Path | None = None
    library: Path | None = None
    version: str = ""
    bundled: bool = False


@dataclass(frozen=True)
class Places:
    """Where things are, and how many times the steps' minutes they may take."""

    out: Path
    patience: float = 1.0
    tensorrt: TensorRtFiles = field(default_factory=TensorRtFiles)

    @property
    def names(self) -> dict[str, str]:
        """What commands' lines name."""
        json = importlib.util.find_spec("nlohmann_json")
        return {
            "out": str(self.out),
            "root": str(ROOT),
            "headers": str(self.tensorrt.headers or "TENSORRT_INCLUDE_DIR-NOTFOUND"),
            "library": str(self.tensorrt.library or "TENSORRT_LIBRARY-NOTFOUND"),
            "json": str(Path(json.origin).parent / "include")
            if json is not None and json.origin is not None
            else "NLOHMANN_JSON_INCLUDE_DIR-NOTFOUND",
            "capability": cuda.gpu_compute_capability() if cuda.gpu_count() else "none",
        }


def find_tensorrt(sdk: Path | None, environment: Mapping[str, str]) -> TensorRtFiles:
    """TensorRT's headers and library: those of ``sdk``, else those that the environment, the Python
    package or the system has.

    Raises:
        InputError: ``sdk`` has no headers.
    """
    roots = SYSTEM if sdk is None else (sdk,)
    given = environment.get("TENSORRT_INCLUDE_DIR")
    places = [Path(given)] if given and sdk is None else []
    headers = _holding(HEADER, [*places, *(root / place for root in roots for place in HEADERS)])
    if sdk is not None and headers is None:
        raise InputError(
            f"--sdk {sdk}: expected TensorRT's folder, with {HEADER} in {' or '.join(HEADERS)}"
        )
    package = importlib.util.find_spec("tensorrt_libs") if sdk is None else None
    bundled = list(package.submodule_search_locations or ()) if package is not None else []
    folders = [*map(Path, bundled), *(root / place for root in roots for place in LIBRARIES)]
    found = (x for folder in folders for x in sorted(folder.glob("libnvinfer.so*")))
    library = next(found, None)
    is_bundled = library is not None and str(library.parent) in bundled
    return TensorRtFiles(headers, library, _version_of(headers), is_bundled)


def _holding(name: str, folders: Iterable[Path]) -> Path | None:
    return next((folder for folder in folders if (folder / name).is_file()), None)


def _version_of(headers: Path | None) -> str:
    """As trt_plugins/cmake/tensorrt.cmake reads it."""
    file = None if headers is None else headers / "NvInferVersion.h"
    text = file.read_text() if file is not None and file.is_file() else ""
    pattern = r"define (?:NV_TENSORRT_{0}|TRT_{0}_ENTERPRISE) +(\d+)"
    parts = (re.search(pattern.format(part), text) for part in ("MAJOR", "MINOR"))
    return ".".join(part[1] for part in parts if part is not None)


def environment_of(sdk: Path | None) -> dict[str, str]:
    """This process's environment, in which programs find the SDK's libraries, CUDA's programs where
    its installer leaves them, and the checkout.
    """
    found = {**os.environ, "PYTHONPATH": str(ROOT)}
    if sdk is not None:
        places = [str(sdk / place) for place in LIBRARIES if (sdk / place).is_dir()]
        places += filter(None, [os.environ.get("LD_LIBRARY_PATH")])
        found["LD_LIBRARY_PATH"] = os.pathsep.join(places)
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    toolkits = [Path(home) for home in (*homes, "/usr/local/cuda") if home]
    places = [str(home / folder) for home in toolkits for folder in CUDA_FOLDERS]
    path = os.environ.get("PATH", os.defpath)
    found["PATH"] = os.pathsep.join(dict.fromkeys([path, *places, str(TRITON)]))
    return found


def find(run: Run, environment: Mapping[str, str], places: Places) -> Machine:
    """Say what is here."""
    found, missing = dict[str, str](), dict[str, str]()

    def note(name: str, version: str | None, reason: str) -> None:
        if version is None:
            missing[name] = reason
        else:
            found[name] = version

    gpu = cuda.gpu_count() > 0
    name = f"{cuda.gpu_name()}, compute capability {cuda.gpu_compute_capability()}" if gpu else None
    note("gpu", name, "the driver shows no NVIDIA GPU, or there is no driver")
    note("driver", _driver() if gpu else None, "there is no driver")
    doctor = answer_of(run(words_of("quest-deploy doctor --json", {}), environment, 300.0))
    if "backends" not in doctor:
        missing["doctor"] = f"`quest-deploy doctor` failed: {doctor.get('output')}"
    packages = doctor.get("machine", {}).get("versions", {})
    if "onnxruntime-gpu" in packages:
        packages["onnxruntime"] = f"onnxruntime-gpu {packages['onnxruntime-gpu']}"
    for backend, problems in doctor.get("backends", {}).items():
        if backend.startswith(("tensorrt", "onnxruntime --provider")):
            problem = problems["build"] or problems["run"]
            version = packages.get(backend.partition(" ")[0], "here")
            note(backend, None if problem else version, problem)
    for first in (GATHERS, HAS_ATTENTION):
        note(*_from(first, found.get("tensorrt"), missing.get("tensorrt", "doctor does not tell")))
    probe = "import torch as t; t.cuda.init(); print(t.__version__, t.version.cuda)"
    torch = run([sys.executable, "-c", probe], environment, 300.0)
    told = [line.strip() for line in torch.err.splitlines() if line.strip()]
    there = torch.code == 0 and gpu
    note("torch with CUDA", torch.out.strip() if there else None, told[-1] if told else "no GPU")
    files = places.tensorrt
    asked = "give --sdk, or the headers' folder as TENSORRT_INCLUDE_DIR"
    headers = f"{files.version} in {files.headers}" if files.headers else None
    note("tensorrt-headers", headers, asked)
    here = found.get("tensorrt")
    major, same = (
        here is not None and here.split(".")[:parts] == files.version.split(".")[:parts]
        for parts in (1, 2)
    )
    differ = f"the headers are {files.version or 'not here'}, tensorrt is {here or 'not here'}"
    note(OURS, files.version if major else None, differ)
    linked = files.library if here and (same or files.bundled) else None
    note(LINKED, str(linked) if linked else None, f"there is none, or {differ}")
    json = importlib.util.find_spec("nlohmann_json")
    note("nlohmann-json", "here" if json else None, "pip install nlohmann-json")
    for program in PROGRAMS:
        place = shutil.which(program, path=environment.get("PATH"))
        note(program, place, f"{program} is not on the path")
    space = next(place for place in (places.out, *places.out.parents) if place.exists())
    found["free disk"] = f"{shutil.disk_usage(space).free / 1e9:.0f} GB for {places.out}"
    return Machine(found, missing)


def _driver() -> str:
    """Its own version, where Linux tells, and the newest CUDA that it runs."""
    text = KERNEL_DRIVER.read_text() if KERNEL_DRIVER.is_file() else ""
    version = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return ", ".join([*([version[1]] if version else []), f"CUDA {cuda.driver_version()}"])


def _from(first: tuple[int, ...], here: str | None, reason: str) -> tuple[str, str | None, str]:
    """Whether TensorRT ``here`` is ``first`` or newer."""
    name = f"tensorrt {'.'.join(map(str, first))}"
    if here is None:
        return name, None, reason
    numbers = tuple(int(part) for part in re.findall(r"\d+", here)[:2])
    return name, here if numbers >= first else None, f"{here} is here"
