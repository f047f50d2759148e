"""OpenVINO on the CPU: convolutions and linears as true INT8.

The engine is the lowered graph itself: OpenVINO's own format would store the INT4 weights as INT8,
twice the size. Beside it lie blobs, compiled models without weights (see blobs.py), which open
faster.
"""

from __future__ import annotations

import errno
import logging
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any

from quest_deploy.backends.base import LOWERED, Runner, input_arrays, input_shapes, reason_of
from quest_deploy.backends.cpu import CpuBackend
from quest_deploy.backends.openvino.blobs import (
    blob_path,
    hold_all_but_weights,
    kept_blobs,
    open_blob,
    usual_shapes,
    weights_config,
    write_blob,
)
from quest_deploy.backends.openvino.precision import runtime_precisions
from quest_deploy.backends.options import EngineOptions
from quest_deploy.errors import QuestDeployError
from quest_deploy.files import gathered

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray

    from exporters.exactness import Exactness
    from quest_deploy.backends.openvino.blobs import Shapes
    from quest_deploy.progress import Progress

HINTS = {"fp32": "f32", "bf16": "bf16"}
"""openvino's name of each dtype that what is not INT8 may run in."""
KEPT_SHAPES = 4
"""Each compiled batch size holds weights of its own in memory."""
logger = logging.getLogger(__name__)
_AHEAD = ThreadPoolExecutor(1, thread_name_prefix="quest-openvino")
"""Opens what is about to run."""


class OpenVinoBackend(CpuBackend):
    """FP32 where it is not INT8, or bf16 if asked for: on CPUs with bf16, OpenVINO would otherwise
    use that unasked.
    """

    name = package = "openvino"
    low_precision_graph = False

    def lower_for(
        self,
        model: ir.Model,
        options: EngineOptions,
        exactness: Exactness,
        *,
        frozen_bucket: int | None = None,
    ) -> ir.Model:
        """In FP32 whatever ``dtype``: the runtime itself converts."""
        from exporters.lowering.openvino import lower

        return lower(model, frozen_bucket=frozen_bucket, exactness=exactness)

    def compile(
        self,
        lowered: Path,
        folder: Path,
        options: EngineOptions,
        progress: Progress,
    ) -> None:
        """Compile it once: what openvino refuses is refused now. What was compiled for
        ``options.compiled_batch`` is kept.
        """
        from exporters.graph_info import load_signature

        batches = options.compiled_batch
        progress("compiling with openvino", 0, max(1, len(batches)))
        if not batches:
            compile_graph(lowered, options)
            progress("compiling with openvino", 1, 1)
            return
        signature = load_signature(lowered)
        for i, batch in enumerate(batches):
            self._keep(lowered, usual_shapes(signature, batch), folder, options, batch)
            progress("compiling with openvino", i + 1, len(batches))

    def _keep(
        self, lowered: Path, shapes: Shapes, folder: Path, options: EngineOptions, batch: int
    ) -> None:
        """Compile for ``batch`` and keep it; or, after a warning, only compile, where openvino
        cannot give the same from a blob.
        """
        from quest_deploy.backends.exactness import kernels_key

        fuse = _fuses(lowered)
        path = blob_path(folder, batch, kernels_key(self))
        try:
            write_blob(
                lambda: compile_graph(lowered, options, shapes, fuse=fuse, kept=True),
                path,
                _config(options) | weights_config(lowered, options),
            )
        except (RuntimeError, ValueError, OSError) as e:
            if isinstance(e, OSError) and e.errno == errno.ENOSPC:
                raise
            path.unlink(missing_ok=True)
            logger.warning(
                "openvino keeps nothing compiled for batches of %d (%s): the engine opens as "
                "slowly as it compiles",
                batch,
                reason_of(e),
            )
            compile_graph(lowered, options, shapes, fuse=fuse)

    def open(self, folder: Path, options: EngineOptions) -> Runner:
        """With all kernels, but for float graphs that openvino crashes on, the benchmark's: see
        :func:`fusing_crashes`.
        """
        from exporters.graph_info import load_signature
        from quest_deploy.backends.exactness import kernels_key

        lowered = folder / LOWERED
        blobs = kept_blobs(
            folder, load_signature(lowered), options.compiled_batch, kernels_key(self)
        )
        return _OpenVinoRunner(lowered, options, fuse=_fuses(lowered), blobs=blobs)

    def open_segments(self, folder: Path, options: EngineOptions) -> Runner:
        """With the kernels that the engine has, but for graphs that openvino crashes on: see
        :func:`fusing_crashes`.
        """
        from exporters.graph_info import load_graph

        return _OpenVinoRunner(
            folder / LOWERED, options, fuse=not fusing_crashes(load_graph(folder / LOWERED))
        )

    def realised_precision(self, folder: Path, options: EngineOptions) -> dict[str, str]:
        """From the runtime model of the engine compiled for one sample."""
        from exporters.graph_info import load_graph
        from exporters.multiplications import multiplications

        lowered = load_graph(folder / LOWERED)
        shapes = input_shapes(lowered, 1)
        compiled = compile_graph(folder / LOWERED, options, tuple(shapes.items()))
        return runtime_precisions(compiled.get_runtime_model(), multiplications(lowered, shapes))


