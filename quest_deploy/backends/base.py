"""What a backend must offer, and how an engine folder is built, checked and opened.

An engine folder holds ``lowered.onnx``, what the backend compiled from it, and ``engine.json``:
what built it, from which graph, for which hardware, and the hash of every file, checked before
anything is loaded.
"""

from __future__ import annotations

import gc
import importlib.util
import platform
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quest_deploy import __version__
from quest_deploy.artifacts.schema import Positive, parse_document, validated
from quest_deploy.artifacts.workspace import versions
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import read_json, sha256_of, write_json
from quest_deploy.progress import no_progress

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from quest_deploy.progress import Progress

FORMAT = "quest-deploy engine"
VERSION = 1
ENGINE_FILE = "engine.json"
LOWERED = "lowered.onnx"
DTYPES = ("fp32", "fp16", "bf16")
HARDWARE_COMPATIBILITY_LEVELS = ("none", "ampere_plus", "same_compute_capability")
PROFILING_VERBOSITIES = ("detailed", "layer_names_only", "none")
QUANTIZE = ("auto", "plugin", "native")
PLUGIN = "plugin"
NATIVE = "native"
PROCESSORS = NATIVE_PROCESSOR, ANY_PROCESSOR = ("native", "any")
OPTION_NAMES = {"sample_sizes": "--sample-size", "workspace_limit": "--pool-limit"}
"""The options of `quest-deploy build-engine` that are not called as their attributes."""
REPAIR = "run `quest-deploy build-engine` again"


@dataclass(frozen=True)
class EngineOptions:
    """How to build and run an engine; each backend says which it takes.

    Those after ``dtype`` are TensorRT's, with Polygraphy's names.

    Attributes:
        provider: onnxruntime's execution provider: cpu, cuda or tensorrt.
        threads: CPU threads; 0 lets the backend choose.
        compute_capabilities: TensorRT for RTX's target GPUs, such as "89"; empty means Ampere, Ada
            and Blackwell.
        max_batch: the largest batch of a TensorRT engine's optimization profile; its runner splits
            larger ones.
        dtype: what an engine computes in where it does not compute in integers: fp32, fp16 or bf16.
        opt_batch: the batch that its optimization profiles are tuned for; None means 2.
        sample_sizes: heights and widths of the model's samples; empty means the graph's own.
            TensorRT has an optimization profile for each, TensorRT for RTX one from the least to
            the largest.
        workspace_limit: the most GPU memory in bytes that one layer may use for itself; None is all
            there is.
        refittable: whether another model's weights may be put into the engine.
        strip_plan: whether the engine's file is without weights, which :meth:`Backend.open` then
            takes from the lowered graph.
        timing_cache: a file of kernels' times, read before building, if it is there, and written
            after.
        version_compatible: whether later versions of TensorRT may run the engine.
        hardware_compatibility_level: none, ampere_plus or same_compute_capability: which other GPUs
            may run the engine.
        builder_optimization_level: how long to look for fast kernels, from 0 to 5.
        quantize: what quantizes activations: plugin (``quest::TimestepQuantize``, tensorrt alone),
            native (QuantizeLinear), or auto: the plugin where its library is found.
        plugins: the plugin library's path; None looks where
            :func:`quest_deploy.backends.tensorrt.plugin.plugin_library` says.
        serialize_plugins: whether the engine's file holds the plugin library too; needs
            ``version_compatible``.
        weight_streaming: whether weights may stay in the host's memory, to be fetched while the
            engine runs.
        weight_streaming_budget: the bytes of weights that then stay on the GPU; None lets TensorRT
            choose.
        tactic_sources: what TensorRT may take kernels from, by its own names, lower case; None is
            its default, empty is no extra one.
        max_num_tactics: how many kernels are timed for a layer; None lets TensorRT choose.
        profiling_verbosity: what the engine tells of its layers: detailed (their precisions too),
            layer_names_only or none.
        verbose: whether all that TensorRT logs while it builds goes to standard error.
        processor: the processors that a CPU engine shall be exact on: native, those that compute as
            this one does, or any.
    """

    provider: str = "cpu"
    threads: int = 0
    compute_capabilities: tuple[str, ...] = ()
    max_batch: int = 16
    dtype: str = "fp32"
    opt_batch: int | None = None
    sample_sizes: tuple[tuple[int, int], ...] = ()
    workspace_limit: int | None = None
    refittable: bool = False
    strip_plan: bool = False
    timing_cache: str | None = None
    version_compatible: bool = False
    hardware_compatibility_level: str | None = None
    builder_optimization_level: int | None = None
    quantize: str = "auto"
    plugins: str | None = None
    serialize_plugins: bool = False
    weight_streaming: bool = False
    weight_streaming_budget: int | None = None
    tactic_sources: tuple[str, ...] | None = None
    max_num_tactics: int | None = None
    profiling_verbosity: str = "detailed"
    verbose: bool = False
    processor: str = NATIVE_PROCESSOR

    def __post_init__(self) -> None:
        if self.provider not in ("cpu", "cuda", "tensorrt"):
            raise InputError(f"unknown provider {self.provider!r}: expected cpu, cuda or tensorrt")
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if self.threads < 0 or self.max_batch < 1:
            raise InputError("threads must be 0 or more and the largest batch 1 or more")
        if self.opt_batch is not None and not 1 <= self.opt_batch <= self.max_batch:
            raise InputError(
                f"the batch to tune for must be between 1 and the largest, {self.max_batch}, not "
                f"{self.opt_batch}"
            )
        if any(side < 1 for size in self.sample_sizes for side in size) or len(
            set(self.sample_sizes)
        ) < len(self.sample_sizes):
            raise InputError("sample sizes must be positive, and each one another")
        if self.workspace_limit is not None and self.workspace_limit < 1:
            raise InputError("the workspace's limit must be 1 byte or more")
        if self.builder_optimization_level not in (None, *range(6)):
            raise InputError(
                "the builder's optimization level must be from 0 to 5, not "
                f"{self.builder_optimization_level}"
            )
        if self.hardware_compatibility_level not in (None, *HARDWARE_COMPATIBILITY_LEVELS):
            raise InputError(
                f"unknown hardware compatibility level {self.hardware_compatibility_level!r}: "
                f"expected one of {', '.join(HARDWARE_COMPATIBILITY_LEVELS)}"
            )
        for option, value, known in (
            ("--quantize", self.quantize, QUANTIZE),
            ("--profiling-verbosity", self.profiling_verbosity, PROFILING_VERBOSITIES),
            ("--processor", self.processor, PROCESSORS),
        ):
            if value not in known:
                raise InputError(f"{option}: expected one of {', '.join(known)}, not {value!r}")
        if self.quantize == NATIVE and (self.plugins is not None or self.serialize_plugins):
            raise InputError(
                "--plugins and --serialize-plugins are for --quantize plugin; --quantize native "
                "uses no plugin"
            )
        if self.serialize_plugins and not self.version_compatible:
            raise InputError(
                "--serialize-plugins needs --version-compatible: TensorRT puts plugins into such "
                "engines alone"
            )
        if self.weight_streaming_budget is not None and (
            not self.weight_streaming or self.weight_streaming_budget < 0
        ):
            raise InputError(
                "--weight-streaming-budget needs --weight-streaming, and 0 bytes or more"
            )
        if self.max_num_tactics is not None and self.max_num_tactics < 1:
            raise InputError(f"--max-num-tactics: expected 1 or more, not {self.max_num_tactics}")

    def given(self, attributes: Iterable[str]) -> list[str]:
        """Those of ``attributes`` that are not the default."""
        defaults = EngineOptions()
        return [name for name in attributes if getattr(self, name) != getattr(defaults, name)]


