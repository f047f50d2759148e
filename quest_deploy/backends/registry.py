"""The backends by name."""

from __future__ import annotations

from quest_deploy.backends.base import (
    NATIVE_PROCESSOR,
    Backend,
    EngineOptions,
    option_name,
)
from quest_deploy.backends.cpu import CpuBackend
from quest_deploy.backends.onnxruntime import OnnxRuntimeBackend
from quest_deploy.backends.openvino.backend import OpenVinoBackend
from quest_deploy.backends.tensorrt.base import TensorRtRtxBackend
from quest_deploy.backends.tensorrt.sdk import TensorRtSdkBackend
from quest_deploy.errors import InputError

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        OpenVinoBackend(),
        OnnxRuntimeBackend(),
        TensorRtRtxBackend(),
        TensorRtSdkBackend(),
    )
}


TENSORRT_OPTIONS = (
    "serialize_plugins",
    "weight_streaming_budget",
    "opt_batch",
    "sample_sizes",
    "workspace_limit",
    "refittable",
    "strip_plan",
    "timing_cache",
    "version_compatible",
    "hardware_compatibility_level",
    "builder_optimization_level",
    "quantize",
    "plugins",
    "weight_streaming",
    "tactic_sources",
    "max_num_tactics",
    "profiling_verbosity",
    "verbose",
)


def check_options(name: str, options: EngineOptions) -> None:
    """Raise InputError where ``options`` hold what the backend called ``name`` would ignore."""
    if not name.startswith("tensorrt"):
        for option in options.given(TENSORRT_OPTIONS):
            raise InputError(f"{option_name(option)} is TensorRT's, and the backend is {name}")
    if options.provider != "cpu" and name != "onnxruntime":
        raise InputError(f"--provider is onnxruntime's, and the backend is {name}")
    if options.processor != NATIVE_PROCESSOR and not isinstance(BACKENDS[name], CpuBackend):
        raise InputError(f"--processor is for CPUs, and the backend is {name}")
    if options.compute_capabilities and name != "tensorrt-rtx":
        raise InputError(f"--compute-capability is tensorrt-rtx's, and the backend is {name}")


def get_backend(name: str) -> Backend:
    """The backend called ``name``; raise InputError where there is none."""
    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
