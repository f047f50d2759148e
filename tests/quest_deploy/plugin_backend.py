"""TensorRT's lowerings on onnxruntime, which computes the plugin's op by its definition."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from exporters.lowering import tensorrt
from exporters.ops.timestep_quantize import OP_TYPE, function_body
from quest_deploy.backends.base import OneBucketRunner, Runner
from quest_deploy.backends.onnxruntime import OnnxRuntimeBackend
from quest_deploy.backends.options import AUTO, GATHERED, EngineOptions


class PluginOnTheCpu(OnnxRuntimeBackend):
    """Lowers as TensorRT's backend does, and gives onnxruntime the op's function in the plugin's
    place.
    """

    def check_options(self, options: EngineOptions) -> None:
        """It takes TensorRT's."""
        options.check_taken("tensorrt")

    def lower(
        self, model: ir.Model, options: EngineOptions, *, frozen_bucket: int | None = None
    ) -> ir.Model:
        quantize = "native" if options.quantize == AUTO else options.quantize
        lowered = tensorrt.lower(
            model, frozen_bucket=frozen_bucket, dtype=options.dtype, quantize=quantize
        )
        for node in kept(lowered):
            del node.attributes["plugin_namespace"], node.attributes["plugin_version"]
            function = function_body()
            lowered.functions[function.identifier()] = function
        return lowered

    def open(self, folder: Path, options: EngineOptions) -> Runner:
        """As TensorRT's backend runs it."""
        runner = super().open(folder, options)
        return OneBucketRunner(runner) if options.quantize == GATHERED else runner

    def kernels(self, lowered: ir.Model, options: EngineOptions) -> dict[str, int]:
        """As a GPU's."""
        return {}


def kept(model: ir.Model) -> list[ir.Node]:
    """The nodes that are the plugin's."""
    return [node for node in model.graph if node.op_type == OP_TYPE]
