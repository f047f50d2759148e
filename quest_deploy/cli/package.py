"""`quest-deploy package`: write what a server needs to serve the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.options import command, opened
from quest_deploy.files import size
from quest_deploy.stages import api
from quest_deploy.stages.arguments import PackageArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(PackageArguments)
def package(chosen: dict[str, Any], console: Console) -> None:
    """Write a package that serves the model: a model repository for Triton Inference Server."""
    details = api.package(**chosen, progress=console)
    models = ", ".join([*details["models"], "pipeline", "pipeline_stream"])
    serve = "python serve.py" if details["plan"] else "python serve.py --cpu"
    console.result(
        {"workspace": str(opened(chosen).root), "triton": str(chosen["triton"]), **details},
        f"{chosen['triton']} ({size(details['bytes'])}): {models}",
        f"serve it with `{serve}` there, see README.md",
    )
