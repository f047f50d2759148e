"""`quest-deploy reference`: save the fake-quantized model's inputs and outputs, for verification."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quest_deploy.cli.console import Console, size
from quest_deploy.cli.options import BitsOption, JsonOption, ModelOption, WorkspaceOption, open_workspace
from quest_deploy.cli.stage import run_stage
from quest_deploy.files import atomic_folder
from quest_deploy.reference_files import VERSION
from quest_deploy.workspace import REFERENCE, TRAJECTORIES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.cli.console import Update
    from quest_deploy.workspace import Workspace


def reference_stage(workspace: Workspace, console: Console, *, seed: int = 0, reuse: bool = False) -> dict[str, Any]:
    """Run the torch modules and save what went in and out; writes reference/."""

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        from quest_deploy.checkpoint import load_checkpoint
        from quest_deploy.quant.model import QuantizedModel
        from quest_deploy.reference import save_reference
        from quest_deploy.trajectories import Trajectories

        model = QuantizedModel.from_checkpoint(load_checkpoint(workspace.checkpoint_path)).eval()
        trajectories = Trajectories.load(workspace.path(TRAJECTORIES))
        with atomic_folder(workspace.path(REFERENCE)) as folder:
            entries = save_reference(
                model, trajectories, folder, seed=seed, on_progress=lambda done, total: update("recording", done, total)
            )
        files = sorted(workspace.path(REFERENCE).iterdir())
        details = {
            "records": len(entries),
            "buckets": workspace.scheme.buckets,
            "bytes": sum(file.stat().st_size for file in files),
            "largest_sensitivity": max(max(entry.sensitivity) for entry in entries),
        }
        return files, details

    options = {"seed": seed, "version": VERSION}
    return run_stage(workspace, console, "reference", inputs=workspace.checkpoint_inputs, options=options, reuse=reuse, work=work)


def describe(workspace: Workspace, details: dict[str, Any]) -> str:
    """The details in words."""
    return (
        f"{workspace.path(REFERENCE)}: {details['records']} records cover {details['buckets']} buckets ({size(details['bytes'])})\n"
        f"last-bit differences alone change this model's output by up to {details['largest_sensitivity']:.1%}"
    )


def reference(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Save the fake-quantized torch model's inputs and outputs, per layer and end to end, for every bucket."""
    console = Console(as_json=as_json)
    opened = open_workspace(workspace, model, bits)
    details = reference_stage(opened, console, seed=seed)
    console.result({"workspace": str(opened.root), **details}, describe(opened, details))