def option_name(attribute: str) -> str:
    """What `quest-deploy build-engine` calls an attribute of EngineOptions."""
    return OPTION_NAMES.get(attribute, f"--{attribute.replace('_', '-')}")


@validated("an engine's runtime")
@dataclass(frozen=True)
class Runtime:
    """The Python module, and its version, that built a TensorRT engine."""

    name: str
    version: str


@validated("an engine's plugin library")
@dataclass(frozen=True)
class PluginRecord:
    """The plugin library that an engine needs: its file's name and hash, and whether the engine
    holds it.
    """

    library: str
    sha256: str
    serialized: bool


@validated("engine's record")
@dataclass(frozen=True)
class EngineRecord:
    """What ``engine.json`` says of an engine, besides its format and version.

    Attributes:
        options: what it was built with.
        built_by: versions, by package.
        graph_sha256: the portable graph's.
        sample_multiple: what heights and widths of samples are multiples of.
        hardware: see :meth:`Backend.hardware`.
        files: the SHA-256 of each file, by name.
        kernels: see :meth:`Backend.kernels`; None in engines of earlier versions.
        exact_integers: of a CPU's engine, what its runtime computes exactly.
        runtime, plugin: of a TensorRT engine.
    """

    backend: str
    options: EngineOptions
    built_by: dict[str, str]
    graph_sha256: str
    checkpoint_sha256: str
    sample_multiple: Positive
    hardware: dict[str, Any]
    files: dict[str, str]
    kernels: dict[str, int] | None = None
    exact_integers: dict[str, int] | None = None
    runtime: Runtime | None = None
    plugin: PluginRecord | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as ``engine.json`` has it."""
        fields = {key: value for key, value in asdict(self).items() if value is not None}
        return {"format": FORMAT, "version": VERSION, **fields}


class Runner(ABC):
    """A loaded engine; a context manager, since it may hold a device's memory."""

    @abstractmethod
    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once: the inputs by name, in the graph's dtypes, to the outputs by name."""

    def close(self) -> None:  # noqa: B027 - most backends free their memory with the object
        """Free what the engine holds."""

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class SplitRunner(Runner):
    """Runs a batch of any size on a runner that takes at most ``max_batch`` rows: in parts, one
    after the other.
    """

    def __init__(self, runner: Runner, max_batch: int) -> None:
        self._runner, self._max_batch = runner, max_batch

    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every input and every output has the batch in axis 0."""
        rows = max(len(value) for value in feeds.values())
        if rows <= self._max_batch:
            return self._runner.infer(feeds)
        starts = range(0, rows, self._max_batch)
        parts = [
            self._runner.infer(
                {name: value[i : i + self._max_batch] for name, value in feeds.items()}
            )
            for i in starts
        ]
        import numpy as np  # the program's help needs none

        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def close(self) -> None:
        self._runner.close()


class Backend(ABC):
    """A runtime that quest-deploy builds engines for. Importing its package is left to the
    methods.
    """

    name: str
    compile_only_checks = False
    """Whether :meth:`compile` writes nothing, since :meth:`open` compiles."""

    @abstractmethod
    def check_build(self, options: EngineOptions) -> None:
        """Raise InputError, saying what to install, where this machine cannot build with
        ``options``.
        """

    @abstractmethod
    def check_run(self, options: EngineOptions) -> None:
        """Raise InputError where this machine cannot run such engines."""

    def check_graph(self, model: ir.Model, options: EngineOptions) -> None:  # noqa: B027 - most backends build any graph with any options
        """Raise InputError where the portable graph ``model`` cannot be built with ``options``."""

    def resolve(self, options: EngineOptions) -> EngineOptions:
        """``options`` with what depends on this machine settled: they are what an engine's record
        keeps.
        """
        return options

    def check_engine(self, record: EngineRecord) -> EngineOptions:
        """The options to run an engine with, from its record.

        Raises:
            InputError: this machine cannot run it.
        """
        self.check_run(record.options)
        return record.options

    @abstractmethod
    def lower(
        self, model: ir.Model, options: EngineOptions, *, frozen_bucket: int | None = None
    ) -> ir.Model:
        """Rewrite the portable graph for this backend, in place; ``frozen_bucket`` makes its scales
        static.
        """

    @abstractmethod
    def compile(
        self,
        lowered: Path,
        folder: Path,
        options: EngineOptions,
        progress: Progress,
    ) -> None:
        """Compile the lowered ONNX file into files of ``folder``."""

    @abstractmethod
    def open(self, folder: Path, options: EngineOptions) -> Runner:
        """Load what :meth:`compile` wrote, beside the lowered graph, in ``folder``. The runner
        takes batches of any size.
        """

    def open_segments(self, folder: Path, options: EngineOptions) -> Runner:
        """As :meth:`open`, for the float parts of a graph, cut out to be verified."""
        return self.open(folder, options)

    @abstractmethod
    def realised_precision(self, folder: Path, options: EngineOptions) -> dict[str, str]:
        """What each Conv and matrix product of the lowered graph in ``folder`` runs in, by the name
        of its node.

        "int8", "fp32", "fp16" or "bf16", as the runtime itself tells it; a node that it does not
        name is left out.

        Raises:
            InputError: this machine cannot tell.
        """

    def float_reason(self, operator: str) -> str:
        """Why an integer layer of this ``operator`` (Conv, MatMul) runs in float on this backend;
        empty where none is known.
        """
        return ""

    def hardware(self, options: EngineOptions) -> dict[str, Any]:
        """What an engine built with ``options`` runs on."""
        return {"device": "CPU", "machine": platform.machine(), "processor": processor_name()}

    def kernels(self, lowered: ir.Model, options: EngineOptions) -> dict[str, int]:
        """The integer kernels that the engine of ``lowered`` needs to be exact (see
        ``exporters.exactness``); none on a GPU.
        """
        return {}

    def record(self, options: EngineOptions) -> dict[str, Any]:
        """What else the record of an engine built with ``options`` holds, by the names of
        :class:`EngineRecord`.
        """
        return self.answers(options)

    def answers(self, options: EngineOptions) -> dict[str, Any]:
        """What this machine answered and the engine's form depends on, of JSON's types."""
        return {}


def processor_name() -> str:
    """The CPU's name as Linux gives it, or what Python knows."""
    name = _cpuinfo("model name")
    return platform.processor() if name is None else name


