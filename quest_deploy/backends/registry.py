"""The backends by name."""

from __future__ import annotations

from quest_deploy.backends.base import Backend
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


def get_backend(name: str) -> Backend:
    """The backend called ``name``; raise InputError where there is none."""
    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
