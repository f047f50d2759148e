"""OpenVINO on the CPU: convolutions and linears as true INT8.

The engine is the lowered graph itself: OpenVINO's own format would store the INT4 weights as INT8, twice the size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.engine.base import LOWERED, Backend, EngineOptions, Runner, input_arrays, require_package
from quest_deploy.errors import QuestDeployError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray


class OpenVinoBackend(Backend):
    """FP32 where it is not INT8: on CPUs with bf16, OpenVINO would otherwise use that unasked."""

    name = "openvino"
    package = "openvino"

    def check_build(self, options: EngineOptions) -> None:
        require_package("openvino", "cpu", "building for openvino")

    def check_run(self, options: EngineOptions) -> None:
        require_package("openvino", "cpu", "running on openvino")

    def lower(self, model: ir.Model, *, frozen_bucket: int | None = None) -> ir.Model:
        from exporters.lower.openvino import lower

        return lower(model, frozen_bucket=frozen_bucket)

    def compile(self, lowered: Path, folder: Path, options: EngineOptions, on_progress: Callable[[str, int, int], None]) -> None:
        """Compile it once: what openvino refuses is refused now."""
        on_progress("compiling with openvino", 0, 1)
        _compiled(lowered, options)
        on_progress("compiling with openvino", 1, 1)

    def open(self, folder: Path, options: EngineOptions) -> Runner:
        return _OpenVinoRunner(_compiled(folder / LOWERED, options))


def _compiled(path: Path, options: EngineOptions) -> Any:
    import openvino

    core = openvino.Core()
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if options.threads:
        config["INFERENCE_NUM_THREADS"] = options.threads
    try:
        return core.compile_model(core.read_model(path), "CPU", config)
    except RuntimeError as e:
        raise QuestDeployError(f"openvino refuses {path}: {e}") from e


class _OpenVinoRunner(Runner):
    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._outputs = [output.get_any_name() for output in compiled.outputs]

    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        # A copy: the request's own output memory is overwritten by the next call.
        results = self._request.infer(input_arrays(feeds))
        return {name: results[i].copy() for i, name in enumerate(self._outputs)}