def _cpuinfo(key: str) -> str | None:
    """What Linux tells of the first CPU under ``key``; None where it does not."""
    try:
        with Path("/proc/cpuinfo").open() as stream:
            return next(
                (line.split(":", 1)[1].strip() for line in stream if line.startswith(key)), None
            )
    except OSError:
        return None


def cpu_flags() -> tuple[str, ...]:
    """The CPU's features as Linux names them (x86's flags, Arm's Features); empty where it does not
    tell.
    """
    return tuple((_cpuinfo("flags") or _cpuinfo("Features") or "").split())


def integer_instructions() -> tuple[str, ...]:
    """The CPU's instructions for 8-bit integer products, as Linux names them; empty where it has
    none or does not tell.
    """
    known = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
    return tuple(flag for flag in cpu_flags() if flag in known)


def input_shapes(model: ir.Model, batch: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the graph's inputs, by name, the sample of the size that the model is meant
    for.
    """
    from exporters.graph_info import sample_shape

    shapes = {
        value.name or "": (
            batch,
            *(size for size in list(value.shape or [])[1:] if isinstance(size, int)),
        )
        for value in model.graph.inputs
    }
    return shapes | {"sample": (batch, *sample_shape(model))}


def build_engine(
    backend: Backend,
    model: ir.Model,
    folder: Path,
    options: EngineOptions,
    graph_sha256: str,
    progress: Progress = no_progress,
) -> EngineRecord:
    """Lower ``model`` (changed in place), compile it into ``folder`` and write its
    ``engine.json``.
    """
    from onnx_ir.passes import InvariantError, PassError

    from exporters.graph_info import graph_info, save_graph

    options = backend.resolve(options)
    backend.check_build(options)
    info = graph_info(model)
    backend.check_graph(model, options)
    try:
        lowered = backend.lower(model, options)
    except (PassError, InvariantError) as e:
        raise QuestDeployError(
            f"the graph cannot be lowered for {backend.name}: {e}; run `quest-deploy export` again"
        ) from e
    kernels = backend.kernels(lowered, options)
    save_graph(lowered, folder / LOWERED)
    del model, lowered  # a gigabyte for Stable Diffusion, while the backend holds its own copy
    gc.collect()
    backend.compile(folder / LOWERED, folder, options, progress)
    record = EngineRecord(
        backend=backend.name,
        options=options,
        built_by={"quest-deploy": __version__, **versions()},
        graph_sha256=graph_sha256,
        checkpoint_sha256=info.checkpoint_sha256,
        sample_multiple=info.sample_multiple,
        hardware=backend.hardware(options),
        kernels=kernels,
        files={path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        **backend.record(options),
    )
    write_json(folder / ENGINE_FILE, record.to_json())
    return record


def open_engine(backend: Backend, folder: Path) -> Runner:
    """Check an engine folder's every file against its ``engine.json``, then load it.

    Raises:
        InputError: no engine, one of another version or backend, a changed file, or a machine that
            cannot run it.
    """
    options = engine_options(backend, folder)
    for name in changed_files(folder, engine_info(folder)):
        raise InputError(f"{folder / name} is missing or was changed since it was built; {REPAIR}")
    return backend.open(folder, options)


def engine_options(backend: Backend, folder: Path) -> EngineOptions:
    """The options to run the engine in ``folder`` with; raise InputError where there is none that
    this machine can run.
    """
    record = engine_info(folder)
    if record.backend != backend.name:
        raise InputError(
            f"{folder}: expected an engine of {backend.name}, found one of {record.backend}"
        )
    return backend.check_engine(record)


def engine_info(folder: Path) -> EngineRecord:
    """What ``engine.json`` says; raise InputError where there is none, or one that is damaged or
    of another version.
    """
    path = folder / ENGINE_FILE
    content = read_json(path, repair=REPAIR)
    return parse_document(EngineRecord, content, FORMAT, VERSION, str(path), REPAIR)


def changed_files(folder: Path, record: EngineRecord) -> list[str]:
    """The engine's files that are missing or not as they were built."""
    return [
        n
        for n, digest in record.files.items()
        if not (folder / n).is_file() or sha256_of(folder / n) != digest
    ]


def require_package(package: str, extra: str, purpose: str) -> None:
    """Raise InputError where ``package`` cannot be imported, naming the extra that brings it."""
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"{purpose} needs the Python package {package}, which is not installed: pip install "
            f"'quest-deploy[{extra}]'"
        )


def input_arrays(feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """The feeds as C-contiguous arrays, which every runtime takes without a copy of its own."""
    import numpy as np

    return {name: np.ascontiguousarray(value) for name, value in feeds.items()}
