"""Export the text encoders and the VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporters.graph_info import save_graph
from exporters.passes.compress_weights import CompressWeights
from quest_deploy.artifacts.workspace import PARTS
from quest_deploy.backends.base import LOWERED
from quest_deploy.errors import InputError
from quest_deploy.models.loading import load_model
from quest_deploy.serving.part_graphs import model_parts
from quest_deploy.stages.options import INT8

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import ExportPartsOptions
    from quest_deploy.stages.results import ExportedParts


def work(
    workspace: Workspace, options: ExportPartsOptions, progress: Progress
) -> tuple[list[Path], ExportedParts]:
    """Export the parts that can be; write their graphs."""
    model = load_model(workspace.source)
    model.require_weights("export")
    parts = model_parts(model)
    left_out = {name: part.problem for name, part in parts.items() if part.problem}
    if not parts.keys() - left_out.keys():
        why = "; ".join(f"{name}: {problem}" for name, problem in left_out.items())
        raise InputError(
            f"{model.name} has no text encoder or VAE that can be exported: {why or 'none at all'}"
        )
    files: list[Path] = []
    sizes: dict[str, int] = {}
    for i, (name, part) in enumerate(parts.items()):
        progress("exporting parts", i, len(parts))
        if part.problem:
            continue
        graph, path = part.graph(), workspace.new(PARTS, name, LOWERED)
        if options.weights == INT8:
            CompressWeights()(graph)
        save_graph(graph, path)
        del graph  # the next part is loaded without its weights
        written = sorted(path.parent.iterdir())
        sizes[name] = sum(file.stat().st_size for file in written)
        files += written
    progress("exporting parts", len(parts), len(parts))
    return files, {"parts": sizes, "left_out": left_out, "weights": options.weights}
