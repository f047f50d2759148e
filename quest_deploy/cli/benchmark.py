"""`quest-deploy benchmark`: the engine against FP32 and against static scales, on the same backend,
in one run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.artifacts.workspace import ENGINES, GRAPH, REPORTS
from quest_deploy.backends.base import EngineOptions, engine_options
from quest_deploy.backends.registry import get_backend
from quest_deploy.cli.console import Console, size, table
from quest_deploy.cli.options import (
    DEFAULT_BACKEND,
    BackendOption,
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    open_workspace,
)
from quest_deploy.cli.precision import describe_summary
from quest_deploy.cli.stage import run_stage
from quest_deploy.files import write_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.cli.console import Update

BATCHES, RUNS, WARMUP = (1, 16), 50, 5


def benchmark_stage(
    workspace: Workspace,
    console: Console,
    backend: str,
    batches: tuple[int, ...] = BATCHES,
    runs: int = RUNS,
    warmup: int = WARMUP,
    *,
    static: bool = True,
    reuse: bool = False,
) -> dict[str, Any]:
    """Benchmark the engine of ``backend``; writes reports/benchmark-<backend>.json."""
    timed = get_backend(backend)
    timed.check_run(EngineOptions())  # at once, before any file is read
    report = workspace.path(REPORTS, f"benchmark-{backend}.json")

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        from quest_deploy.evaluation.benchmark import BenchmarkOptions, benchmark_engine

        choices = BenchmarkOptions(batches, runs, warmup, static)
        engine = workspace.path(ENGINES, backend)
        options = engine_options(timed, engine)
        with tempfile.TemporaryDirectory(prefix="quest-deploy-") as scratch:
            result = benchmark_engine(
                timed, options, engine, workspace.path(GRAPH), Path(scratch), choices, update
            )
        # Through JSON, so that what is printed is what a later run reads back.
        details = {**result.to_json(), "buckets": workspace.scheme.buckets}
        for ratios in ("speedup_over_fp32", "bucket_selection_cost", "plugin_speedup"):
            details[ratios] = {str(batch): ratio for batch, ratio in details[ratios].items()}
        write_json(report, details)
        return [report], details

    options = {"batches": list(batches), "runs": runs, "warmup": warmup, "static": static}
    inputs = ("export", f"build-engine/{backend}")
    return run_stage(
        workspace,
        console,
        f"benchmark/{backend}",
        inputs=inputs,
        options=options,
        reuse=reuse,
        work=work,
    )


def describe(details: dict[str, Any]) -> str:
    """The details as tables, and the ratios in words."""
    timings = [
        [
            t["engine"],
            str(t["batch"]),
            f"{1e3 * t['median_s']:.2f}",
            f"{1e3 * t['p90_s']:.2f}",
            f"{t['samples_per_s']:.0f}",
        ]
        for t in sorted(details["timings"], key=lambda t: t["batch"])
    ]
    footprints = [
        [f["engine"], size(f["file_bytes"]), size(f["peak_memory_bytes"])]
        for f in details["footprints"]
    ]
    lines = [
        f"backend {details['backend']}, {details['buckets']} buckets; medians of engines timed in "
        "turn, in one process",
        table(["engine", "batch", "median ms", "p90 ms", "samples/s"], timings),
        "",
        table(["engine", "files", "peak memory"], footprints),
        "",
        *(
            f"batch {b}: {ratio:.2f}x the speed of FP32"
            for b, ratio in details["speedup_over_fp32"].items()
        ),
        *(
            f"batch {b}: choosing buckets takes {ratio:.2f}x the time of a static scale"
            for b, ratio in details["bucket_selection_cost"].items()
        ),
        *(
            f"batch {b}: {ratio:.2f}x the speed of native quantization"
            for b, ratio in details.get("plugin_speedup", {}).items()
        ),
        f"files {details['size_ratio_to_fp32']:.2f}x smaller than FP32",
        *describe_summary(details["precision"]),
    ]
    return "\n".join(lines)


def benchmark(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    backend: BackendOption = DEFAULT_BACKEND,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="A batch size; may be repeated. [default: 1 and 16]"),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed inferences of each engine.")] = RUNS,
    warmup: Annotated[int, typer.Option(min=0, help="Untimed inferences before.")] = WARMUP,
    static: Annotated[
        bool,
        typer.Option(
            "--static/--no-static",
            help="Time static scales too; a large model's third engine may not fit into memory.",
        ),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Time the engine against FP32 and against static scales, on the same backend."""
    console = Console(as_json=as_json)
    get_backend(backend)
    opened = open_workspace(workspace, model, bits)
    details = benchmark_stage(
        opened, console, backend, tuple(batch or BATCHES), runs, warmup, static=static
    )
    console.result({"workspace": str(opened.root), **details}, describe(details))
