"""Measure what building a TensorRT engine from a portable graph costs: seconds, peak memory and
bytes.

    python -m scripts.bench.measure_tensorrt_build GRAPH [--dtype fp16]
    [--sample-size 64 --sample-size 96] [--json FILE]

The build runs in a process of its own, whose peak is that of lowering and building alone, as
`quest-deploy build-engine` does them. Processor seconds stand beside the clock's: on a busy
machine only they mean something.
"""

from __future__ import annotations

import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from exporters.graph_info import load_graph
from quest_deploy.artifacts.workspace import versions
from quest_deploy.backends.base import build_engine
from quest_deploy.backends.options import EngineOptions, parse_pool_limit, parse_sample_sizes
from quest_deploy.backends.registry import get_backend
from quest_deploy.backends.tensorrt.base import ENGINE
from quest_deploy.evaluation.memory import peak_memory
from quest_deploy.files import write_json


def build(graph: Path, backend: str, options: EngineOptions) -> dict[str, Any]:
    """Build once, in a temporary folder; run it in a fresh process, since it returns the process's
    peak memory.
    """

    phases: dict[str, float] = {}
    started, used = time.monotonic(), time.process_time()

    def note(phase: str, done: int, total: int, detail: str = "") -> None:
        phases.setdefault(phase, time.monotonic() - started)

    with tempfile.TemporaryDirectory(prefix="quest-deploy-") as name:
        build_engine(
            get_backend(backend),
            load_graph(graph),
            Path(name),
            options,
            "0" * 64,
            note,
        )
        return {
            "seconds": time.monotonic() - started,
            "seconds_before_the_builder": min(phases.values(), default=None),
            "processor_seconds": time.process_time() - used,
            "peak_gib": peak_memory() / 2**30,
            "engine_bytes": (Path(name) / ENGINE).stat().st_size,
            "lowered_bytes": sum(path.stat().st_size for path in Path(name).glob("lowered.onnx*")),
        }


def main(
    graph: Annotated[Path, typer.Argument(help="A portable graph (.onnx).")],
    backend: str = "tensorrt-rtx",
    dtype: str = "fp16",
    max_batch: int = 8,
    sample_size: Annotated[
        list[str] | None, typer.Option(help="May be repeated: one optimization profile each.")
    ] = None,
    compute_capability: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    pool_limit: str | None = None,
    strip_plan: Annotated[
        bool,
        typer.Option("--strip-plan", help="Build a second engine, without weights; needs a GPU."),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Build, and print what it cost."""
    common: dict[str, Any] = {
        "dtype": dtype,
        "max_batch": max_batch,
        "sample_size": parse_sample_sizes(sample_size or []),
        "compute_capability": compute_capability or (),
        "pool_limit": None if pool_limit is None else parse_pool_limit(pool_limit),
    }
    result: dict[str, Any] = {
        "backend": backend,
        "graph_bytes": sum(p.stat().st_size for p in graph.parent.glob(f"{graph.name}*")),
    }
    for name, options in (
        ("whole", EngineOptions(**common)),
        ("stripped", EngineOptions(**common, strip_plan=True)),
    ):
        if name == "whole" or strip_plan:
            get_backend(backend).check_build(options)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                result[name] = {
                    "options": options.to_json(),
                    **pool.submit(build, graph, backend, options).result(),
                }
    print(json.dumps(result, indent=1))
    if json_file:
        write_json(json_file, {**result, "versions": versions()})


if __name__ == "__main__":
    typer.run(main)
