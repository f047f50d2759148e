"""TensorRT proper: all that differs from TensorRT for RTX. docs/status.md says what never ran."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quest_deploy.backends import cuda
from quest_deploy.backends.base import EngineRecord, PluginRecord
from quest_deploy.backends.options import AUTO, GATHERED, NATIVE, PLUGIN, EngineOptions
from quest_deploy.backends.tensorrt import base as shared
from quest_deploy.backends.tensorrt.plugin import (
    HINT,
    NAME,
    NAMESPACE,
    built_for,
    load_plugin,
    plugin_library,
    recorded_library,
)
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import sha256_of

if TYPE_CHECKING:
    import onnx_ir as ir

MAJORS = (10, 11)
"""The major versions whose API this is written for: 11 has no weakly typed networks, and 10 is the
first with IPluginV3.
"""


GATHERS = (10, 13)
"""The first version whose QuantizeLinear takes a scale that is no constant (NvInfer.h)."""
HAS_ATTENTION = (10, 14)
"""The first version whose parser takes ONNX's Attention (its changelog)."""
REFIT_DROPS_BIASES = (11, 3)
"""The version whose page on refitting engines has this known issue; 10.16's and 11.4's have not."""
SLOW_INT8 = ("103",)
"""Compute capabilities whose tensor cores have no INT8 in their own instructions, B300's: CUDA
13.0's ptxas takes tcgen05.mma with .kind::i8 for sm_100a and sm_110a, and refuses it for sm_103a.
What is left is Ampere's instruction: pytorch/pytorch#187094 measures INT8 products of a GB300 at 12
times the time of FP16's. Others from 10.0 on have INT8, as their instruction says, TensorRT's
release notes (10.10: faster INT8 convolutions on Blackwell) and the support matrix of TensorRT for
RTX (12.0).
"""


