"""TensorRT plans of a package's models: the workspace's engine, and those that the GPU machine
builds beside it.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.graph_info import load_graph, save_graph
from exporters.passes.low_precision_io import LowPrecisionIO
from quest_deploy.artifacts.workspace import ENGINES
from quest_deploy.backends.base import LOWERED, EngineRecord, engine_info
from quest_deploy.backends.options import GATHERED, EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.backends.tensorrt.base import ENGINE
from quest_deploy.backends.tensorrt.plugin import recorded_library
from quest_deploy.errors import InputError
from quest_deploy.files import sha256_of
from quest_deploy.models.channels import GUIDANCE
from quest_deploy.models.residuals import IMAGE_SCALE
from quest_deploy.progress import no_progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.serving.triton.options import TritonOptions

TRT = "tensorrt"
FLOAT_INPUTS = (
    "timestep",
    "time_ids",
    "resolution",
    "aspect_ratio",
    "class_labels",
    GUIDANCE,
    IMAGE_SCALE,
)
"""FP32 whatever the others are: rounded to FP16, a timestep can land in another bucket."""


@dataclass(frozen=True)
class Plan:
    """A TensorRT engine of the workspace.

    Attributes:
        folder: the engine's.
        options: what it was built with.
        tensorrt: the version that built it.
        plugins: the libraries of plugins that it needs.
    """

    folder: Path
    options: EngineOptions
    tensorrt: str
    plugins: tuple[Path, ...]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Heights and widths of the samples that it takes; empty for the model's own."""
        return tuple(self.options.sample_size)


def find_plan(
    workspace: Workspace, options: TritonOptions, *, alone: bool, rows: int
) -> Plan | None:
    """The workspace's TensorRT engine, if it has one.

    Args:
        alone: whether the model has nothing beside the UNet that needs a plan too.
        rows: how many an image takes, with guidance if requests may ask for it.

    Raises:
        InputError: it does not go with ``options``, or further plans must be built and this machine
            cannot.
    """
    if f"build-engine/{TRT}" not in workspace.stages:
        return None
    workspace.require(f"build-engine/{TRT}")
    folder = workspace.path(ENGINES, TRT)
    record = engine_info(folder)
    built = record.options
    if built.strip_plan:
        raise InputError(
            f"{folder} holds a plan without weights, which Triton cannot load; build it without "
            "--strip-plan"
        )
    if built.quantize == GATHERED:
        raise InputError(
            f"{folder} holds a plan for batches of one bucket (--quantize gathered), and requests "
            "at different steps share a batch; build it with --quantize native or plugin"
        )
    if options.max_batch is not None and options.max_batch > built.max_batch:
        raise InputError(
            f"--max-batch {options.max_batch}: the plan in {folder} takes batches up to "
            f"{built.max_batch}"
        )
    if built.max_batch < rows:
        raise InputError(
            f"the plan in {folder} takes batches of {built.max_batch}, and an image with guidance "
            f"is {rows} rows; run `quest-deploy build-engine` again with --max-batch {rows} or more"
        )
    if options.io_dtype != "fp32" or not alone:
        why = (
            "the text encoder and the decoder need plans too"
            if options.io_dtype == "fp32"
            else "--io-dtype fp16 needs another plan"
        )
        try:
            get_backend(TRT).check_build(built)
            get_backend(TRT).check_engine(record)  # or no server would load all of them
        except InputError as e:
            raise InputError(f"{why}, and {e}") from e
    return Plan(
        folder, built, record.built_by.get(TRT, "unknown"), _plugins(record, options.plugin_library)
    )


def _plugins(record: EngineRecord, given: Sequence[Path]) -> tuple[Path, ...]:
    """The plugin libraries to package: those given, and the one that the engine's ``record``
    names, found by its hash.
    """
    plugin, libraries = record.plugin, tuple(given)
    names = [path.name for path in libraries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"--plugin-library: two files are called {', '.join(twice)}, and both go into one "
            "folder; rename one"
        )
    if (
        plugin is None
        or plugin.serialized
        or any(sha256_of(path) == plugin.sha256 for path in libraries)
    ):
        return libraries
    found = recorded_library(record.options.plugins, plugin.sha256)
    if found.name in names:
        raise InputError(
            f"--plugin-library: a file is called {found.name}, as the engine's own plugin library; "
            "rename it"
        )
    return (*libraries, found)


def write_plan(graph: Path, plan: Path, options: EngineOptions, *, low_precision_io: bool) -> None:
    """Compile the ONNX file ``graph`` into ``plan``.

    Args:
        options: the largest batch, the sizes of its input ``sample`` if it has one, and how to
            build.
        low_precision_io: whether its inputs and outputs are FP16, but for ``FLOAT_INPUTS``.

    Raises:
        QuestDeployError: TensorRT refuses it.
    """
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=plan.parent) as folder:
        if low_precision_io:
            model = load_graph(graph)
            LowPrecisionIO(FLOAT_INPUTS)(model)
            graph = Path(folder) / LOWERED
            save_graph(model, graph)
        get_backend(TRT).compile(graph, Path(folder), options, no_progress)
        os.replace(Path(folder) / ENGINE, plan)
