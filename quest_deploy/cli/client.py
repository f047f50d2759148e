"""`quest-deploy client`: let a Triton server draw an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.options import command
from quest_deploy.stages import api
from quest_deploy.stages.arguments import ClientArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(ClientArguments)
def client(chosen: dict[str, Any], console: Console) -> None:
    """Ask a server started by a package's serve.py for an image; Ctrl-C cancels it there too."""
    drawn = api.client(**chosen, progress=console)
    console.result({**drawn}, f"{drawn['picture']}: seed {drawn['seed']}, {drawn['seconds']:.2f} s")