def _fuses(lowered: Path) -> bool:
    """Whether openvino may fuse what it likes in an engine's graph."""
    from exporters.graph_info import has_quantizers, load_graph, load_signature

    return has_quantizers(load_signature(lowered)) or not fusing_crashes(load_graph(lowered))


def _config(options: EngineOptions) -> dict[str, Any]:
    """The settings that every engine is compiled and read with."""
    # Without the group size of 0 a float activation that meets a dequantized weight is quantized to
    # 8 bits, silently.
    config: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": HINTS[options.dtype],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }
    if options.threads:
        config["INFERENCE_NUM_THREADS"] = options.threads
    return config


def fusing_crashes(segments: ir.Model) -> bool:
    """Whether a norm is scaled by a computed factor: with no layer around, fusing the two kills the
    process (openvino 2026.4).
    """
    for node in (node for node in segments.graph if node.op_type == "GroupNormalization"):
        for product in (use.node for use in node.outputs[0].uses() if use.node.op_type == "Mul"):
            factors = [
                x.producer() for x in product.inputs if x is not None and x is not node.outputs[0]
            ]
            # SiLU multiplies by the norm's own sigmoid.
            if any(factor is not None and factor.op_type != "Sigmoid" for factor in factors):
                return True
    return False


def compile_graph(
    path: Path,
    options: EngineOptions,
    shapes: Shapes | None = None,
    *,
    fuse: bool = True,
    profile: bool = False,
    kept: bool = False,
) -> Any:
    """Compile the graph at ``path``, for fixed input shapes if given; ``profile`` makes each run
    time its nodes, ``kept`` is for what is written as a blob.
    """
    import openvino

    core, config = openvino.Core(), _config(options)
    if profile:
        config["PERF_COUNT"] = True
    beside = weights_config(path, options) if kept else {}
    config |= beside
    try:
        with gathered(path, f"{path.name}.data") as graph:
            model = core.read_model(graph)
        if beside:
            hold_all_but_weights(model, path)
        if shapes is not None:
            model.reshape({name: list(shape) for name, shape in shapes})
        _forward_halves(model)
        if options.dtype == "fp32":  # bf16 would round once more
            _scale_masked_attention_last(model)
        if not fuse or (options.dtype == "bf16" and fusing_errs(model)):
            config["SNIPPETS_MODE"] = "DISABLE"
        return core.compile_model(model, "CPU", config)
    except RuntimeError as e:
        raise QuestDeployError(f"openvino refuses {path}: {reason_of(e)}") from e


