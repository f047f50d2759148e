"""How every stage runs: its inputs checked, skipped where nothing changed, recorded when it is
done.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.cli.console import Console, Update

    Work = Callable[[Update], tuple[Iterable[Path], dict[str, Any]]]


def run_stage(
    workspace: Workspace,
    console: Console,
    stage: str,
    *,
    inputs: tuple[str, ...],
    options: dict[str, Any],
    reuse: bool,
    work: Work,
) -> dict[str, Any]:
    """Run ``work`` as ``stage`` and return its details.

    Args:
        inputs: the stages whose files it reads; each must be finished and up to date.
        options: what the user chose, of JSON's types.
        reuse: return the recorded details where the stage has run with the same inputs and options.
        work: does it, and returns the files it wrote and the details to report.
    """
    options = json.loads(
        json.dumps(options)
    )  # as the manifest gives them back: a tuple becomes a list
    with workspace.locked():
        for upstream in inputs:
            workspace.require(upstream)
        record = workspace.fresh(stage, inputs, options) if reuse else None
        if record is not None:
            console.note(f"{stage}: up to date")
            return record.details
        workspace.start(stage, options)
        try:
            with console.progress(stage) as update:
                files, details = work(update)
        except Exception:  # but an interruption is none
            workspace.forget_start(stage)
            raise
        details = workspace.record(
            stage, inputs=inputs, options=options, files=files, details=details
        ).details
        workspace.forget_start(stage)
        return details
