"""Lower the graph for a backend and compile it, or refit another engine with its weights."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

from exporters.graph_info import load_graph
from quest_deploy.artifacts.workspace import ENGINES, GRAPH, Workspace
from quest_deploy.backends.base import build_engine
from quest_deploy.backends.options import ENGINE_OPTIONS
from quest_deploy.backends.refit import refit_engine
from quest_deploy.backends.registry import get_backend
from quest_deploy.errors import InputError
from quest_deploy.stages import BUILD_ENGINE
from quest_deploy.stages.stage import as_recorded

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.backends.base import EngineRecord
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import BuildEngineOptions
    from quest_deploy.stages.results import BuiltEngine, Refit

logger = logging.getLogger(__name__)


def work(
    workspace: Workspace, options: BuildEngineOptions, progress: Progress
) -> tuple[list[Path], BuiltEngine]:
    """Build or refit the engine of a backend; write its folder."""
    name, engine = options.backend, options.resolved
    graph, digest = workspace.path(GRAPH), workspace.stages["export"].files[GRAPH]["sha256"]
    started = time.monotonic()
    folder = workspace.new(ENGINES, name)
    folder.mkdir()
    refit: Refit | None = None
    if options.refit_from is None:
        record = build_engine(
            get_backend(name), load_graph(graph), folder, engine, digest, progress
        )
    else:
        base = Workspace.open(options.refit_from)
        record, refit = _refitted(base, workspace, name, folder)
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
    if refit is not None:
        result["refit"] = refit
    return files, result


def _refitted(
    base: Workspace, workspace: Workspace, name: str, folder: Path
) -> tuple[EngineRecord, Refit]:
    """Refit the engine of ``base`` with the graph of ``workspace``."""
    if os.path.realpath(base.root) == os.path.realpath(workspace.root):
        raise InputError(f"--refit-from {base.root}: expected another workspace than this one")
    with base.reading():
        built = base.require(BUILD_ENGINE.recorded_name(name))
        record, weights = refit_engine(
            get_backend(name),
            load_graph(workspace.path(GRAPH)),
            base.path(ENGINES, name),
            folder,
            workspace.stages["export"].files[GRAPH]["sha256"],
        )
    return record, {
        "workspace": str(base.root),
        "seconds": built.details["seconds"],
        "weights": weights,
    }


def _replaced(workspace: Workspace, options: BuildEngineOptions) -> list[str]:
    """What the backend's engine of before was built with, where that was chosen otherwise."""
    record = workspace.stages.get(BUILD_ENGINE.recorded_name(options.backend))
    before, now = {} if record is None else record.options, as_recorded(options)
    return [
        f"{each.flag} {before[each.recorded]}"
        for each in ENGINE_OPTIONS.values()
        if before.get(each.recorded, now[each.recorded]) != now[each.recorded]
    ]
