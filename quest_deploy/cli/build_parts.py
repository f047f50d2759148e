"""`quest-deploy build-parts`: engines of text encoders and VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import command, opened
from quest_deploy.stages import api
from quest_deploy.stages.arguments import BuildPartsArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(BuildPartsArguments)
def build_parts(chosen: dict[str, Any], console: Console) -> None:
    """Build engines of the exported parts, which load_pipeline and generate then use."""
    api.build_parts(**chosen, progress=console)
    report(console, opened(chosen), "build-parts", chosen["backend"])
