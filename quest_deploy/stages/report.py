"""Write the page that shows the workspace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quest_deploy.artifacts.workspace import REPORT_PAGE, REPORTS
from quest_deploy.evaluation.report_page.render import render
from quest_deploy.files import atomic_file

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import StageOptions
    from quest_deploy.stages.results import Report


def work(
    workspace: Workspace, options: StageOptions, progress: Progress
) -> tuple[list[Path], Report]:
    """Write the page into the workspace."""
    page = workspace.new(REPORTS, REPORT_PAGE)
    details = write(workspace, page)
    return [page], {**details, "page": str(workspace.path(REPORTS, REPORT_PAGE))}


def write(workspace: Workspace, path: Path) -> Report:
    """Write the page to ``path``, whole or not at all."""
    page, missing = render(workspace)
    content = page.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
    commands = {name: [gap["command"] for gap in gaps] for name, gaps in missing.items() if gaps}
    return {"page": str(path), "bytes": len(content), "missing": commands}
