"""Build engines of the text encoders and the VAE."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.workspace import PARTS
from quest_deploy.backends.base import LOWERED, file_bytes
from quest_deploy.backends.parts import (
    VAE_DECODER,
    VAE_ENCODER,
    build_part,
    part_names,
    part_options,
)
from quest_deploy.backends.registry import get_backend

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import BuildPartsOptions
    from quest_deploy.stages.results import BuiltParts


def work(
    workspace: Workspace, options: BuildPartsOptions, progress: Progress
) -> tuple[list[Path], BuiltParts]:
    """Build an engine of each exported part; write their folders."""
    backend, started = get_backend(options.backend), time.monotonic()
    graphs = {
        name: workspace.path(PARTS, name, LOWERED) for name in part_names(workspace, "export-parts")
    }
    factor = _pixels_per_latent(graphs)
    files: list[Path] = []
    sizes: dict[str, int] = {}
    hardware: dict[str, Any] = {}
    for i, (name, graph) in enumerate(graphs.items()):
        progress("building parts", i, len(graphs))
        folder = workspace.new(PARTS, name, options.backend)
        folder.mkdir()
        record = build_part(backend, graph, folder, part_options(name, options.engine, factor))
        hardware = record.hardware
        sizes[name] = file_bytes(folder, record.options)
        files += sorted(folder.iterdir())
    progress("building parts", len(graphs), len(graphs))
    return files, {
        "backend": options.backend,
        "hardware": hardware,
        "dtype": options.dtype,
        "seconds": time.monotonic() - started,
        "parts": sizes,
    }


def _pixels_per_latent(graphs: dict[str, Path]) -> int:
    """A side of an image, in sides of its latents; 1 where no images are encoded."""
    from exporters.graph_info import load_signature, sample_shape

    if not {VAE_DECODER, VAE_ENCODER} <= graphs.keys():
        return 1
    latent, image = (sample_shape(load_signature(graphs[x])) for x in (VAE_DECODER, VAE_ENCODER))
    return image[1] // latent[1]
