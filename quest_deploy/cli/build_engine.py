"""`quest-deploy build-engine`: lower the graph for a backend and compile it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.cli.console import Console, size
from quest_deploy.cli.options import (
    DEFAULT_BACKEND,
    BackendOption,
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    open_workspace,
)
from quest_deploy.cli.stage import run_stage
from quest_deploy.engine.backends import check_options, get_backend
from quest_deploy.engine.base import EngineOptions, build_engine
from quest_deploy.files import atomic_folder
from quest_deploy.workspace import ENGINES, GRAPH

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.cli.console import Update
    from quest_deploy.workspace import Workspace


def build_engine_stage(
    workspace: Workspace, console: Console, backend: str, options: EngineOptions, *, reuse: bool = False
) -> dict[str, Any]:
    """Build the engine of ``backend``; writes engines/<backend>/."""
    built_for = get_backend(backend)
    built_for.check_build(options)

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        from exporters.graph_info import load_graph

        graph = workspace.path(GRAPH)
        digest = workspace.stages["export"].files[GRAPH]["sha256"]
        started = time.monotonic()
        with atomic_folder(workspace.path(ENGINES, backend)) as folder:
            content = build_engine(built_for, load_graph(graph), folder, options, digest, update)
        files = sorted(workspace.path(ENGINES, backend).iterdir())
        details = {
            "backend": backend,
            "hardware": content["hardware"],
            "seconds": time.monotonic() - started,
            "files": {file.name: file.stat().st_size for file in files},
        }
        return files, details

    chosen = {**dataclasses.asdict(options), "compute_capabilities": list(options.compute_capabilities)}
    return run_stage(workspace, console, f"build-engine/{backend}", inputs=("export",), options=chosen, reuse=reuse, work=work)


def describe(workspace: Workspace, details: dict[str, Any]) -> str:
    """The details in words."""
    files = ", ".join(f"{name} {size(count)}" for name, count in details["files"].items())
    hardware = ", ".join(
        value if isinstance(value, str) else "compute capabilities " + " ".join(value) for value in details["hardware"].values()
    )
    return f"{workspace.path(ENGINES, details['backend'])}, built in {details['seconds']:.1f} s for {hardware}\n{files}"


def build_engine_command(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    backend: BackendOption = DEFAULT_BACKEND,
    provider: Annotated[str, typer.Option(help="onnxruntime's execution provider: cpu, cuda or tensorrt.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 lets the backend choose.")] = 0,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="tensorrt-rtx: a GPU to build for, such as 89; may be repeated.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="TensorRT: the largest batch.")] = 16,
    as_json: JsonOption = False,
) -> None:
    """Build an engine from the exported graph."""
    console = Console(as_json=as_json)
    options = EngineOptions(provider, threads, tuple(compute_capability or ()), max_batch)
    get_backend(backend)
    check_options(backend, options)
    opened = open_workspace(workspace, model, bits)
    details = build_engine_stage(opened, console, backend, options)
    console.result({"workspace": str(opened.root), **details}, describe(opened, details))
