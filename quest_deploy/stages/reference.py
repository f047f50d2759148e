"""Save the fake-quantized model's inputs and outputs, for verification."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from quest_deploy import __version__
from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.reference import INDEX
from quest_deploy.artifacts.workspace import REFERENCE, REFERENCE_STATE
from quest_deploy.files import link_or_copy, sha256_of_json
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.stages.added_inputs import recorded_inputs
from quest_deploy.stages.options import ReferenceOptions
from quest_deploy.verification import reference

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import RecordsOptions
    from quest_deploy.stages.results import Reference


def work(
    workspace: Workspace, options: RecordsOptions, progress: Progress
) -> tuple[list[Path], Reference]:
    """Run the torch modules and save what went in and out.

    An interrupted run goes on with the next record: those that are done stay in reference-state/
    until all are.
    """
    checkpoint = load_checkpoint(workspace.checkpoint_path)
    recorded = recorded_inputs(workspace, checkpoint.architecture, options.added_inputs)
    model = QuantizedModel.from_checkpoint(checkpoint).eval()
    for layer in model.quantized_layers().values():
        layer.freeze()  # every pass would round it again
    state = workspace.path(REFERENCE_STATE)
    key = sha256_of_json(
        {
            "quest-deploy": __version__,
            "torch": torch.__version__,
            "inputs": {
                name: workspace.require(name).digest for name in workspace.checkpoint_inputs
            },
            "options": options.to_json(),
        }
    )
    try:
        entries = reference.save_reference(
            model,
            recorded,
            state,
            **asdict(options.of(ReferenceOptions)),
            key=key,
            progress=progress,
        )
    finally:
        if not (state / INDEX).exists():
            shutil.rmtree(state, ignore_errors=True)
    files = [workspace.new(REFERENCE, file.name) for file in sorted(state.iterdir())]
    for file in files:  # the state itself stays until the stage is recorded
        link_or_copy(state / file.name, file)
    measured = [max(entry.sensitivity) for entry in entries if entry.sensitivity is not None]
    return files, {
        "records": len(entries),
        "buckets": workspace.scheme.buckets,
        "sites": len({quantizer for entry in entries for quantizer in entry.sites}),
        "all_sites": len(model.sites),
        "bytes": sum(file.stat().st_size for file in files),
        "largest_sensitivity": max(measured),
        "measured_records": len(measured),
    }
