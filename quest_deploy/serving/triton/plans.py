"""TensorRT plans of a package's models, built on the GPU machine that packages them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from quest_deploy.backends.base import LOWERED
from quest_deploy.backends.tensorrt.base import ENGINE
from quest_deploy.progress import no_progress

if TYPE_CHECKING:
    from quest_deploy.backends.base import Backend
    from quest_deploy.backends.options import EngineOptions

FLOAT_INPUTS = ("timestep", "time_ids")
"""FP32 whatever the others are: rounded to FP16, a timestep can land in another bucket."""


def write_plan(
    backend: Backend, graph: Path, plan: Path, options: EngineOptions, *, half_io: bool
) -> None:
    """Compile the ONNX file ``graph`` into ``plan``.

    Args:
        options: the largest batch, the sizes of its input ``sample`` if it has one, and how to
            build.
        half_io: whether its inputs and outputs are FP16, but for ``FLOAT_INPUTS``.

    Raises:
        QuestDeployError: the backend refuses it.
    """
    from exporters.graph_info import load_graph, save_graph
    from exporters.passes.half_io import HalfIO

    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=plan.parent) as folder:
        if half_io:
            model = load_graph(graph)
            HalfIO(FLOAT_INPUTS)(model)
            graph = Path(folder) / LOWERED
            save_graph(model, graph)
        backend.compile(graph, Path(folder), options, no_progress)
        os.replace(Path(folder) / ENGINE, plan)
