"""Lower the graph for a backend and compile it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from exporters.graph_info import load_graph
from quest_deploy.artifacts.workspace import ENGINES, GRAPH
from quest_deploy.backends.base import build_engine
from quest_deploy.backends.registry import get_backend

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import BuildEngineOptions
    from quest_deploy.stages.results import BuiltEngine


def work(
    workspace: Workspace, options: BuildEngineOptions, progress: Progress
) -> tuple[list[Path], BuiltEngine]:
    """Build the engine of a backend; write its folder."""
    name, engine = options.backend, options.resolved
    graph, digest = workspace.path(GRAPH), workspace.stages["export"].files[GRAPH]["sha256"]
    started = time.monotonic()
    folder = workspace.new(ENGINES, name)
    folder.mkdir()
    record = build_engine(get_backend(name), load_graph(graph), folder, engine, digest, progress)
    files = sorted(folder.iterdir())
    result: BuiltEngine = {
        "backend": name,
        "hardware": record.hardware,
        "seconds": time.monotonic() - started,
        "files": {file.name: file.stat().st_size for file in files},
    }
    if name.startswith("tensorrt"):
        result["quantize"] = engine.quantize
    return files, result
