"""The first GPU as its driver shows it, and CUDA's libraries: without any package of CUDA's."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from contextlib import suppress
from importlib import metadata
from pathlib import Path


def gpu_count() -> int:
    """How many NVIDIA GPUs the driver shows; 0 without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def gpu_compute_capability() -> str:
    """The first GPU's compute capability, such as "90"; call it only where :func:`gpu_count` is
    positive.
    """
    cuda = ctypes.CDLL("libcuda.so.1")
    cuda.cuInit(0)
    values = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        value = ctypes.c_int(0)
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        values.append(str(value.value))
    return "".join(values)


def gpu_name() -> str:
    """The first GPU's name, such as "NVIDIA H200"; call it only where there is one."""
    cuda = ctypes.CDLL("libcuda.so.1")
    cuda.cuInit(0)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), 0)
    return name.value.decode(errors="replace")


def driver_version() -> str:
    """The newest CUDA that the driver runs, such as "13.0"."""
    version = ctypes.c_int(0)
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def major_of(package: str) -> int | None:
    """The major version of CUDA that an installed TensorRT is for, as the name of its package
    tells: 13 of tensorrt_cu13. None where none does, such as the SDK's.
    """
    for major in range(11, 20):
        with suppress(metadata.PackageNotFoundError):
            metadata.version(f"{package}_cu{major}")
            return major
    return None


def library_folders() -> list[Path]:
    """Where NVIDIA's Python packages, such as nvidia-cuda-runtime, have CUDA's libraries; the
    linker does not look there.
    """
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    return sorted(folder for place in places for folder in Path(place).glob("*/lib"))


def show_libraries() -> None:
    """Add those folders to LD_LIBRARY_PATH, where Polygraphy 0.53 looks for CUDA's runtime; it does
    not look where CUDA 13's package has it.
    """
    places = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    places += map(str, library_folders())
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(dict.fromkeys(filter(None, places)))


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def gpu_memory_in_use() -> int | None:
    """The bytes of the first GPU's memory that all processes hold together; None where nothing
    tells. NVML tells them, and is asked by the PCI bus: it counts GPUs that CUDA may not see.
    """
    try:
        cuda, nvml = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    bus, gpu, memory = ctypes.create_string_buffer(32), ctypes.c_void_p(), _Memory()
    told = (
        cuda.cuInit(0) == 0
        and cuda.cuDeviceGetPCIBusId(bus, len(bus), 0) == 0
        and nvml.nvmlInit_v2() == 0
        and nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(gpu)) == 0
        and nvml.nvmlDeviceGetMemoryInfo(gpu, ctypes.byref(memory)) == 0
    )
    return int(memory.used) if told else None