def fusing_errs(model: Any) -> bool:
    """Whether an attention has as many tokens as heads: in bf16 openvino 2026.4 then takes one for
    the other in its fused kernel.

    Its result is wrong by its own size; so is nothing else, nor this without the fusion, nor in
    FP32 (measured).
    """
    for transpose in (op for op in model.get_ops() if op.get_type_name() == "Transpose"):
        shape, order = transpose.get_input_partial_shape(0), transpose.input_value(1).get_node()
        if (
            shape.rank == 4
            and order.get_type_name() == "Constant"
            and list(order.get_data()) == [0, 2, 1, 3]
            and shape[1] == shape[2]
        ):
            return True
    return False


def _forward_halves(model: Any) -> None:
    """Let the readers of a Split of a Concat into the same parts read the parts themselves, in
    place.

    The graph joins the halves of a gated layer so that the layer's output can be verified; openvino
    would copy them, twice.
    """
    for split in (op for op in model.get_ops() if op.get_type_name() in ("Split", "VariadicSplit")):
        concat = split.input_value(0).get_node()
        if concat.get_type_name() != "Concat" or concat.get_input_size() != split.get_output_size():
            continue
        parts = [concat.input_value(i) for i in range(concat.get_input_size())]
        if all(
            part.get_partial_shape() == split.output(i).get_partial_shape()
            for i, part in enumerate(parts)
        ):
            for i, part in enumerate(parts):
                split.output(i).replace(part)


def _scale_masked_attention_last(model: Any) -> None:
    """Multiply what a masked attention gives by its sample's scale where the heads are joined
    again, in place: the same numbers.

    openvino 2026.4 fuses an attention only where it reads no more than some tensors; a mask is one
    too many, as a test tells until it is not.
    """
    import openvino

    for scaled in (op for op in model.get_ordered_ops() if op.get_type_name() == "Multiply"):
        product, scale, path = scaled.input_value(0), scaled.input_value(1), _joined(scaled)
        if not path or not _is_by_sample(scale, path) or not _is_masked(product.get_node()):
            continue
        _, transpose, joined = path
        readers = joined.output(0).get_target_inputs()
        transpose.input(0).replace_source_output(product)
        flat = openvino.opset13.reshape(scale, [0, 1, 1], special_zero=True)
        last = openvino.opset13.multiply(joined.output(0), flat)
        for reader in readers:
            reader.replace_source_output(last.output(0))


def _joined(scaled: Any) -> list[Any]:
    """``scaled`` and what joins its heads: the Transpose that alone reads it, and the Reshape that
    alone reads that and is no output of the model; an empty list where something else does.
    """
    path = [scaled]
    for kind in ("Transpose", "Reshape"):
        inputs = list(path[-1].output(0).get_target_inputs())
        if len(inputs) != 1 or inputs[0].get_node().get_type_name() != kind:
            return []
        path.append(inputs[0].get_node())
    ends = [reader.get_node().get_type_name() for reader in path[-1].output(0).get_target_inputs()]
    return [] if "Result" in ends else path


def _is_by_sample(scale: Any, path: list[Any]) -> bool:
    """Whether ``scale`` is [B, 1, 1, 1] and what ``path`` gives [B, ...], joined [B, N, C]."""
    partial = [scale.get_partial_shape(), *(node.get_output_partial_shape(0) for node in path)]
    if not all(shape.is_static for shape in partial):
        return False
    sizes, *shapes = (list(shape.to_shape()) for shape in partial)
    order = path[1].input_value(1).get_node()
    first = order.get_type_name() == "Constant" and bool(order.get_data()[0] == 0)
    batch = shapes[0][:1]
    return (
        first
        and sizes == [*batch, 1, 1, 1]
        and [len(shape) for shape in shapes] == [4, 4, 3]
        and all(shape[:1] == batch for shape in shapes)
    )


def _is_masked(product: Any) -> bool:
    """Whether ``product`` is the second of an attention whose scores something is added to."""
    if product.get_type_name() != "MatMul":
        return False
    node = product.input_value(0).get_node()
    while node.get_type_name() not in ("Softmax", "MatMul") and node.get_input_size():
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Softmax":
        return False
    return bool(node.input_value(0).get_node().get_type_name() == "Add")


