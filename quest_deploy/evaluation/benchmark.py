"""Benchmarks: the quantized engine against the float engine of the same model, in FP32 and in the
type of its own float ops, against itself with static scales and, where a plugin or gathered scales
quantize, against itself quantized in the other ways.

All are built for the same backend from the same graph and timed in turn in one process, so that a
machine whose speed drifts slows all of them alike; peak memory is taken in a process of its own for
each. Each compiles what it runs, the quantized engine too: one that opens a blob takes less memory,
and the baselines have none.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.graph_info import graph_info, load_graph, load_signature, save_graph
from exporters.passes.fix_tokens import FixTokens
from exporters.passes.remove_quantization import RemoveQuantization
from exporters.passes.to_dtype import LOW_PRECISION_TYPES
from exporters.passes.to_low_precision import ToLowPrecision
from quest_deploy.backends.base import LOWERED, file_bytes, input_shapes
from quest_deploy.backends.cuda import gpu_memory_in_use
from quest_deploy.backends.options import GATHERED, NATIVE, PLUGIN, EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.errors import InputError
from quest_deploy.evaluation.memory import peak_memory
from quest_deploy.evaluation.precision import engine_precision
from quest_deploy.processes import in_own_process
from quest_deploy.progress import no_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quest_deploy.backends.base import Backend
    from quest_deploy.progress import Progress

QUANTIZED, STATIC, FP32, NATIVE_ENGINE = "quantized", "static scale", "fp32", NATIVE


@dataclass(frozen=True)
class BenchmarkOptions:
    """``runs`` timed inferences of each engine and batch size, after ``warmup`` untimed ones;
    ``static``: with static scales too.
    """

    batches: tuple[int, ...] = (1, 16)
    runs: int = 50
    warmup: int = 5
    static: bool = True

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1 or self.runs < 1 or self.warmup < 0:
            raise InputError(
                "expected --batch and --runs of 1 or more and --warmup of 0 or more, found "
                f"{self.batches}, {self.runs} and {self.warmup}"
            )


@dataclass(frozen=True)
class Timing:
    """One engine at one batch size: seconds an inference (median, 90th percentile) and samples a
    second.
    """

    engine: str
    batch: int
    median_s: float
    p90_s: float
    samples_per_s: float


@dataclass(frozen=True)
class Footprint:
    """One engine: the bytes of its files, and the peak resident memory of a process that loads and
    runs it at the largest batch; ``gpu_bytes`` is what that process holds of the GPU's memory, None
    where the engine does not run on one, or nothing tells.
    """

    engine: str
    file_bytes: int
    peak_memory_bytes: int
    gpu_bytes: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """All of it. Ratios are of medians within this run: above 1, the quantized engine is faster
    (smaller).

    ``bucket_selection_cost`` is empty where static scales were left out; ``precision`` is what the
    quantized engine's layers run in, ``PrecisionReport.summary()``; ``plugin_speedup`` is over the
    same engine quantized natively, empty where neither a plugin nor gathered scales quantize.
    """

    backend: str
    timings: list[Timing]
    footprints: list[Footprint]
    speedup_over_fp32: dict[int, float]
    bucket_selection_cost: dict[int, float]
    size_ratio_to_fp32: float
    precision: dict[str, Any]
    plugin_speedup: dict[int, float]

    def to_json(self) -> dict[str, Any]:
        """The benchmark as a JSON value."""
        return asdict(self)


def benchmark_engine(
    backend: Backend,
    options: EngineOptions,
    engine: Path,
    graph: Path,
    scratch: Path,
    choices: BenchmarkOptions,
    progress: Progress = no_progress,
) -> Benchmark:
    """Build the baselines in ``scratch`` and time all engines.

    Args:
        engine: the quantized engine's folder.
        graph: the portable graph that it was built from.
    """
    backend.check_run(options)
    options = without_blobs(options)
    if not backend.on_cpu(options):  # it takes seconds to see that it loads, baselines minutes
        backend.open(engine, options).close()
    baselines = (STATIC, FP32) if choices.static else (FP32,)
    if options.dtype in LOW_PRECISION_TYPES and backend.low_precision_graph:
        baselines = (*baselines, options.dtype)
    others = _other_lowerings(backend, options)
    baselines = (*others, *baselines)
    folders = {QUANTIZED: engine} | {name: scratch / name.replace(" ", "-") for name in baselines}
    for i, name in enumerate(baselines):
        progress("building baselines", i, len(baselines))
        _build_baseline(backend, others.get(name, options), graph, folders[name], name)
    progress("building baselines", len(baselines), len(baselines))
    progress("asking the engine what its layers run in", 0, 1)
    precision = engine_precision(backend, engine, options).summary()
    progress("asking the engine what its layers run in", 1, 1)
    one_bucket = GATHERED in (options.quantize, *others)
    feeds = _feeds(graph, max(choices.batches), one_bucket=one_bucket)
    timings = _time_in_turn(backend, options, folders, feeds, choices, progress)
    footprints = []
    for i, (name, folder) in enumerate(folders.items()):
        held = in_own_process(held_memory, backend.name, options, folder, feeds)
        footprints.append(Footprint(name, file_bytes(folder, options), *held))
        progress("measuring memory", i + 1, len(folders))
    medians = {(t.engine, t.batch): t.median_s for t in timings}
    sizes = {f.engine: f.file_bytes for f in footprints}
    return Benchmark(
        backend.name,
        timings,
        footprints,
        {b: medians[FP32, b] / medians[QUANTIZED, b] for b in choices.batches},
        {b: medians[QUANTIZED, b] / medians[STATIC, b] for b in choices.batches if choices.static},
        sizes[FP32] / sizes[QUANTIZED],
        precision,
        {
            b: medians[NATIVE_ENGINE, b] / medians[QUANTIZED, b]
            for b in choices.batches
            if NATIVE_ENGINE in folders
        },
    )


def without_blobs(options: EngineOptions) -> EngineOptions:
    """The options to open the quantized engine with as its baselines are opened."""
    return replace(options, compiled_batch=())


def _other_lowerings(backend: Backend, options: EngineOptions) -> dict[str, EngineOptions]:
    """The other ways to quantize that the engine is compared with, by name; none of a native one.
    Gathered scales are left out where the backend has none.
    """
    found = {}
    for way in (NATIVE, GATHERED) if options.quantize in (PLUGIN, GATHERED) else ():
        other = replace(options, quantize=way, plugins=None, serialize_plugins=False)
        if way != options.quantize:
            with suppress(InputError):
                backend.check_build(other)
                found[way] = other
    return found


def _build_baseline(
    backend: Backend, options: EngineOptions, graph: Path, folder: Path, name: str
) -> None:
    folder.mkdir(parents=True)
    model = load_graph(graph)
    FixTokens()(model)  # those of the feeds: not every backend takes any number
    if name in (FP32, options.dtype):
        RemoveQuantization()(model)
        if name in LOW_PRECISION_TYPES:
            ToLowPrecision(LOW_PRECISION_TYPES[name])(model)
    else:
        frozen_bucket = graph_info(model).scheme.buckets // 2 if name == STATIC else None
        model = backend.lower(model, options, frozen_bucket=frozen_bucket)
    save_graph(model, folder / LOWERED)
    backend.compile(folder / LOWERED, folder, options, no_progress)


def _feeds(graph: Path, batch: int, *, one_bucket: bool) -> dict[str, NDArray[np.float32]]:
    """Random inputs [batch, ...], the sample of the size that the model is meant for; at timesteps
    of all buckets, or of one.
    """
    generator = np.random.default_rng(0)
    shapes = input_shapes(load_signature(graph), batch)
    feeds = {
        name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    feeds["timestep"] = np.linspace(1, 1 if one_bucket else 990, batch).astype(np.float32)
    return feeds


def _time_in_turn(
    backend: Backend,
    options: EngineOptions,
    folders: dict[str, Path],
    feeds: dict[str, NDArray[np.float32]],
    choices: BenchmarkOptions,
    progress: Progress,
) -> list[Timing]:
    runners = {name: backend.open(folder, options) for name, folder in folders.items()}
    timings = []
    try:
        for i, batch in enumerate(choices.batches):
            rows = {name: value[:batch] for name, value in feeds.items()}
            seconds: dict[str, list[float]] = {name: [] for name in runners}
            for run in range(
                1 + choices.warmup + choices.runs
            ):  # the first may compile for this batch size
                for name, runner in runners.items():
                    start = time.perf_counter()
                    runner.infer(rows)
                    if run > choices.warmup:
                        seconds[name].append(time.perf_counter() - start)
            for name, taken in seconds.items():
                median = float(np.median(taken))
                timings.append(
                    Timing(name, batch, median, float(np.percentile(taken, 90)), batch / median)
                )
            progress("timing", i + 1, len(choices.batches))
    finally:
        for runner in runners.values():
            runner.close()
    return timings


def held_memory(
    backend: str, options: EngineOptions, folder: Path, feeds: dict[str, NDArray[np.float32]]
) -> tuple[int, int | None]:
    """The most that this process has held of the host's memory, and what it holds of the GPU's:
    what is in use there now, less what was before it began.
    """
    on_gpu = not get_backend(backend).on_cpu(options)
    before = gpu_memory_in_use() if on_gpu else None
    with get_backend(backend).open(folder, options) as runner:
        for _ in range(2):
            runner.infer(feeds)
        # A runtime keeps what it took, until it is closed.
        after = gpu_memory_in_use() if on_gpu else None
    held = None if before is None or after is None else max(after - before, 0)
    return peak_memory(), held
