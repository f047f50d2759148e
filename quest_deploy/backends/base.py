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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, SupportsIndex

from quest_deploy import __version__
from quest_deploy.artifacts.schema import Positive, parse_document, validated
from quest_deploy.artifacts.workspace import versions
from quest_deploy.backends.options import EngineOptions
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import read_json, sealed, sha256_of, write_json
from quest_deploy.progress import no_progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from quest_deploy.progress import Progress

FORMAT = "quest-deploy engine"
VERSION = 2
ENGINE_FILE = "engine.json"
LOWERED = "lowered.onnx"
BLOBS = "*.blob"
"""What openvino compiled, beside the graph."""
REPAIR = "run `quest-deploy build-engine` again, or `quest-deploy build-parts`, whichever built it"


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
        checkpoint_sha256: None of a text encoder or a VAE, whose weights are in no checkpoint.
        sample_multiple: what heights and widths of samples are multiples of.
        hardware: see :meth:`Backend.hardware`.
        files: the SHA-256 of each file, by name.
        kernels: see :meth:`Backend.kernels`; None in engines of earlier versions.
        exact_integers: of a CPU's engine, what its runtime computes exactly.
        measured_on: the runtime and the processor that gave this answer, where a machine was asked.
        runtime, plugin: of a TensorRT engine.
        refitted_from: the ``graph_sha256`` of the engine whose plan this one's weights were put
            into; None where it was built.
    """

    backend: str
    options: EngineOptions
    built_by: dict[str, str]
    graph_sha256: str
    hardware: dict[str, Any]
    files: dict[str, str]
    checkpoint_sha256: str | None = None
    sample_multiple: Positive = 1
    kernels: dict[str, int] | None = None
    exact_integers: dict[str, int] | None = None
    measured_on: str | None = None
    runtime: Runtime | None = None
    plugin: PluginRecord | None = None
    refitted_from: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as ``engine.json`` has it, but for its hash."""
        fields = {key: value for key, value in asdict(self).items() if value is not None}
        return {"format": FORMAT, "version": VERSION, **fields, "options": self.options.to_json()}


class Runner(ABC):
    """A loaded engine; a context manager, since it may hold a device's memory."""

    @abstractmethod
    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once: the inputs by name, in the graph's dtypes, to the outputs by name."""

    def prepare(self) -> None:  # noqa: B027 - most backends are ready when they are open
        """Begin, in the background, what the first run would wait for."""

    def close(self) -> None:  # noqa: B027 - most backends free their memory with the object
        """Free what the engine holds."""

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class OpenEngine:
    """What calls a runner and closes it; a context manager.

    Attributes:
        openers: what opens an engine, for the message.
    """

    openers = "quest_deploy.load_pipeline"
    _runner: Runner

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Raise InputError: the runtime's memory cannot be copied."""
        raise InputError(
            "an open engine cannot be copied or pickled (copy.deepcopy, pickle, torch.save): share "
            "it, as type(pipeline)(**pipeline.components) does, or open it once more, also in "
            f"another process, with {self.openers}"
        )

    def prepare(self) -> None:
        """Begin, in the background, what the first run would wait for."""
        self._runner.prepare()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._runner.close()


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


class OneBucketRunner(Runner):
    """Runs a batch of any timesteps on a runner that takes batches of one bucket: the rows of each
    timestep, or of each bucket where a graph reads that, one after the other.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every input and every output has the batch in axis 0."""
        import numpy as np  # the program's help needs none

        chosen = next((feeds[name] for name in ("timestep", "bucket") if name in feeds), None)
        if chosen is None or (chosen == chosen[0]).all():
            return self._runner.infer(feeds)
        outputs: dict[str, NDArray[Any]] = {}
        for value in np.unique(chosen):
            rows = chosen == value
            part = self._runner.infer({name: feed[rows] for name, feed in feeds.items()})
            for name, output in part.items():
                whole = np.empty((len(chosen), *output.shape[1:]), output.dtype)
                outputs.setdefault(name, whole)[rows] = output
        return outputs

    def close(self) -> None:
        self._runner.close()