class TensorRtSdkBackend(shared.TensorRtBackend):
    """TensorRT: built on the GPU that runs the engine, with the plugin or natively."""

    name = "tensorrt"
    package = "tensorrt"
    remedy = "pip install 'quest-deploy[gpu]' on a machine with NVIDIA's TensorRT SDK"

    def resolve(self, options: EngineOptions) -> EngineOptions:
        """``auto`` is the plugin where its library is found."""
        if options.quantize in (NATIVE, GATHERED):
            return options
        library = plugin_library(options.plugins)
        if library is None and options.serialize_plugins:
            raise InputError(f"--serialize-plugins: no plugin library was found: {HINT}")
        if options.quantize == AUTO:
            options = replace(options, quantize=NATIVE if library is None else PLUGIN)
        return replace(options, plugins=library)

    def check_build(self, options: EngineOptions) -> None:
        self.check_options(options)
        options = self.resolve(options)
        trt = self._module()
        self._check_version(trt)
        here = _version_of(trt)
        if options.quantize == GATHERED and here < GATHERS:
            raise InputError(
                f"--quantize gathered: TensorRT {trt.__version__} takes constant scales alone; "
                f"{_name(GATHERS)} is the first that takes others; or --quantize native"
            )
        if options.fused_attention and here < HAS_ATTENTION:
            raise InputError(
                f"--fused-attention: TensorRT {trt.__version__} has no Attention; "
                f"{_name(HAS_ATTENTION)} is the first that has it"
            )
        if cuda.gpu_count() == 0:
            raise InputError(
                "tensorrt builds on the GPU that runs the engine, and this machine has none; use "
                "tensorrt-rtx here"
            )
        self.check_driver()
        self.check_builder(trt, options)
        _check_timing_cache(options)
        if options.quantize == PLUGIN:
            _check_plugin(trt, options)

    def check_graph(self, model: ir.Model, options: EngineOptions) -> None:
        super().check_graph(model, options)
        if cuda.gpu_count() and (here := cuda.gpu_compute_capability()) in SLOW_INT8:
            shared.messages.warning(
                "the tensor cores of compute capability %s.%s, this GPU's, have no INT8 in their "
                "own instructions: expect a smaller engine than in FP16, not a faster one; "
                "`quest-deploy benchmark` tells",
                here[:-1],
                here[-1],
            )
        if options.refittable and _version_of(self._module()) == REFIT_DROPS_BIASES:
            shared.messages.warning(
                "--refittable: TensorRT %s may drop biases of matrix products in such engines: "
                "`quest-deploy verify` tells",
                _name(REFIT_DROPS_BIASES),
            )

    def check_run(self, options: EngineOptions) -> None:
        super().check_run(options)
        self._check_version(self._module())

    def check_engine(self, record: EngineRecord) -> EngineOptions:
        options = super().check_engine(record)
        if options.quantize != PLUGIN or options.serialize_plugins:
            return options
        if record.plugin is None:
            raise InputError(
                "the engine's record does not say which plugin library it needs; run `quest-deploy "
                "build-engine` again"
            )
        return replace(options, plugins=recorded_library(options.plugins, record.plugin.sha256))

    def parser_passes(self, options: EngineOptions) -> list[ir.passes.InPlacePass]:
        """With the plugin, GEGLU goes into the quantizer behind it."""
        passes = super().parser_passes(options)
        if options.quantize != PLUGIN:
            return passes
        from exporters.passes.fuse_geglu import FuseGeglu

        return [*passes, FuseGeglu()]

    def hardware(self, options: EngineOptions) -> dict[str, Any]:
        return {
            "device": cuda.gpu_name(),
            "compute_capabilities": [cuda.gpu_compute_capability()],
            "driver": f"CUDA {cuda.driver_version()}",
        }

    def record(self, options: EngineOptions) -> dict[str, Any]:
        found = super().record(options)
        if options.quantize == PLUGIN and options.plugins is not None:
            found["plugin"] = PluginRecord(
                options.plugins.name, sha256_of(options.plugins), options.serialize_plugins
            )
        return found

    def _check_version(self, trt: Any) -> None:
        major = str(trt.__version__).partition(".")[0]
        if major not in map(str, MAJORS):
            raise InputError(
                "the tensorrt backend is written for TensorRT "
                f"{' and '.join(f'{m}.x' for m in MAJORS)}, and {trt.__version__} is "
                f"installed; {self.remedy}"
            )


def _version_of(trt: Any) -> tuple[int, ...]:
    return tuple(map(int, str(trt.__version__).split(".")[:2]))


def _name(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _check_plugin(trt: Any, options: EngineOptions) -> None:
    """Load the library once, before minutes are spent; raise InputError where TensorRT cannot."""
    if options.plugins is None:
        raise InputError(
            f"--quantize plugin: no library of the plugin {NAMESPACE}::{NAME} was found: {HINT}; "
            "or --quantize native"
        )
    built, here = built_for(options.plugins), int(trt.__version__.split(".")[0])
    if built not in (None, here):
        raise InputError(
            f"--quantize plugin: the plugin library {options.plugins} was built with the headers "
            f"of TensorRT {built}, and "
            f"{trt.__version__} is here: build it with that version's (trt_plugins/README.md); or "
            "--quantize native"
        )
    logger = shared.make_logger(trt)
    try:
        builder = shared.started(trt.Builder, logger)  # its registry goes with it
        load_plugin(builder.get_plugin_registry(), options.plugins, logger)
    except QuestDeployError as e:
        raise InputError(f"--quantize plugin: {e}") from e


def _check_timing_cache(options: EngineOptions) -> None:
    if options.timing_cache is None:
        return
    # It is read before the engine is built, and written after: nothing is made now, since a later
    # check may fail.
    path = options.timing_cache
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.exists() and not (path.is_file() and os.access(path, os.R_OK)):
        raise InputError(
            f"--timing-cache {path}: expected a regular file that can be read and written"
        )
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise InputError(
            f"--timing-cache {path}: expected a folder that can be written to, found {folder}"
        )
