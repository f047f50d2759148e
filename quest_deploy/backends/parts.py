"""Engines of text encoders and VAEs: float graphs, which need no lowering."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.workspace import MANIFEST, PARTS
from quest_deploy.backends.base import (
    ENGINE_FILE,
    LOWERED,
    EngineRecord,
    OpenEngine,
    check_sizes,
    compile_lowered,
    open_engine,
)
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.errors import InputError
from quest_deploy.files import link_or_copy, sha256_of
from quest_deploy.progress import no_progress

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from numpy.typing import NDArray

    from exporters.part_info import PartInfo
    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.backends.base import Backend
    from quest_deploy.progress import Progress

TEXT_ENCODER = "text_encoder"
VAE_DECODER, VAE_ENCODER = "vae_decoder", "vae_encoder"
STAGE = "build-parts"
NAMES = (TEXT_ENCODER, "text_encoder_2", "text_encoder_3", VAE_DECODER, VAE_ENCODER)
"""All there may be."""
IMAGE_BATCH = 4
"""The most images that a TensorRT engine decodes or encodes at once."""


def part_options(name: str, options: EngineOptions, pixels_per_latent: int) -> EngineOptions:
    """The options of a part's engine: of an encoder of images the samples are images, and
    images come one by one.
    """
    if name not in (VAE_DECODER, VAE_ENCODER):
        return replace(options, sample_size=())
    factor = pixels_per_latent if name == VAE_ENCODER else 1
    return replace(
        options,
        sample_size=tuple((h * factor, w * factor) for h, w in options.sample_size),
        max_batch=min(options.max_batch, IMAGE_BATCH),
    )


def build_part(
    backend: Backend,
    graph: Path,
    folder: Path,
    options: EngineOptions,
    progress: Progress = no_progress,
) -> EngineRecord:
    """Compile a part's graph into ``folder``, where it gets a further name, and write its
    ``engine.json``.
    """
    options = backend.resolve(options)
    backend.check_build(options)
    data = f"{LOWERED}.data"
    for name in (LOWERED, data) if graph.with_name(data).exists() else (LOWERED,):
        link_or_copy(graph.with_name(name), folder / name)
    return compile_lowered(
        backend, folder, options, progress, graph_sha256=sha256_of(graph), kernels={}
    )


class EnginePart(OpenEngine):
    """A part's engine, called with its inputs by name.

    Attributes:
        info: what it was made from.
    """

    def __init__(self, backend: str, folder: Path) -> None:
        """Open the engine in ``folder``, its record and its files checked; raise InputError where
        it cannot run here.
        """
        from exporters.graph_info import load_graph
        from exporters.part_info import part_info

        self._runner = open_engine(get_backend(backend), folder)
        self.graph = load_graph(folder / LOWERED)
        self.info: PartInfo = part_info(self.graph)
        self._folder = folder

    def check_kind(self, kinds: Collection[str]) -> None:
        """Raise InputError where it was made from an instance of another class than ``kinds``."""
        if self.info.kind not in kinds:
            raise InputError(
                f"{self._folder}: expected a graph of {' or '.join(kinds)}, found one of "
                f"{self.info.kind!r:.100}; run `quest-deploy export-parts` again"
            )

    def __call__(self, **feeds: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Run once; raise InputError for an input of another shape than the engine's."""
        from exporters.graph_info import input_sizes

        for name, sizes in input_sizes(self.graph).items():
            check_sizes(name, sizes, feeds[name].shape, "; give the float part to load_pipeline")
        return self._runner.infer(feeds)


def part_names(workspace: Workspace, stage: str) -> list[str]:
    """The parts that a finished stage names; raise InputError where one is none: names are folders
    of the workspace.
    """
    found = list(workspace.stages[stage].details["parts"])
    if unknown := [name for name in found if name not in NAMES]:
        raise InputError(
            f"{workspace.path(MANIFEST)}: expected parts among {', '.join(NAMES)}, found "
            f"{unknown[0]!r:.100}; run `quest-deploy export-parts` again"
        )
    return found


def built_parts(
    workspace: Workspace, backend: str, without: Collection[str] = ()
) -> dict[str, Path]:
    """The folders of the parts' engines of ``backend``, by part, but for those of ``without``; none
    where they were not built.

    Raises:
        InputError: they are not up to date, or one's record was changed.
    """
    stage = f"{STAGE}/{backend}"
    if stage not in workspace.stages:
        return {}
    names = [name for name in part_names(workspace, stage) if name not in without]
    for name in names:
        workspace.require_recorded(stage, f"{PARTS}/{name}/{backend}/{ENGINE_FILE}")
    return {name: workspace.path(PARTS, name, backend) for name in names}
