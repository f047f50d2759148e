"""TensorRT and TensorRT for RTX: the same Python API in two packages.

TensorRT for RTX builds ahead of time on a machine without a GPU; TensorRT proper builds on the GPU it will run on.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quest_deploy.engine.base import LOWERED, Backend, EngineOptions, Runner, SplitRunner, input_arrays
from quest_deploy.errors import InputError, QuestDeployError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray

ENGINE = "model.engine"
RTX = "tensorrt_rtx"
_TYPES = {
    "Int8": "int8",
    "INT8": "int8",
    "BFloat16": "bf16",
    "BF16": "bf16",
    "Half": "fp16",
    "FP16": "fp16",
    "Float": "fp32",
    "FP32": "fp32",
}
"""How its layer information names types."""
DEFAULT_CAPABILITIES = ("80", "86", "89", "120")
"""Ampere, Ada and Blackwell. Not Turing ("75"): TensorRT for RTX refuses FP32 matrix products there."""


class TensorRtBackend(Backend):
    """One of the two flavours, by the module that provides it."""

    def __init__(self, name: str, package: str) -> None:
        self.name = name
        self.package = package

    def check_build(self, options: EngineOptions) -> None:
        trt = self._module()
        if self.package != RTX and gpu_count() == 0:
            raise InputError("tensorrt builds an engine on the GPU that will run it, and this machine has none; use tensorrt-rtx here")
        if self.package == RTX:
            for capability in options.compute_capabilities:
                _compute_capability(trt, capability)

    def check_run(self, options: EngineOptions) -> None:
        self._module()
        if gpu_count() == 0:
            raise InputError(f"{self.name} engines run on an NVIDIA GPU, and this machine has none; copy the workspace to one that has")

    def lower(self, model: ir.Model, *, frozen_bucket: int | None = None) -> ir.Model:
        from exporters.lower.tensorrt import lower

        return lower(model, frozen_bucket=frozen_bucket)

    def compile(self, lowered: Path, folder: Path, options: EngineOptions, on_progress: Callable[[str, int, int], None]) -> None:
        trt = self._module()
        logger = _logger(trt)
        monitor = _monitor(trt, on_progress)
        # From the first object that logs on: parsing calls back into Python too.
        with _interrupts_stop(monitor):
            builder = trt.Builder(logger)
            network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            parser = trt.OnnxParser(network, logger)
            if not parser.parse_from_file(str(lowered)):
                errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
                raise QuestDeployError(f"{self.name} cannot parse {lowered}: {errors}")
            config = builder.create_builder_config()
            config.progress_monitor = monitor
            # On by default, it rounds the float products' operands to 10 bits: what is not quantized is FP32, as on the other backends.
            config.clear_flag(trt.BuilderFlag.TF32)
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the engine can tell its layers' precisions
            _add_profile(builder, config, network, options.max_batch, lowered)
            if self.package == RTX:
                _target(trt, config, options.compute_capabilities)
            serialized = None if monitor.stopped else builder.build_serialized_network(network, config)
        if serialized is None:
            raise QuestDeployError(f"{self.name} cannot build {lowered}: {'; '.join(logger.problems[-3:]) or 'no reason given'}")
        (folder / ENGINE).write_bytes(bytes(serialized))

    def open(self, folder: Path, options: EngineOptions) -> Runner:
        return SplitRunner(_TensorRtRunner(folder / ENGINE, rtx=self.package == RTX), options.max_batch)

    def realised_precision(self, folder: Path, options: EngineOptions) -> dict[str, str]:
        """From the engine's own layer information; only a GPU that can run the engine can read it."""
        from exporters.graph_info import load_graph
        from exporters.multiplications import OPERATORS

        wanted = [node.name or "" for node in load_graph(folder / LOWERED).graph if node.op_type in OPERATORS]
        trt = self._module()
        engine = trt.Runtime(_logger(trt)).deserialize_cuda_engine((folder / ENGINE).read_bytes())
        if engine is None:
            raise QuestDeployError(
                f"{self.name} cannot load {folder / ENGINE} on this machine's GPU; run `quest-deploy build-engine` again"
            )
        told = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        return told_precisions(json.loads(told)["Layers"], wanted)

    def hardware(self, options: EngineOptions) -> dict[str, Any]:
        if self.package == RTX:
            return {"device": "GPU", "compute_capabilities": list(options.compute_capabilities or DEFAULT_CAPABILITIES)}
        return {"device": "GPU", "compute_capabilities": [gpu_compute_capability()]}

    def _module(self) -> Any:
        try:
            return importlib.import_module(self.package)
        except (ImportError, OSError) as e:  # the wheel may be there without its libraries
            extra = "cpu" if self.package == RTX else "gpu"
            raise InputError(
                f"the {self.name} backend needs the Python package {self.name} and its libraries ({e}): "
                f"pip install 'quest-deploy[{extra}]'" + ("" if extra == "cpu" else " on a machine with NVIDIA's TensorRT SDK")
            ) from e


