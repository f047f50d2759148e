"""Compiled forms of an engine's graph, kept in its folder: opening one takes a third to two thirds
of the time of compiling (measured), and gives the same bits.

A form's name says what it is of: the batch, and a digest of the runtime's version and of what the
processor says it has. Elsewhere there is no file of the name that is looked for, and the graph is
compiled. A form holds no large weights: they are read from the lowered graph's file of weights,
whose hash the engine's record has too. Or it holds all of them, as integers of 8 bits
(``compiled_weights``), and is mapped into memory: twice an engine's size on disk, while what the
process has in memory for itself is nearly halved.
"""

from __future__ import annotations

import hashlib
import logging
import os
from typing import TYPE_CHECKING, Any

from quest_deploy.backends.base import input_shapes, reason_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray

    from quest_deploy.backends.options import EngineOptions

    Shapes = tuple[tuple[str, tuple[int, ...]], ...]

PATTERN = "*.blob"
logger = logging.getLogger(__name__)


def usual_shapes(lowered: ir.Model, batch: int) -> Shapes:
    """The shapes of the inputs that a form of this batch is for, sorted by name."""
    return tuple(sorted(input_shapes(lowered, batch).items()))


def blob_path(folder: Path, batch: int, key: str) -> Path:
    """The form of this batch for the runtime and processor that ``key`` stands for."""
    return folder / f"batch-{batch}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.blob"


def weights_config(lowered: Path, options: EngineOptions) -> dict[str, Any]:
    """The settings to write and to read a form of the graph ``lowered`` with: without the weights
    that lie in the file beside it; none where none do, or where a form shall hold them.
    """
    data = lowered.with_name(f"{lowered.name}.data")
    if options.compiled_weights or not (data.exists() and data.stat().st_size):
        return {}
    return {"CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": os.path.realpath(data)}


def hold_all_but_weights(model: Any, lowered: Path) -> None:
    """Let a form of ``model``, as openvino read it from ``lowered``, hold every constant but the
    weights in the file beside that, in place.

    openvino 2026.4 takes all constants of an ONNX file for such, also those that it would then look
    for in the wrong place. Tables of scales are held: :func:`keep_form` compares what one bucket
    gives, which tells of wrong weights alone.
    """
    weights = _weights_beside(lowered)
    for constant in (op for op in model.get_ops() if op.get_type_name() == "Constant"):
        info = constant.get_rt_info()
        if constant.get_friendly_name() not in weights:
            for key in [key for key in info if key.startswith("WeightlessCacheAttribute")]:
                del info[key]


def _weights_beside(lowered: Path) -> set[str]:
    """The graph's initializers in a file of their own: those of integers, or all where it has no
    quantizers.
    """
    import onnx_ir as ir

    from exporters.graph_info import QUANTIZERS_KEY

    graph = ir.load(lowered)
    in_float = QUANTIZERS_KEY not in graph.metadata_props
    return {
        name
        for name, value in graph.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
        and (in_float or value.const_value.dtype.is_integer())
    }


def kept_forms(
    folder: Path, lowered: ir.Model, batches: Sequence[int], key: str
) -> dict[Shapes, Path]:
    """The forms in ``folder`` that are for this runtime and processor, by the shapes of the inputs.

    An engine whose forms are all for others is told of.
    """
    found = {batch: blob_path(folder, batch, key) for batch in batches}
    here = {usual_shapes(lowered, b): path for b, path in found.items() if path.exists()}
    if not here and any(folder.glob(PATTERN)):
        logger.warning(
            "openvino: %s holds forms that were compiled for another processor or version of "
            "openvino; the graph is compiled instead, which takes longer, until `quest-deploy "
            "build-engine` runs here",
            folder,
        )
    return here


def open_form(path: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """The compiled model in a form's file, and the file's content, mapped into memory, which must
    outlive it; None and None, after a warning, where openvino cannot read it.
    """
    import numpy as np
    import openvino

    try:
        content = openvino.Tensor(np.memmap(path, np.uint8, "c"), shared_memory=True)
        return openvino.Core().import_model(content, "CPU", config), content
    except (RuntimeError, ValueError) as e:
        logger.warning(
            "openvino cannot read %s (%s); the graph is compiled instead", path, reason_of(e)
        )
        return None, None


def keep_form(compiled: Any, path: Path, config: dict[str, Any]) -> None:
    """Write a compiled model as a form, and read it once: one that does not give the same bits is
    not kept, and a warning says so.
    """
    path.write_bytes(compiled.export_model().getvalue())
    (read, content), feeds = open_form(path, config), _feeds(compiled)
    if read is None or not _same(_outputs(compiled, feeds), _outputs(read, feeds)):
        del read, content
        path.unlink()
        logger.warning(
            "openvino does not give the same from a compiled form of this graph: none is kept, and "
            "the engine opens as slowly as it compiles"
        )


def _feeds(compiled: Any) -> dict[str, NDArray[Any]]:
    import numpy as np  # the program's help needs none

    generator = np.random.default_rng(0)
    return {
        port.any_name: generator.uniform(0, 9, tuple(port.shape)).astype(
            port.element_type.to_dtype()
        )
        for port in compiled.inputs
    }


def _outputs(compiled: Any, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    return list(compiled.create_infer_request().infer(feeds).values())


def _same(ours: list[NDArray[Any]], theirs: list[NDArray[Any]]) -> bool:
    import numpy as np

    return all(map(np.array_equal, ours, theirs))
