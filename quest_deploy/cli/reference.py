"""`quest-deploy reference`: save the fake-quantized model's inputs and outputs, for
verification.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy import __version__
from quest_deploy.artifacts.reference import INDEX, VERSION
from quest_deploy.artifacts.workspace import REFERENCE, REFERENCE_STATE, TRAJECTORIES
from quest_deploy.cli.console import Console, size
from quest_deploy.cli.options import (
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    open_workspace,
    parse_sample_size,
)
from quest_deploy.cli.stage import run_stage
from quest_deploy.errors import InputError
from quest_deploy.files import replace_folder, sha256_of_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.cli.console import Update


@dataclass(frozen=True)
class ReferenceOptions:
    """The options of :func:`quest_deploy.verification.reference.save_reference`; raise InputError
    where one is out of range.
    """

    seed: int = 0
    megabytes: int = 1000
    measured: int | None = None
    sample_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.megabytes < 1 or (self.measured is not None and self.measured < 1):
            raise InputError("--megabytes and --measured: expected 1 or more")


DEFAULTS = ReferenceOptions()


def reference_stage(
    workspace: Workspace,
    console: Console,
    options: ReferenceOptions = DEFAULTS,
    *,
    reuse: bool = False,
) -> dict[str, Any]:
    """Run the torch modules and save what went in and out; writes reference/.

    An interrupted run goes on with the next record: those that are done stay in reference-state/
    until all are.
    """
    recorded = {**asdict(options), "version": VERSION}

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        import torch

        from quest_deploy.artifacts.checkpoint import load_checkpoint
        from quest_deploy.calibration.trajectories import Trajectories
        from quest_deploy.quantization.model import QuantizedModel
        from quest_deploy.verification.reference import save_reference

        model = QuantizedModel.from_checkpoint(load_checkpoint(workspace.checkpoint_path)).eval()
        trajectories = Trajectories.load(workspace.path(TRAJECTORIES))
        state = workspace.path(REFERENCE_STATE)
        inputs = {stage: workspace.require(stage).digest for stage in workspace.checkpoint_inputs}
        key = sha256_of_json(
            {
                "quest-deploy": __version__,
                "torch": torch.__version__,
                "inputs": inputs,
                "options": recorded,
            }
        )
        try:
            entries = save_reference(
                model,
                trajectories,
                state,
                **asdict(options),
                key=key,
                on_progress=lambda done, total: update("recording", done, total),
            )
        finally:
            if not (state / INDEX).exists():
                shutil.rmtree(state, ignore_errors=True)
        replace_folder(workspace.path(REFERENCE), state)
        files = sorted(workspace.path(REFERENCE).iterdir())
        measured = [max(entry.sensitivity) for entry in entries if entry.sensitivity is not None]
        details = {
            "records": len(entries),
            "buckets": workspace.scheme.buckets,
            "sites": len({site for entry in entries for site in entry.sites}),
            "all_sites": len(model.sites),
            "bytes": sum(file.stat().st_size for file in files),
            "largest_sensitivity": max(measured),
            "measured_records": len(measured),
        }
        return files, details

    return run_stage(
        workspace,
        console,
        "reference",
        inputs=workspace.checkpoint_inputs,
        options=recorded,
        reuse=reuse,
        work=work,
    )


def describe(workspace: Workspace, details: dict[str, Any]) -> str:
    """The details in words."""
    records, measured = details["records"], details["measured_records"]
    within = "" if measured == records else f" (measured in {measured} of {records} records)"
    return (
        f"{workspace.path(REFERENCE)}: {records} records cover {details['buckets']} buckets "
        f"and {details['sites']} of {details['all_sites']} quantized tensors "
        f"({size(details['bytes'])})\n"
        "last-bit differences alone change this model's output by up to "
        f"{details['largest_sensitivity']:.1%}{within}"
    )


def reference(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    seed: int = DEFAULTS.seed,
    megabytes: Annotated[
        int,
        typer.Option(
            help="The largest record; where it cannot hold all quantized tensors, the records hold "
            "them in turn."
        ),
    ] = DEFAULTS.megabytes,
    measured: Annotated[
        int | None,
        typer.Option(
            help="In how many records the model's sensitivity to last-bit differences is measured.",
            show_default="all, or 2 where a record cannot hold all quantized tensors",
        ),
    ] = DEFAULTS.measured,
    sample_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|HEIGHTxWIDTH",
            help="Cut the recorded samples down to this size: a large model's records then hold "
            "more quantized tensors, in less time.",
            show_default="as recorded",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Save the fake-quantized torch model's inputs and outputs, per layer and end to end, for every
    bucket.
    """
    console = Console(as_json=as_json)
    options = ReferenceOptions(
        seed, megabytes, measured, None if sample_size is None else parse_sample_size(sample_size)
    )
    opened = open_workspace(workspace, model, bits)
    details = reference_stage(opened, console, options)
    console.result({"workspace": str(opened.root), **details}, describe(opened, details))
