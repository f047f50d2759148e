"""ONNX Runtime: the exact reference among the backends; the engine is the lowered graph itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.engine.base import LOWERED, Backend, EngineOptions, Runner, input_arrays, require_package
from quest_deploy.errors import InputError, QuestDeployError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
SETTINGS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
"""What is not quantized is FP32: TF32, which is on by default, rounds the operands of float products to 10 bits."""


class OnnxRuntimeBackend(Backend):
    """``options.provider`` chooses the execution provider."""

    name = "onnxruntime"

    def check_build(self, options: EngineOptions) -> None:
        require_package("onnxruntime", "cpu", "building for onnxruntime")

    def check_run(self, options: EngineOptions) -> None:
        require_package("onnxruntime", "cpu", "running on onnxruntime")
        import onnxruntime

        available = onnxruntime.get_available_providers()
        if PROVIDERS[options.provider] not in available:
            raise InputError(
                f"onnxruntime has no provider {options.provider} on this machine (it has {', '.join(available)}); "
                "install 'quest-deploy[gpu]' on a machine with an NVIDIA GPU"
            )

    def lower(self, model: ir.Model, *, frozen_bucket: int | None = None) -> ir.Model:
        from exporters.lower.onnxruntime import lower

        return lower(model, frozen_bucket=frozen_bucket)

    def compile(self, lowered: Path, folder: Path, options: EngineOptions, on_progress: Callable[[str, int, int], None]) -> None:
        """Load it once: what onnxruntime refuses is refused now."""
        on_progress("loading into onnxruntime", 0, 1)
        check = EngineOptions(threads=options.threads) if options.provider != "cpu" else options
        _session(lowered, check)
        on_progress("loading into onnxruntime", 1, 1)

    def open(self, folder: Path, options: EngineOptions) -> Runner:
        return _OnnxRuntimeRunner(_session(folder / LOWERED, options))

    def hardware(self, options: EngineOptions) -> dict[str, Any]:
        return {**super().hardware(options), "device": options.provider}


def _session(path: Path, options: EngineOptions) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.log_severity_level = 3
    # By default a float activation that meets a dequantized weight is quantized to 8 bits, silently; such a layer computes in float.
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    provider = PROVIDERS[options.provider]
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=[(provider, SETTINGS.get(provider, {}))])
    except Exception as e:  # its exceptions share no base class but this one
        raise QuestDeployError(f"onnxruntime refuses {path}: {e}") from e
    if session.get_providers()[0] != provider:
        raise QuestDeployError(f"onnxruntime fell back from {provider} to {session.get_providers()[0]}; check its GPU libraries")
    return session


class _OnnxRuntimeRunner(Runner):
    def __init__(self, session: Any) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        try:
            outputs = self._session.run(self._outputs, input_arrays(feeds))
        except Exception as e:
            raise QuestDeployError(f"onnxruntime failed: {e}") from e
        return dict(zip(self._outputs, outputs, strict=True))
