"""Time an engine against FP32 and against static scales, on the same backend, in one run."""

from __future__ import annotations

import importlib
import shutil
from typing import TYPE_CHECKING, cast

from quest_deploy.artifacts.workspace import ENGINES, GRAPH, REPORTS
from quest_deploy.backends.base import engine_info, engine_options
from quest_deploy.backends.registry import get_backend
from quest_deploy.evaluation import benchmark
from quest_deploy.files import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import BenchmarkOptions
    from quest_deploy.stages.results import Benchmark


def work(
    workspace: Workspace, options: BenchmarkOptions, progress: Progress
) -> tuple[list[Path], Benchmark]:
    """Benchmark the engine; write its report."""
    backend, engine = get_backend(options.backend), workspace.path(ENGINES, options.backend)
    if options.pipeline:
        whole = importlib.import_module("quest_deploy.stages.benchmark_pipeline")  # needs torch
        whole.check(workspace, options)
    report = workspace.new(REPORTS, f"benchmark-{options.backend}.json")
    # Like all that is staged, the baselines are gone when the stage ends, however it ends.
    built = engine_options(backend, engine)
    result = benchmark.benchmark_engine(
        backend,
        built,
        engine,
        workspace.path(GRAPH),
        workspace.new("baselines"),
        benchmark.BenchmarkOptions(
            tuple(options.batch), options.runs, options.warmup, options.static
        ),
        progress,
    )
    images = {}
    if options.pipeline:
        folders = {
            benchmark.QUANTIZED: engine,
            benchmark.FP32: workspace.new("baselines", benchmark.FP32),
        }
        multiple = engine_info(engine).sample_multiple
        as_baselines = benchmark.without_blobs(built)
        images["pipeline"] = whole.time_images(
            workspace, options, as_baselines, multiple, folders, progress
        )
    shutil.rmtree(workspace.new("baselines"))
    # Through JSON, so that what is printed is what a later run reads back.
    details = {**result.to_json(), "buckets": workspace.scheme.buckets, **images}
    for ratios in ("speedup_over_fp32", "bucket_selection_cost", "plugin_speedup"):
        details[ratios] = {str(batch): ratio for batch, ratio in details[ratios].items()}
    write_json(report, details)
    return [report], cast("Benchmark", details)