class Backend(ABC):
    """A runtime that quest-deploy builds engines for. Importing its package is left to the
    methods.
    """

    name: str
    compile_only_checks = False
    """Whether :meth:`open` needs nothing that :meth:`compile` writes, since it compiles itself."""
    low_precision_graph = True
    """Whether a low precision of the options is in the graph, and not the runtime's own choice."""

    def check_options(self, options: EngineOptions) -> None:
        """Raise InputError where ``options`` hold what this backend does not take."""
        options.check_taken(self.name)

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

    def refit(
        self, base: Path, folder: Path, options: EngineOptions, changed: Sequence[str]
    ) -> None:
        """Write into ``folder`` what :meth:`compile` wrote into ``base``, with the weights of the
        lowered graph that is in ``folder``.

        Args:
            changed: the initializers whose values are not those of the lowered graph in ``base``.

        Raises:
            InputError: the engine has one of them fixed, where it would stay as it was.
            QuestDeployError: the runtime cannot exchange them.
        """
        raise InputError(f"--refit-from: {self.name} exchanges no engine's weights")

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
        """Return what each Conv and matrix product of the lowered graph in ``folder`` runs in, by
        the name of its node.

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

    def on_cpu(self, options: EngineOptions) -> bool:
        """Whether an engine of ``options`` runs on the CPU."""
        return False

    def hardware(self, options: EngineOptions) -> dict[str, Any]:
        """Return what an engine built with ``options`` runs on."""
        return {"device": "CPU", "machine": platform.machine(), "processor": processor_name()}

    def kernels(self, lowered: ir.Model, options: EngineOptions) -> dict[str, int]:
        """The integer kernels that the engine of ``lowered`` needs to be exact (see
        ``exporters.exactness``); none on a GPU.
        """
        return {}

    def record(self, options: EngineOptions) -> dict[str, Any]:
        """Return what else the record of an engine built with ``options`` holds, by the names of
        :class:`EngineRecord`.
        """
        return self.answers(options)

    def answers(self, options: EngineOptions) -> dict[str, Any]:
        """Return what this machine answered and the lowered graph depends on, of JSON's types."""
        return {}


def processor_name() -> str:
    """The CPU's name as Linux gives it, or what Python knows."""
    name = _cpuinfo("model name")
    return platform.processor() if name is None else name


