"""What is asked of CUDA, where a driver is made up."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polygraphy.cuda.cuda as polygraphys
import pytest

from quest_deploy.backends import cuda

DRIVER = """
#include <string.h>
struct memory { unsigned long long total, free, used; };
static int gpu;
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetPCIBusId(char* bus, int size, int device) {
    if (device != 0 || size < 13) return 1;
    strcpy(bus, "0000:4F:00.0");
    return 0;
}
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char* bus, void** handle) {
    *handle = &gpu;
    return strcmp(bus, "0000:4F:00.0");
}
int nvmlDeviceGetMemoryInfo(void* handle, struct memory* found) {
    found->used = 5ull << 32;
    return handle == &gpu ? RESULT : 1;
}
"""


def driver(folder: Path, result: int) -> ctypes.CDLL:
    """The driver's libraries and NVML in one; its memory is told where ``result`` is 0."""
    (folder / "driver.c").write_text(DRIVER)
    library = folder / f"driver-{result}.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f"-DRESULT={result}", folder / "driver.c", "-o", library],
        check=True,
    )
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize(("result", "expected"), [(0, 5 << 32), (3, None)])
def test_the_gpus_memory_is_what_nvml_tells_of_the_gpu_that_cuda_sees_first(
    result: int, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = driver(tmp_path, result)
    monkeypatch.setattr("ctypes.CDLL", lambda name: made_up)
    assert cuda.gpu_memory_in_use() == expected


def test_without_a_driver_nothing_tells_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert cuda.gpu_memory_in_use() is None


def test_polygraphy_finds_cudas_runtime_where_its_python_package_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    nvidia = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: nvidia)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/of/the/user")
    for _ in range(2):
        cuda.show_libraries()
    assert os.environ["LD_LIBRARY_PATH"] == f"/of/the/user{os.pathsep}{folder}"
    found = polygraphys._find_cuda_lib_dirs()
    assert found[:2] == ["/of/the/user", str(folder)]