class _OpenVinoRunner(Runner):
    """Compiles the graph for each batch size it meets, and keeps the last few.

    OpenVINO fuses the elementwise work around the quantizers only where shapes are fixed: the same
    graph with a dynamic batch was seen to take twice as long. Threads take turns, since a request
    has memory of its own for one call.
    """

    def __init__(
        self,
        path: Path,
        options: EngineOptions,
        *,
        fuse: bool = True,
        blobs: Mapping[Shapes, Path] | None = None,
    ) -> None:
        """Run the graph at ``path``; ``blobs`` are what was compiled of it, by the shapes of the
        inputs. Neither may change while it is open: they are read whenever new shapes come.
        """
        self._path, self._options, self._fuse = path, options, fuse
        self._blobs = blobs or {}
        self._files = (path, path.with_name(f"{path.name}.data"), *self._blobs.values())
        self._opened = self._versions()
        self._requests: OrderedDict[Shapes, tuple[Any, Any]] = OrderedDict()
        self._ahead: Shapes | None = None
        self._lock = Lock()

    def prepare(self) -> None:
        """Open the blob, where there is one; of several, it is unknown which is needed."""
        if len(self._blobs) == 1:
            [self._ahead] = self._blobs
            _AHEAD.submit(self._open_ahead)

    def _open_ahead(self) -> None:
        with self._lock:
            if self._ahead is not None:  # nothing has run yet
                self._request(self._ahead)

    def close(self) -> None:
        """See the base class; what is being opened goes too."""
        with self._lock:
            self._ahead = None
            self._requests.clear()

    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        shapes = tuple((name, value.shape) for name, value in sorted(feeds.items()))
        with self._lock:
            ahead, self._ahead = self._ahead, None
            if ahead is not None and ahead != shapes:
                self._requests.pop(ahead, None)  # it would only take memory
            try:
                results = self._request(shapes).infer(input_arrays(feeds))
            except RuntimeError as e:
                raise QuestDeployError(f"openvino failed: {reason_of(e)}") from e
            # A copy: the request's own output memory is overwritten by the next call.
            copies = [(output.get_names(), value.copy()) for output, value in results.items()]
        return {
            name: value for names, value in copies for name in names
        }  # equal outputs are one that has all their names

    def _request(self, shapes: Shapes) -> Any:
        if shapes not in self._requests:
            compiled, content = self._compiled(shapes)
            self._requests[shapes] = compiled.create_infer_request(), content
            while len(self._requests) > KEPT_SHAPES:
                self._requests.popitem(last=False)
        self._requests.move_to_end(shapes)
        return self._requests[shapes][0]

    def _compiled(self, shapes: Shapes) -> tuple[Any, Any]:
        """The compiled model, and what must outlive it: a blob's content, where it was opened from
        one. Raise QuestDeployError where the files are no more what was opened: another build's,
        whose hashes nobody checked, and whose options are not these.
        """
        self._check_files()
        opened = None
        if (blob := self._blobs.get(shapes)) is not None:
            config = _config(self._options) | weights_config(self._path, self._options)
            opened = open_blob(blob, config)
        if opened is None:
            opened = compile_graph(self._path, self._options, shapes, fuse=self._fuse), None
        self._check_files()
        return opened

    def _check_files(self) -> None:
        """Where one is gone the runtime says so, or does without it."""
        found = zip(self._versions(), self._opened, strict=True)
        if any(now not in (None, before) for now, before in found):
            raise QuestDeployError(
                f"{self._path.parent} was changed since the engine was opened; open it again"
            )

    def _versions(self) -> list[tuple[int, int, int] | None]:
        """What changes when a file is replaced or written to; None where there is none."""
        found: list[tuple[int, int, int] | None] = []
        for path in self._files:
            try:
                state = path.stat()
            except FileNotFoundError:
                found.append(None)
            else:
                found.append((state.st_ino, state.st_size, state.st_mtime_ns))
        return found