def _cpuinfo(key: str) -> str | None:
    """Return what Linux tells of the first CPU under ``key``; None where it does not."""
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
    for, if it has one, and the tokens as many.
    """
    from exporters.graph_info import sample_shape, size_divisors, usual_tokens

    tokens = usual_tokens(model) or 0
    shapes: dict[str, tuple[int, ...]] = {
        value.name or "": (
            batch,
            *(size if isinstance(size, int) else tokens for size in list(value.shape or [])[1:]),
        )
        for value in model.graph.inputs
    }
    if "sample" not in shapes:
        return shapes
    sample = sample_shape(model)
    for name, divisor in size_divisors(model).items():
        shapes[name] = (*shapes[name][:2], *(side // divisor for side in sample[1:]))
    return shapes | {"sample": (batch, *sample)}


def check_sizes(
    name: str, sizes: Sequence[int | None], shape: Sequence[int], hint: str = ""
) -> None:
    """Raise InputError, whose message ends with ``hint``, where the input ``name`` has another
    shape than ``sizes``, in which None is any.
    """
    fits = (size in (None, n) for size, n in zip(sizes, shape, strict=False))
    if len(sizes) != len(shape) or not all(fits):
        expected = ", ".join("any" if size is None else str(size) for size in sizes)
        raise InputError(f"{name}: expected [{expected}], found {list(shape)}{hint}")


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
    from exporters.graph_info import graph_info

    options = backend.resolve(options)
    backend.check_build(options)
    info = graph_info(model)
    backend.check_graph(model, options)
    lowered = lower_into(backend, model, folder, options)
    of_graph = {
        "graph_sha256": graph_sha256,
        "checkpoint_sha256": info.checkpoint_sha256,
        "sample_multiple": info.sample_multiple,
        "kernels": backend.kernels(lowered, options),
    }
    del model, lowered  # a gigabyte for Stable Diffusion, while the backend holds its own copy
    gc.collect()
    return compile_lowered(backend, folder, options, progress, **of_graph)


def compile_lowered(
    backend: Backend,
    folder: Path,
    options: EngineOptions,
    progress: Progress = no_progress,
    **of_graph: Any,
) -> EngineRecord:
    """Compile the lowered graph in ``folder`` and write the engine's record; ``of_graph`` are the
    fields of :class:`EngineRecord` that describe the graph.
    """
    backend.compile(folder / LOWERED, folder, options, progress)
    record = EngineRecord(
        backend=backend.name,
        options=options,
        built_by={"quest-deploy": __version__, **versions()},
        hardware=backend.hardware(options),
        files={path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        **of_graph,
        **backend.record(options),
    )
    write_json(folder / ENGINE_FILE, sealed(record.to_json()))
    return record


def lower_into(backend: Backend, model: ir.Model, folder: Path, options: EngineOptions) -> ir.Model:
    """Lower ``model``, in place, write it into ``folder`` and return it."""
    from onnx_ir.passes import InvariantError, PassError

    from exporters.graph_info import save_graph

    try:
        lowered = backend.lower(model, options)
    except (PassError, InvariantError) as e:
        raise QuestDeployError(
            f"the graph cannot be lowered for {backend.name}: {e}; run `quest-deploy export` again"
        ) from e
    save_graph(lowered, folder / LOWERED)
    return lowered


def open_engine(backend: Backend, folder: Path) -> Runner:
    """Check an engine folder's every file against its ``engine.json``, then load it.

    Raises:
        InputError: no engine, one of another version or backend, a changed file, or a machine that
            cannot run it.
    """
    options = engine_options(backend, folder)
    check_unchanged(folder, engine_info(folder))
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
    """Return what ``engine.json`` says; raise InputError where there is none, or one that is
    damaged or of another version.
    """
    path = folder / ENGINE_FILE
    content = read_json(path, repair=REPAIR)
    return parse_document(EngineRecord, content, FORMAT, VERSION, str(path), REPAIR, sealed=True)


def check_unchanged(folder: Path, record: EngineRecord) -> None:
    """Raise InputError where one of the engine's files is missing or not as it was built."""
    for name in changed_files(folder, record):
        raise InputError(f"{folder / name} is missing or was changed since it was built; {REPAIR}")


def changed_files(folder: Path, record: EngineRecord) -> list[str]:
    """The engine's files that are missing or not as they were built."""

    def changed(name: str) -> bool:
        path = folder / name
        return not path.is_file() or sha256_of(path) != record.files[name]

    with ThreadPoolExecutor() as threads:  # hashing lets others run
        found = zip(record.files, threads.map(changed, record.files), strict=True)
        return [name for name, is_changed in found if is_changed]


def file_bytes(folder: Path, options: EngineOptions) -> int:
    """The bytes of an engine's files, without its record, and without blobs that only let it open
    sooner: one that holds the weights counts.
    """
    left_out = {ENGINE_FILE}
    if not options.compiled_weights:
        left_out |= {path.name for path in folder.glob(BLOBS)}
    return sum(path.stat().st_size for path in folder.iterdir() if path.name not in left_out)


def require_package(package: str, extra: str, purpose: str) -> None:
    """Raise InputError where ``package`` cannot be imported, naming the extra that brings it."""
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"{purpose} needs the Python package {package}, which is not installed: pip install "
            f"'quest-deploy[{extra}]'"
        )


def reason_of(error: Exception) -> str:
    """What a runtime says, in one line, without the places in its own source."""
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if not line.startswith(("Exception from ", "Check '")))


def input_arrays(feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """The feeds as C-contiguous arrays, which every runtime takes without a copy of its own."""
    import numpy as np

    return {name: np.ascontiguousarray(value) for name, value in feeds.items()}
