"""ONNX Runtime: the exact reference among the backends; the engine is the lowered graph itself."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import logging
import os
import sys
import tempfile
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quest_deploy.backends import cuda
from quest_deploy.backends.base import LOWERED, Runner, input_arrays, input_shapes, reason_of
from quest_deploy.backends.cpu import CpuBackend
from quest_deploy.backends.options import EngineOptions
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import gathered

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from exporters.exactness import Exactness
    from quest_deploy.progress import Progress

logger = logging.getLogger(__name__)
# Since 1.29 its packages send the names and hashes of models to Microsoft unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
CUDA = (PROVIDERS["cuda"], {"use_tf32": "0"})
"""What is not quantized is FP32: TF32, which is on by default, rounds the operands of float
products to 10 bits.
"""
_KERNEL = "_kernel_time"
_INTEGER_KERNELS = (
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
)
_FLOAT_KERNELS = (
    "Conv",
    "ConvTranspose",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "Gemm",
    "MatMul",
    "MatMulNBits",
    "NhwcFusedConv",
)
"""MatMulNBits is one at the accuracy level that sessions ask for: it widens its weights."""
_FLOATS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class OnnxRuntimeBackend(CpuBackend):
    """``options.provider`` chooses the execution provider."""

    name = package = "onnxruntime"

    def check_run(self, options: EngineOptions) -> None:
        super().check_run(options)
        import onnxruntime

        available = onnxruntime.get_available_providers()
        if PROVIDERS[options.provider] not in available:
            raise InputError(
                f"onnxruntime has no provider {options.provider} on this machine (it has "
                f"{', '.join(available)}); "
                "install 'quest-deploy[gpu]' on a machine with an NVIDIA GPU"
            )
        if options.provider == "cpu":
            return
        if cuda.gpu_count() == 0:
            raise InputError(
                f"--provider {options.provider} runs on an NVIDIA GPU, and this machine has none"
            )
        if (missing := missing_library(options.provider)) is not None:
            raise InputError(
                f"onnxruntime {onnxruntime.__version__} cannot load its provider "
                f"{options.provider}: {missing}; "
                + (
                    "install the TensorRT of that number, such as `pip install 'tensorrt<11'` for "
                    "libnvinfer.so.10, in an environment of its own where another is in use"
                    if "libnv" in missing
                    else "install 'quest-deploy[gpu]', which brings CUDA's libraries"
                )
            )

    def on_cpu(self, options: EngineOptions) -> bool:
        return options.provider == "cpu"

    def lower_for(
        self,
        model: ir.Model,
        options: EngineOptions,
        exactness: Exactness,
        *,
        frozen_bucket: int | None = None,
    ) -> ir.Model:
        from exporters.lowering.onnxruntime import lower

        return lower(model, frozen_bucket=frozen_bucket, dtype=options.dtype, exactness=exactness)

    def compile(
        self,
        lowered: Path,
        folder: Path,
        options: EngineOptions,
        progress: Progress,
    ) -> None:
        """Load it once: what onnxruntime refuses is refused now."""
        try:
            self.check_run(options)
        except InputError as e:
            logger.warning("it is built, and another machine must run it: %s", e)
        progress("loading into onnxruntime", 0, 1)
        check = EngineOptions(threads=options.threads) if options.provider != "cpu" else options
        open_session(lowered, check)
        progress("loading into onnxruntime", 1, 1)

    def open(self, folder: Path, options: EngineOptions) -> Runner:
        return _OnnxRuntimeRunner(open_session(folder / LOWERED, options))

    def realised_precision(self, folder: Path, options: EngineOptions) -> dict[str, str]:
        """From the profile of one inference of one sample: which kernel ran, and the types of the
        operands that it was given.
        """
        import numpy as np

        from exporters.graph_info import load_graph
        from exporters.multiplications import multiplication_names

        lowered = load_graph(folder / LOWERED)
        feeds = {
            name: np.ones(shape, np.float32) for name, shape in input_shapes(lowered, 1).items()
        }
        with tempfile.TemporaryDirectory(prefix="quest-deploy-") as scratch:
            session = open_session(folder / LOWERED, options, profile=Path(scratch) / "profile")
            _OnnxRuntimeRunner(session).infer(feeds)
            events = json.loads(Path(session.end_profiling()).read_text())
        return profiled_precisions(events, multiplication_names(lowered))

    def float_reason(self, operator: str) -> str:
        if operator != "Conv":
            return ""
        return (
            "its integer convolutions are slower than float or round what they put out, and a "
            "grouped one is no matrix product"
        )

    def hardware(self, options: EngineOptions) -> dict[str, Any]:
        return {**super().hardware(options), "device": options.provider}


def profiled_precisions(events: list[dict[str, Any]], wanted: list[str]) -> dict[str, str]:
    """Return what each ``wanted`` node ran in, by its name: by the kernel that ran, and for a float
    one by the type of its first operand.

    A node that onnxruntime fused has the name of one that it was made of, and something behind it.
    """
    names, found = set(wanted), {}
    for event in (
        e for e in events if e.get("cat") == "Node" and str(e.get("name", "")).endswith(_KERNEL)
    ):
        ran, kernel = event["name"].removesuffix(_KERNEL), event["args"].get("op_name")
        name = (
            ran
            if ran in names
            else max(
                (n for n in names if ran.startswith((f"{n}_", f"{n}/"))), key=len, default=None
            )
        )
        if name is not None and kernel in _INTEGER_KERNELS:
            found[name] = "int8"
        elif name is not None and kernel in _FLOAT_KERNELS:
            kind = next(iter(event["args"]["input_type_shape"][0]))
            found[name] = _FLOATS.get(kind, kind)
    return found


def missing_library(provider: str) -> str | None:
    """Why onnxruntime cannot load a GPU provider, such as a library of TensorRT's that it was
    built for; None where it can. It would only log that, and run on the CPU.
    """
    import onnxruntime

    load_gpu_libraries(provider)
    library = Path(onnxruntime.__file__).parent / "capi" / f"libonnxruntime_providers_{provider}.so"
    try:
        ctypes.CDLL(str(library), os.RTLD_LAZY)
    except OSError as e:
        return str(e)
    return None


@functools.cache  # what it does not find it would tell for each of a verification's parts
def load_gpu_libraries(provider: str) -> None:
    """Load what a GPU provider is linked with, from Python packages, where the linker does not
    look.
    """
    import onnxruntime

    with redirect_stdout(sys.stderr):  # it prints what it does not find
        onnxruntime.preload_dlls()
    if provider == "tensorrt":
        with suppress(ImportError, OSError):  # NVIDIA's SDK may be where the linker looks
            importlib.import_module("tensorrt")


def providers_of(graph: Path, options: EngineOptions) -> list[tuple[str, dict[str, str]]]:
    """The execution providers of a session, with their settings; what the first does not take goes
    to the next.

    TensorRT 10 wants to be told of each type that a graph has (microsoft/onnxruntime#13381), and
    of INT8 only where there are QuantizeLinear and DequantizeLinear (#10743).
    """
    if options.provider != "tensorrt":
        return [CUDA if options.provider == "cuda" else (PROVIDERS["cpu"], {})]
    from exporters.graph_info import load_graph

    quantized = any(node.op_type == "DequantizeLinear" for node in load_graph(graph).graph)
    types = {"int8": quantized, "fp16": options.dtype == "fp16", "bf16": options.dtype == "bf16"}
    settings = {f"trt_{name}_enable": str(int(on)) for name, on in types.items()}
    return [(PROVIDERS["tensorrt"], settings), CUDA]


def open_session(path: Path, options: EngineOptions, profile: Path | None = None) -> Any:
    """An onnxruntime.InferenceSession of the graph at ``path``, with the settings that every engine
    runs with.

    Args:
        profile: write what each node took, and which kernel ran it, to a file whose name begins so.

    Raises:
        QuestDeployError: onnxruntime refuses the graph, or the provider cannot be used here.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.log_severity_level = 3
    # By default a float activation that meets a dequantized weight is quantized to 8 bits,
    # silently; such a layer computes in float.
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # The lowering has chosen the operands' types, for kernels that are exact here (see
    # AvoidSaturation): none is to be converted.
    settings.add_session_config_entry("session.qdqisint8allowed", "1")
    if profile is not None:
        settings.enable_profiling, settings.profile_file_prefix = True, str(profile)
    provider = PROVIDERS[options.provider]
    if options.provider != "cpu":
        load_gpu_libraries(options.provider)
    if options.provider == "tensorrt":  # TensorRT reads it; the provider has no setting for it
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    with gathered(path, f"{path.name}.data") as graph:
        try:
            # By default what fails on a GPU runs on the CPU instead, and standard output tells.
            session = onnxruntime.InferenceSession(
                str(graph), settings, providers=providers_of(graph, options), enable_fallback=False
            )
        except Exception as e:  # its exceptions share no base class but this one
            raise QuestDeployError(f"onnxruntime refuses {path}: {reason_of(e)}") from e
    if session.get_providers()[0] != provider:
        raise QuestDeployError(
            f"onnxruntime fell back from {provider} to {session.get_providers()[0]}; check its GPU "
            "libraries"
        )
    return session


class _OnnxRuntimeRunner(Runner):
    def __init__(self, session: Any) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        try:
            outputs = self._session.run(self._outputs, input_arrays(feeds))
        except Exception as e:
            raise QuestDeployError(f"onnxruntime failed: {reason_of(e)}") from e
        return dict(zip(self._outputs, outputs, strict=True))
