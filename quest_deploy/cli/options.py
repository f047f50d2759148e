"""The options that commands share, and how they find their workspace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quest_deploy.engine.backends import BACKENDS
from quest_deploy.errors import InputError
from quest_deploy.models.registry import MODEL_NAMES, check_model_name
from quest_deploy.scheme import DEFAULT_BUCKETS, SUPPORTED_BITS, Granularity, Scheme
from quest_deploy.workspace import MANIFEST, Workspace

DEFAULT_MODEL, DEFAULT_BITS, DEFAULT_BACKEND = "tiny", "w4a4", "openvino"

WorkspaceOption = Annotated[
    Path | None, typer.Option("--workspace", "-w", help="The workspace folder.", show_default="quest-out/<model>-<bits>")
]
ModelOption = Annotated[
    str | None, typer.Option(help=f"The model: {', '.join(MODEL_NAMES)}.", show_default=f"the workspace's, or {DEFAULT_MODEL}")
]
BitsOption = Annotated[
    str | None,
    typer.Option(
        help=f"Bits of weights and activations: {', '.join(SUPPORTED_BITS)}.", show_default=f"the workspace's, or {DEFAULT_BITS}"
    ),
]
BucketsOption = Annotated[
    int | None,
    typer.Option(
        help="Timestep buckets, from 1 to the number of training steps.", show_default=f"the workspace's, or {DEFAULT_BUCKETS}"
    ),
]
GranularityOption = Annotated[
    Granularity | None,
    typer.Option(
        help="What one activation scale covers, besides its bucket.",
        show_default=f"the workspace's, or {Granularity.FOLDED_CHANNEL.value}",
    ),
]
BackendOption = Annotated[str, typer.Option(help=f"The backend: {', '.join(BACKENDS)}.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def open_workspace(workspace: Path | None, model: str | None, bits: str | None) -> Workspace:
    """Open an existing workspace; raise InputError where it is not of the given model or bits."""
    opened = Workspace.open(_root(workspace, model, bits))
    _check(opened, model, bits, None, None)
    return opened


def create_workspace(
    workspace: Path | None, model: str | None, bits: str | None, buckets: int | None, granularity: Granularity | None
) -> Workspace:
    """Open a workspace, or make it; what is not given is taken from it, or else the default."""
    check_model_name(model or DEFAULT_MODEL)
    scheme = Scheme.parse(
        bits or DEFAULT_BITS,
        buckets=DEFAULT_BUCKETS if buckets is None else buckets,
        granularity=granularity or Granularity.FOLDED_CHANNEL,
    )
    root = _root(workspace, model, bits)
    if not (root / MANIFEST).exists():
        return Workspace.create(root, model or DEFAULT_MODEL, scheme)
    opened = Workspace.open(root)
    _check(opened, model, bits, buckets, granularity)
    return opened


def _root(workspace: Path | None, model: str | None, bits: str | None) -> Path:
    return workspace or Path("quest-out") / f"{model or DEFAULT_MODEL}-{bits or DEFAULT_BITS}"


def _check(workspace: Workspace, model: str | None, bits: str | None, buckets: int | None, granularity: Granularity | None) -> None:
    scheme = workspace.scheme
    given = {"model": (model, workspace.model), "bits": (bits, scheme.name), "buckets": (buckets, scheme.buckets)}
    given["granularity"] = (granularity, scheme.granularity)
    for name, (wanted, found) in given.items():
        if wanted is not None and wanted != found:
            raise InputError(f"{workspace.root} holds {name} {found}, not {wanted}; give another folder with -w")