def told_precisions(layers: list[Any], wanted: list[str]) -> dict[str, str]:
    """What each ``wanted`` node runs in, by its name, from TensorRT's layer information at detailed verbosity.

    A layer's metadata names the ONNX nodes it was made of. One that holds several multiplications does not tell what each runs in,
    so they are left out; so is a layer whose operands' types are not told.
    """
    names, found = set(wanted), {}
    for layer in (entry for entry in layers if isinstance(entry, dict)):
        made_of = [name for name in re.findall(r"\[ONNX Layer: ([^\]]+)\]", str(layer.get("Metadata", ""))) if name in names]
        operands = [str(entry.get("Format/Datatype", "")) for entry in layer.get("Inputs", [])[:2]]
        if isinstance(weights := layer.get("Weights"), dict):
            operands = [*operands[:1], str(weights.get("Type", ""))]
        types = [next((name for word, name in _TYPES.items() if word in operand), None) for operand in operands]
        if len(set(made_of)) == 1 and types and None not in types:
            found[made_of[0]] = "int8" if set(types) == {"int8"} else str(next(kind for kind in types if kind != "int8"))
    return found


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
    """The first GPU's compute capability, such as "90"; call it only where :func:`gpu_count` is positive."""
    cuda = ctypes.CDLL("libcuda.so.1")
    cuda.cuInit(0)
    values = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        value = ctypes.c_int(0)
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        values.append(str(value.value))
    return "".join(values)


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps errors for our own message instead of printing them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.problems: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.problems.append(message.strip())

    return Logger()


def _monitor(trt: Any, on_progress: Callable[[str, int, int], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes the builder's phases on; ``stopped`` ends the build at its next step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.stopped = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps
            on_progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            on_progress(phase_name, step + 1, self.totals.get(phase_name, step + 1))
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            total = self.totals.get(phase_name, 1)
            on_progress(phase_name, total, total)

    return Monitor()


@contextmanager
def _interrupts_stop(monitor: Any) -> Iterator[None]:
    """Let Ctrl-C stop the build through its monitor: a KeyboardInterrupt raised in a callback would be lost in C++."""
    if threading.current_thread() is not threading.main_thread():  # only there do signals arrive
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        monitor.stopped = True

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if monitor.stopped:
        raise KeyboardInterrupt


def _add_profile(builder: Any, config: Any, network: Any, max_batch: int, lowered: Path) -> None:
    """One profile: batches of up to ``max_batch``, the sample of the size that the model is meant for."""
    from exporters.graph_info import load_graph, sample_shape

    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        rest = list(tensor.shape)[1:]
        if -1 in rest:
            rest = list(sample_shape(load_graph(lowered)))
        profile.set_shape(tensor.name, [1, *rest], [min(2, max_batch), *rest], [max_batch, *rest])
    config.add_optimization_profile(profile)


def _target(trt: Any, config: Any, capabilities: tuple[str, ...]) -> None:
    names = capabilities or DEFAULT_CAPABILITIES
    config.num_compute_capabilities = len(names)
    for i, name in enumerate(names):
        config.set_compute_capability(_compute_capability(trt, name), i)


def _compute_capability(trt: Any, name: str) -> Any:
    members = trt.ComputeCapability.__members__
    if f"SM{name}" not in members:
        supported = ", ".join(n.removeprefix("SM") for n in members if n.startswith("SM"))
        raise InputError(f"unknown compute capability {name!r}: this TensorRT for RTX builds for {supported}")
    return members[f"SM{name}"]


class _TensorRtRunner(Runner):
    """Polygraphy's TrtRunner on the serialized engine."""

    def __init__(self, path: Path, *, rtx: bool) -> None:
        from polygraphy import config

        config.USE_TENSORRT_RTX = rtx  # before its TensorRT backend is imported; one flavour a process
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        self._runner = TrtRunner(EngineFromBytes(BytesFromPath(str(path))))
        self._runner.activate()

    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {name: value.copy() for name, value in self._runner.infer(input_arrays(feeds)).items()}

    def close(self) -> None:
        self._runner.deactivate()
