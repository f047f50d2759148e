from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.graph_info import load_graph, save_graph
from quest_deploy.backends.base import (
    BLOBS,
    LOWERED,
    Runner,
    build_engine,
    engine_info,
    input_shapes,
)
from quest_deploy.backends.onnxruntime import OnnxRuntimeBackend
from quest_deploy.backends.openvino import backend as openvino_backend
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.errors import QuestDeployError
from quest_deploy.evaluation.benchmark import (
    FP32,
    NATIVE_ENGINE,
    QUANTIZED,
    STATIC,
    Benchmark,
    BenchmarkOptions,
    benchmark_engine,
    held_memory,
)
from quest_deploy.evaluation.precision import engine_precision
from tests.helpers import refused
from tests.quest_deploy.plugin_backend import PluginOnTheCpu, kept
from tests.quest_deploy.support import in_this_process

BALLAST_BYTES = 2**30


def gathers(model: ir.Model) -> bool:
    """Whether quantizers have the scale of the batch's bucket."""
    return any(
        node.op_type == "QuantizeLinear" and node.inputs[1].const_value is None
        for node in model.graph
    )


@pytest.fixture(scope="module")
def timed(
    mini_engines: Callable[[str], Path],
    mini_proto: onnx.ModelProto,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Benchmark, list[tuple[str, int, int]]]:
    """The benchmark of the very small model on onnxruntime, run by a process that itself holds 1
    GiB.
    """
    folder, calls = tmp_path_factory.mktemp("benchmark"), []
    save_graph(ir.from_proto(mini_proto), folder / "unet.onnx")
    ballast = np.ones(BALLAST_BYTES, np.uint8)
    result = benchmark_engine(
        get_backend("onnxruntime"),
        EngineOptions(threads=1),
        mini_engines("onnxruntime"),
        folder / "unet.onnx",
        folder,
        BenchmarkOptions(batches=(1, 3), runs=3, warmup=1),
        lambda *progress: calls.append(progress),
    )
    assert ballast[0] == 1
    return result, calls


def test_every_engine_is_timed_at_every_batch_size(timed: tuple[Benchmark, Any]) -> None:
    timings = timed[0].timings
    assert {(t.engine, t.batch) for t in timings} == {
        (engine, batch) for engine in (QUANTIZED, STATIC, FP32) for batch in (1, 3)
    }
    assert len(timings) == 6
    for timing in timings:
        assert 0 < timing.median_s <= timing.p90_s
        assert timing.samples_per_s == pytest.approx(timing.batch / timing.median_s)


def test_ratios_are_those_of_the_medians_and_sizes(timed: tuple[Benchmark, Any]) -> None:
    result = timed[0]
    medians = {(t.engine, t.batch): t.median_s for t in result.timings}
    sizes = {f.engine: f.file_bytes for f in result.footprints}
    for batch in (1, 3):
        assert result.speedup_over_fp32[batch] == pytest.approx(
            medians[FP32, batch] / medians[QUANTIZED, batch]
        )
        assert result.bucket_selection_cost[batch] == pytest.approx(
            medians[QUANTIZED, batch] / medians[STATIC, batch]
        )
    assert result.size_ratio_to_fp32 == pytest.approx(sizes[FP32] / sizes[QUANTIZED])


def test_peak_memory_is_that_of_the_engine_and_not_of_the_process_that_measures(
    timed: tuple[Benchmark, Any],
) -> None:
    for footprint in timed[0].footprints:
        assert 10_000_000 < footprint.peak_memory_bytes < BALLAST_BYTES


