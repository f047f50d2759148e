"""Lower the graph for a backend and compile it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from exporters.graph_info import load_graph
from quest_deploy.artifacts.workspace import ENGINES, GRAPH
from quest_deploy.backends.base import build_engine
from quest_deploy.backends.options import ENGINE_OPTIONS
from quest_deploy.backends.registry import get_backend
from quest_deploy.stages import BUILD_ENGINE
from quest_deploy.stages.stage import as_recorded

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import BuildEngineOptions
    from quest_deploy.stages.results import BuiltEngine

logger = logging.getLogger(__name__)


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
    if replaced := _replaced(workspace, options):
        logger.warning(
            "this replaces the %s engine that was built with %s", name, ", ".join(replaced)
        )
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


def _replaced(workspace: Workspace, options: BuildEngineOptions) -> list[str]:
    """What the backend's engine of before was built with, where that was chosen otherwise."""
    record = workspace.stages.get(BUILD_ENGINE.recorded_name(options.backend))
    before, now = {} if record is None else record.options, as_recorded(options)
    return [
        f"{each.flag} {before[each.recorded]}"
        for each in ENGINE_OPTIONS.values()
        if before.get(each.recorded, now[each.recorded]) != now[each.recorded]
    ]
