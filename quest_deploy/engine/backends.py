"""The backends by name."""

from __future__ import annotations

from quest_deploy.engine.base import Backend
from quest_deploy.engine.onnxruntime import OnnxRuntimeBackend
from quest_deploy.engine.openvino import OpenVinoBackend
from quest_deploy.engine.tensorrt import TensorRtBackend
from quest_deploy.errors import InputError

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        OpenVinoBackend(),
        OnnxRuntimeBackend(),
        TensorRtBackend("tensorrt-rtx", "tensorrt_rtx"),
        TensorRtBackend("tensorrt", "tensorrt"),
    )
}


def get_backend(name: str) -> Backend:
    """The backend called ``name``; raise InputError where there is none."""
    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
