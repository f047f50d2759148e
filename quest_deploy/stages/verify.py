"""Compare an engine with the fake-quantized model, per layer and end to end, per bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from quest_deploy.artifacts.workspace import ENGINES, REFERENCE, REPORTS
from quest_deploy.backends.base import engine_options
from quest_deploy.backends.registry import get_backend
from quest_deploy.files import write_json
from quest_deploy.verification.checks import verify_engine

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import EngineStageOptions
    from quest_deploy.stages.results import Verification


def work(
    workspace: Workspace, options: EngineStageOptions, progress: Progress
) -> tuple[list[Path], Verification]:
    """Verify the engine; write its report."""
    backend, engine = get_backend(options.backend), workspace.path(ENGINES, options.backend)
    report = workspace.new(REPORTS, f"verify-{options.backend}.json")
    details = verify_engine(
        backend, engine_options(backend, engine), engine, workspace.path(REFERENCE), progress
    ).to_json()
    write_json(report, details)
    return [report], cast("Verification", details)
