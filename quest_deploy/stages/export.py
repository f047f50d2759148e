"""Export the portable QDQ graph with one activation-scale set per timestep bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
from onnx_ir.passes import InvariantError, PassError

from exporters import torch_to_qdq
from exporters.graph_info import save_graph
from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.workspace import GRAPH
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import sha256_of
from quest_deploy.stages.added_inputs import recorded_inputs

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import ExportOptions
    from quest_deploy.stages.results import Export


def work(
    workspace: Workspace, options: ExportOptions, progress: Progress
) -> tuple[list[Path], Export]:
    """Export the checkpoint; write the graph and its data."""
    checkpoint = load_checkpoint(workspace.checkpoint_path)
    recorded = recorded_inputs(workspace, checkpoint.architecture, options.added_inputs)
    progress("tracing the model", 0, 2)
    try:
        graph = torch_to_qdq.portable_graph(
            checkpoint,
            next(recorded.batches(2)),
            sha256_of(workspace.checkpoint_path),
            added=recorded.added,
        )
    except (PassError, InvariantError) as e:
        if isinstance(e.__cause__, InputError):  # a pass read the checkpoint's file
            raise e.__cause__ from None
        raise QuestDeployError(
            f"{workspace.checkpoint_path} cannot be exported: {e}; make it again, with another "
            "scheme"
        ) from e
    progress("checking the graph", 1, 2)
    files = [workspace.new(GRAPH), workspace.new(f"{GRAPH}.data")]
    save_graph(graph, files[0])
    onnx.checker.check_model(str(files[0]), full_check=True)
    progress("checking the graph", 2, 2)
    return files, {
        "method": checkpoint.provenance["method"],
        "sites": len(checkpoint.quantizers),
        "float_sites": checkpoint.float_sites,
        "layers": len(checkpoint.layers),
        "buckets": checkpoint.scheme.buckets,
        "bytes": sum(file.stat().st_size for file in files),
        "fp32_weight_bytes": 4 * sum(layer.codes.size for layer in checkpoint.layers.values()),
    }
