"""Blobs: what openvino compiled of an engine's graph, kept in its folder. Opening one takes a third
to two thirds of the time of compiling (measured), and gives the same bits.

A blob is called after its batch and a digest of the runtime's version and of what the processor
says it has. Elsewhere no file has the name that is looked for, and the graph is compiled. A blob
holds no large weights: they are read from the lowered graph's file of weights, whose hash the
engine's record has too. Or it holds all of them, as integers of 8 bits (``compiled_weights``), and
is mapped into memory: twice an engine's size on disk, while what the process has in memory for
itself is nearly halved.
"""

from __future__ import annotations

import hashlib
import logging
import os
from typing import TYPE_CHECKING, Any

from quest_deploy.backends.base import BLOBS, REPAIR, input_shapes, reason_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray

    from quest_deploy.backends.options import EngineOptions

    Shapes = tuple[tuple[str, tuple[int, ...]], ...]

COMPARED_STEPS = (0, 999, 500)
"""Timesteps of the first, the last and a middle bucket."""
_BESIDE = "WeightlessCacheAttribute"
"""What openvino marks a constant with that a blob may leave out."""
logger = logging.getLogger(__name__)


def usual_shapes(lowered: ir.Model, batch: int) -> Shapes:
    """The shapes of the inputs that a blob of this batch is for, sorted by name."""
    return tuple(sorted(input_shapes(lowered, batch).items()))


def blob_path(folder: Path, batch: int, key: str) -> Path:
    """The blob of this batch for the runtime and processor that ``key`` stands for."""
    return folder / f"batch-{batch}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.blob"


def weights_config(lowered: Path, options: EngineOptions) -> dict[str, Any]:
    """The settings to write and to read a blob of the graph ``lowered`` with: without the weights
    that lie in the file beside it; none where none do, or where a blob shall hold them.
    """
    data = lowered.with_name(f"{lowered.name}.data")
    if options.compiled_weights or not (data.exists() and data.stat().st_size):
        return {}
    return {"CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": os.path.realpath(data)}


def hold_all_but_weights(model: Any, lowered: Path) -> None:
    """Let a blob of ``model``, as openvino read it from ``lowered``, hold every constant but the
    weights in the file beside that, in place.

    openvino 2026.4 takes all constants of an ONNX file for such, also tables of scales, which it
    would then look for in the wrong place.

    Raises:
        ValueError: no constant has openvino's mark, as where another version calls it otherwise.
    """
    weights, marked = _weights_beside(lowered), False
    for constant in (op for op in model.get_ops() if op.get_type_name() == "Constant"):
        info = constant.get_rt_info()
        marks = [key for key in info if key.startswith(_BESIDE)]
        marked = marked or bool(marks)
        if constant.get_friendly_name() not in weights:
            for key in marks:
                del info[key]
    if not marked:
        raise ValueError(f"expected constants with a {_BESIDE}")


def _weights_beside(lowered: Path) -> set[str]:
    """The graph's initializers in a file of their own: those of integers, or all where it has no
    quantizers.
    """
    import onnx_ir as ir

    from exporters.graph_info import has_quantizers

    graph = ir.load(lowered)
    quantized = has_quantizers(graph)
    return {
        name
        for name, value in graph.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
        and (not quantized or value.const_value.dtype.is_integer())
    }


def kept_blobs(
    folder: Path, lowered: ir.Model, batches: Sequence[int], key: str
) -> dict[Shapes, Path]:
    """The blobs in ``folder`` that are for this runtime and processor, by the shapes of the inputs;
    warns where every one is for others.
    """
    paths = {batch: blob_path(folder, batch, key) for batch in batches}
    # Of a graph that was cut out, which has none, the usual shapes may be unknown.
    kept = {usual_shapes(lowered, b): path for b, path in paths.items() if path.exists()}
    if batches and not kept and any(folder.glob(BLOBS)):
        logger.warning(
            "%s was compiled for another processor or version of openvino, and is compiled again "
            "each time that it is opened; %s",
            folder,
            REPAIR,
        )
    return kept


def open_blob(path: Path, config: dict[str, Any]) -> tuple[Any, Any] | None:
    """The compiled model in a blob's file, and the file's content, mapped into memory, which must
    outlive it; None, after a warning, where openvino cannot read it.
    """
    try:
        return _read(path, config)
    except (RuntimeError, ValueError, OSError) as e:
        logger.warning(
            "openvino cannot read %s (%s); the graph is compiled instead", path, reason_of(e)
        )
        return None


def _read(path: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    import numpy as np
    import openvino

    content = openvino.Tensor(np.memmap(path, np.uint8, "c"), shared_memory=True)
    return openvino.Core().import_model(content, "CPU", config), content


def write_blob(compile_model: Callable[[], Any], path: Path, config: dict[str, Any]) -> None:
    """Write what ``compile_model`` returns as a blob, and compare what the blob gives.

    Raises:
        RuntimeError, ValueError, OSError: openvino cannot write or read it, or gives other bits.
    """
    compiled = compile_model()
    path.write_bytes(compiled.export_model().getbuffer())
    feeds = _feeds(compiled)
    expected = _outputs(compiled, feeds)
    del compiled  # openvino shares no weights between compiled models
    read, content = _read(path, config)
    same = _same(expected, _outputs(read, feeds))
    del read, content
    if not same:
        raise ValueError("it gives other bits than the graph")


def _feeds(compiled: Any) -> list[dict[str, NDArray[Any]]]:
    """Random inputs, once, or where the model reads timesteps, as often as
    ``COMPARED_STEPS`` take.
    """
    import numpy as np  # the program's help needs none

    generator = np.random.default_rng(0)
    feeds = {
        port.any_name: _random(generator, tuple(port.shape), port.element_type.to_dtype())
        for port in compiled.inputs
    }
    if "timestep" not in feeds:
        return [feeds]
    steps = feeds["timestep"]
    runs = -(-len(COMPARED_STEPS) // len(steps))
    each = np.resize(np.asarray(COMPARED_STEPS, steps.dtype), (runs, len(steps)))
    return [feeds | {"timestep": x} for x in each]


def _random(generator: Any, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    import numpy as np

    whole = np.issubdtype(dtype, np.integer)
    values = generator.integers(0, 9, shape) if whole else generator.standard_normal(shape)
    array: NDArray[Any] = values.astype(dtype)
    return array


def _outputs(compiled: Any, feeds: list[dict[str, NDArray[Any]]]) -> list[NDArray[Any]]:
    request = compiled.create_infer_request()
    return [value.copy() for each in feeds for value in request.infer(each).values()]


def _same(ours: list[NDArray[Any]], theirs: list[NDArray[Any]]) -> bool:
    import numpy as np

    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(ours, theirs, strict=True))
