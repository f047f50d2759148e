"""`quest-deploy build-engine`: lower the graph for a backend and compile it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import command, opened
from quest_deploy.stages import api
from quest_deploy.stages.arguments import BuildEngineArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(BuildEngineArguments)
def build_engine_command(chosen: dict[str, Any], console: Console) -> None:
    """Build an engine from the exported graph."""
    api.build_engine(**chosen, progress=console)
    report(console, opened(chosen), "build-engine", chosen["backend"])