def test_the_quantized_engine_is_compiled_as_its_baselines_are(
    mini_engines: Callable[[str], Path],
    mini_proto: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(openvino_backend, "open_blob", lambda *arguments: opened.append(arguments))
    save_graph(ir.from_proto(mini_proto), tmp_path / "unet.onnx")
    engine, choices = mini_engines("openvino"), BenchmarkOptions(batches=(2,), runs=1, warmup=0)
    assert [*engine.glob(BLOBS)]
    backend, options = get_backend("openvino"), engine_info(engine).options
    with in_this_process():  # where the list of what is opened is
        benchmark_engine(backend, options, engine, tmp_path / "unet.onnx", tmp_path, choices)
    assert opened == []


def test_progress_tells_every_phase_to_its_end(
    timed: tuple[Benchmark, list[tuple[str, int, int]]],
) -> None:
    last = {phase: (done, total) for phase, done, total in timed[1]}
    phases = {"building baselines": (2, 2), "timing": (2, 2), "measuring memory": (3, 3)}
    assert last == phases | {"asking the engine what its layers run in": (1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantize", "others"), [("plugin", {NATIVE_ENGINE, "gathered"}), ("gathered", {NATIVE_ENGINE})]
)
def test_an_engine_is_timed_against_itself_quantized_in_the_other_ways(
    quantize: str, others: set[str], mini_proto: onnx.ModelProto, tmp_path: Path
) -> None:
    backend, options = PluginOnTheCpu(), EngineOptions(threads=1, quantize=quantize)
    (tmp_path / "engine").mkdir()
    build_engine(backend, ir.from_proto(mini_proto), tmp_path / "engine", options, "cd" * 32)
    save_graph(ir.from_proto(mini_proto), tmp_path / "unet.onnx")
    choices = BenchmarkOptions(batches=(2,), runs=2, warmup=0)
    result = benchmark_engine(
        backend, options, tmp_path / "engine", tmp_path / "unet.onnx", tmp_path / "scratch", choices
    )
    medians = {t.engine: t.median_s for t in result.timings}
    assert medians.keys() == {QUANTIZED, *others, STATIC, FP32}
    assert result.plugin_speedup == {2: pytest.approx(medians[NATIVE_ENGINE] / medians[QUANTIZED])}
    graphs = {
        folder.name: load_graph(folder / LOWERED)
        for folder in (tmp_path / "engine", *(tmp_path / "scratch").iterdir())
    }
    assert graphs.keys() == {"engine", *others, "static-scale", "fp32"}
    assert {name for name, graph in graphs.items() if len(kept(graph)) > 10} == (
        {"engine"} if quantize == "plugin" else set()
    )
    assert {name for name, graph in graphs.items() if gathers(graph)} == (
        {"gathered"} if quantize == "plugin" else {"engine"}
    )


@pytest.mark.slow
def test_an_engine_in_a_low_precision_is_timed_against_the_float_model_in_it_too(
    mini_proto: onnx.ModelProto, tmp_path: Path
) -> None:
    backend, options = PluginOnTheCpu(), EngineOptions(threads=1, quantize="native", dtype="fp16")
    (tmp_path / "engine").mkdir()
    build_engine(backend, ir.from_proto(mini_proto), tmp_path / "engine", options, "cd" * 32)
    save_graph(ir.from_proto(mini_proto), tmp_path / "unet.onnx")
    choices = BenchmarkOptions(batches=(2,), runs=1, warmup=0, static=False)
    result = benchmark_engine(
        backend, options, tmp_path / "engine", tmp_path / "unet.onnx", tmp_path / "scratch", choices
    )
    assert {t.engine for t in result.timings} == {QUANTIZED, FP32, "fp16"}
    types = {
        name: {
            value.dtype
            for node in load_graph(tmp_path / "scratch" / name / LOWERED).graph
            if node.op_type == "Conv"
            for value in (*node.inputs, *node.outputs)
        }
        for name in (FP32, "fp16")
    }
    assert types == {FP32: {ir.DataType.FLOAT}, "fp16": {ir.DataType.FLOAT16}}


@pytest.mark.parametrize(
    ("on_cpu", "told", "expected"),
    [(False, [100, 350], 250), (False, [100, 90], 0), (False, [None, 90], None), (True, [], None)],
)
def test_what_an_engine_holds_of_the_gpu_is_what_is_in_use_more_than_before_it_was_opened(
    on_cpu: bool,
    told: list[int | None],
    expected: int | None,
    mini_engines: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, engine = get_backend("onnxruntime"), mini_engines("onnxruntime")
    monkeypatch.setattr(type(backend), "on_cpu", lambda self, options: on_cpu)
    monkeypatch.setattr("quest_deploy.evaluation.benchmark.gpu_memory_in_use", lambda: told.pop(0))
    feeds = {
        name: np.ones(shape, np.float32)
        for name, shape in input_shapes(load_graph(engine / LOWERED), 1).items()
    }
    held, on_gpu = held_memory("onnxruntime", EngineOptions(threads=1), engine, feeds)
    assert (held > 10_000_000, on_gpu, told) == (True, expected, [])


def test_what_the_layers_run_in_is_told_beside_the_speed(
    timed: tuple[Benchmark, Any], mini_engines: Callable[[str], Path]
) -> None:
    precision = timed[0].precision
    assert precision["shares"].keys() == {"int8", "fp32"}  # attention's products are float
    assert precision["int8_share"] == precision["asked_int8_share"] > 0.5
    assert precision["fell_back"] == []
    told = engine_precision(
        get_backend("onnxruntime"), mini_engines("onnxruntime"), EngineOptions(threads=1)
    )
    assert precision["warnings"] == told.warnings


def test_a_backend_that_cannot_run_here_is_refused_before_anything_is_built(
    mini_engines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_count", lambda: 0)
    with refused("tensorrt-rtx", "GPU"):
        benchmark_engine(
            get_backend("tensorrt-rtx"),
            EngineOptions(),
            tmp_path,
            tmp_path / "unet.onnx",
            tmp_path / "scratch",
            BenchmarkOptions(),
        )
    assert not (tmp_path / "scratch").exists()


def test_an_engine_that_a_gpu_does_not_load_is_told_before_its_baselines_are_built(
    mini_engines: Callable[[str], Path], tmp_path: Path
) -> None:
    class Broken(OnnxRuntimeBackend):
        def on_cpu(self, options: EngineOptions) -> bool:
            return False

        def open(self, folder: Path, options: EngineOptions) -> Runner:
            raise QuestDeployError(f"{folder} cannot be loaded: no kernel image")

    engine, scratch = mini_engines("onnxruntime"), tmp_path / "scratch"
    arguments = (engine, tmp_path / "unet.onnx", scratch, BenchmarkOptions())
    with refused(engine, "no kernel image", error=QuestDeployError):
        benchmark_engine(Broken(), EngineOptions(threads=1), *arguments)
    assert not scratch.exists()


@pytest.mark.parametrize(
    "options", [{"batches": ()}, {"batches": (0,)}, {"runs": 0}, {"warmup": -1}]
)
def test_options_without_anything_to_time_are_refused(options: dict[str, Any]) -> None:
    with refused("--batch", "--runs", "--warmup"):
        BenchmarkOptions(**options)
