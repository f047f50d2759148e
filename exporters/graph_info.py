"""What a graph says about itself: its scheme, its checkpoint, and where in it each layer and
quantizer is found.

The portable graph carries these as metadata; lowerings keep values' names, so that verification can
cut a layer out of what was built.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import onnx
import onnx_ir as ir

from quest_deploy.artifacts.schema import parse, validated
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")
LAYERS_KEY = "quest.layers"
MATMULS_KEY = "quest.products"
QUANTIZERS_KEY = "quest.sites"
SCHEME_KEY = "quest.scheme"
CHECKPOINT_KEY = "quest.checkpoint_sha256"
SAMPLE_SHAPE_KEY = "quest.sample_shape"
SAMPLE_MULTIPLE_KEY = "quest.sample_multiple"
TOKENS_KEY = "quest.tokens"
ADDED_INPUTS_KEY = "quest.added_inputs"
STATES, TOKENS = "encoder_hidden_states", "tokens"
"""The input of text states, and what a graph that takes any number of them calls that size."""
HEIGHT, WIDTH = "height", "width"
"""What it calls the sample's sizes; a half of the height is "height/2"."""
_REPAIR = "run `quest-deploy export` again"
_MOST_GRAPH_BYTES = 2**29
"""Without its weights."""
BUCKET = "bucket"
"""The name of the value [batch] int64 that says which bucket each sample is in."""


@validated("a layer of the graph")
@dataclass(frozen=True)
class LayerInfo:
    """A layer in the graph: ``output`` names its value; ``weight``, in the portable graph, the
    initializer of its codes.
    """

    name: str
    site: str
    weight_bits: int
    macs: int
    output: str
    weight: str


@validated("a quantizer of the graph")
@dataclass(frozen=True)
class QuantizerInfo:
    """A quantizer in the graph: ``input`` and ``codes`` name its float value and its codes.

    Codes are int8, or float32 where ``integer`` is false: such a quantizer and its readers compute
    in float. Lowered for a CPU, codes may be uint8, 128 above the int8 code.
    """

    name: str
    bits: int
    axis: int
    input: str
    codes: str
    integer: bool


@validated("a product of the graph")
@dataclass(frozen=True)
class AttentionMatmulInfo:
    """A product of two activations: for each operand its quantizer, None where it is float, and the
    name of its float value.
    """

    name: str
    sites: tuple[str | None, str | None]
    inputs: tuple[str, str]
    macs: int
    output: str


@dataclass(frozen=True)
class GraphInfo:
    """All of it, layers, products and quantizers in execution order, by name.

    Attributes:
        sample_shape: the shape of one sample, without the batch, that the model is meant for; its
            height and width may be others.
        sample_multiple: what they must be multiples of, since the model halves them so often.
    """

    scheme: Scheme
    checkpoint_sha256: str
    sample_shape: tuple[int, ...]
    sample_multiple: int
    layers: dict[str, LayerInfo]
    matmuls: dict[str, AttentionMatmulInfo]
    quantizers: dict[str, QuantizerInfo]


def describe(
    model: ir.Model,
    layers: list[LayerInfo],
    products: list[AttentionMatmulInfo],
    quantizers: list[QuantizerInfo],
) -> None:
    """Write where layers, products and quantizers are into the graph's metadata."""
    model.metadata_props[MATMULS_KEY] = json.dumps([asdict(product) for product in products])
    model.metadata_props[LAYERS_KEY] = json.dumps([asdict(layer) for layer in layers])
    model.metadata_props[QUANTIZERS_KEY] = json.dumps(
        [asdict(quantizer) for quantizer in quantizers]
    )


def has_quantizers(model: ir.Model) -> bool:
    """Whether a graph, portable or lowered, is a quantized one."""
    return QUANTIZERS_KEY in model.metadata_props


def graph_info(model: ir.Model) -> GraphInfo:
    """Read the metadata; raise InputError for a graph that quest-deploy did not write."""
    props = model.metadata_props
    try:
        return GraphInfo(
            scheme=Scheme.from_json(json.loads(props[SCHEME_KEY])),
            checkpoint_sha256=props[CHECKPOINT_KEY],
            sample_shape=sample_shape(model),
            sample_multiple=sample_multiple(model),
            layers={x.name: x for x in _entries(list[LayerInfo], props, LAYERS_KEY)},
            matmuls={x.name: x for x in _entries(list[AttentionMatmulInfo], props, MATMULS_KEY)},
            quantizers={x.name: x for x in _entries(list[QuantizerInfo], props, QUANTIZERS_KEY)},
        )
    except (KeyError, TypeError, json.JSONDecodeError) as e:
        raise InputError(
            "expected a graph written by `quest-deploy export`, found one without its metadata "
            f"({e})"
        ) from e


def sample_shape(model: ir.Model) -> tuple[int, ...]:
    """The shape of one sample, from the metadata; raise KeyError where it is not there."""
    return tuple(json.loads(model.metadata_props[SAMPLE_SHAPE_KEY]))


def sample_multiple(model: ir.Model) -> int:
    """Return what heights and widths of samples must be multiples of, from the metadata; raise
    KeyError where it is not there.
    """
    return int(json.loads(model.metadata_props[SAMPLE_MULTIPLE_KEY]))


def usual_tokens(model: ir.Model) -> int | None:
    """The number of tokens that the model is meant for, from the metadata of a graph that takes
    any; None of another.
    """
    found = model.metadata_props.get(TOKENS_KEY)
    return None if found is None else int(json.loads(found))


def added_inputs(model: ir.Model) -> tuple[str, ...]:
    """The inputs of what may be added inside the model, such as a ControlNet's residuals: zeros add
    nothing. None of most graphs.
    """
    return tuple(json.loads(model.metadata_props.get(ADDED_INPUTS_KEY, "[]")))


def size_divisors(model: ir.Model) -> dict[str, int]:
    """What the sample's height and width are divided by in each input whose sizes follow them, by
    name.
    """
    found = {}
    for value in model.graph.inputs:
        for size in value.shape or ():
            name, _, divisor = str(getattr(size, "value", size)).partition("/")
            if name == HEIGHT:
                found[value.name or ""] = int(divisor or 1)
    return found


def input_sizes(model: ir.Model) -> dict[str, tuple[int | None, ...]]:
    """The sizes of the graph's inputs, by name; None for each that may vary."""
    return {
        value.name or "": tuple(
            size if isinstance(size, int) else None for size in (value.shape or ())
        )
        for value in model.graph.inputs
    }


def _entries(kind: type[T], props: dict[str, str], key: str) -> T:
    return parse(kind, json.loads(props[key]), f"the graph's metadata {key}", _REPAIR)


def load_graph(path: Path) -> ir.Model:
    """Load an ONNX file (with its external data); raise InputError where it, or the file of its
    weights, is missing or damaged.
    """
    model = _read(path, ir.load)
    _check_inline(model, path)
    for value in _initializers(model):
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _mapped(value.const_value, path)
    return model


def load_signature(path: Path) -> ir.Model:
    """Load the inputs and the metadata of an ONNX file, which takes a small part of the time of
    :func:`load_graph`: no nodes, no weights, no outputs. Raise InputError where the file is missing
    or damaged.
    """
    return _read(path, _signature)


def _signature(path: Path) -> ir.Model:
    whole = onnx.load(path, load_external_data=False)
    graph = onnx.GraphProto(name=whole.graph.name, input=whole.graph.input)
    return ir.from_proto(
        onnx.ModelProto(
            ir_version=whole.ir_version,
            opset_import=whole.opset_import,
            metadata_props=whole.metadata_props,
            graph=graph,
        )
    )


def _read(path: Path, read: Callable[[Path], ir.Model]) -> ir.Model:
    """Read an ONNX file of a usual size; raise InputError where it cannot be."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: expected an ONNX file, found another kind of file")
    if path.exists() and path.stat().st_size > _MOST_GRAPH_BYTES:
        raise InputError(
            f"{path}: expected a graph of at most {_MOST_GRAPH_BYTES} bytes, its weights in the "
            f"file beside it (external data); found {path.stat().st_size} bytes"
        )
    try:
        return read(path)
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist; run `quest-deploy export` first") from e
    except Exception as e:  # protobuf raises its own, differing by implementation
        raise InputError(f"{path}: not a readable ONNX file ({type(e).__name__}: {e})") from e


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    """All of them, those of subgraphs too."""
    owners: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in (model.graph, *(graph for owner in owners for graph in owner.subgraphs())):
        yield from graph.initializers.values()


def _check_inline(model: ir.Model, path: Path) -> None:
    """Raise InputError where a tensor of the file has not the bytes that its shape and type say:
    onnx-ir fails where it is first used, or fills it up with zeros.
    """
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    tensors = [value.const_value for value in _initializers(model)] + [
        attribute.value
        for graph in graphs
        for node in graph.all_nodes()
        for attribute in node.attributes.values()
        if attribute.type is ir.AttributeType.TENSOR
    ]
    for tensor in tensors:
        if isinstance(tensor, ir.serde.TensorProtoTensor):
            try:
                found, expected = len(tensor.tobytes()), tensor.nbytes
            except (AssertionError, TypeError, ValueError) as e:
                raise InputError(f"{path}: its tensor {tensor.name} cannot be read ({e})") from e
            if found != expected:
                raise InputError(
                    f"{path}: expected {expected} bytes for its tensor {tensor.name} of "
                    f"{tensor.dtype} {tensor.shape}, found {found}; {_REPAIR}"
                )


def _mapped(tensor: ir.ExternalTensor, graph: Path) -> ir.TensorProtocol:
    """A tensor of the file beside ``graph``, mapped into memory here: onnx-ir refuses a file that
    is a link or has hard links, as caches and copies make them. What lies elsewhere is refused.
    """
    location, repair = str(tensor.location), "make the graph again, or copy both of its files"
    file = graph.parent / location
    if Path(location).name != location:
        raise InputError(f"{graph}: expected its weights in a file beside it, found {location}")
    size = file.stat().st_size if file.is_file() else None
    if size is None:
        raise InputError(f"{file}, which holds the graph's weights, is missing; {repair}")
    packed, shape = tensor.dtype.bitwidth < 8, tensor.shape.numpy()
    length, offset = (math.prod(shape) * tensor.dtype.bitwidth + 7) // 8, tensor.offset or 0
    if tensor.length not in (None, length) or offset < 0 or size < offset + length:
        raise InputError(
            f"{file}, which holds the graph's weights, is cut off or another's (expected "
            f"{length} bytes at {offset} for {tensor.name}, found {size} in all); {repair}"
        )
    if not length:
        return ir.Tensor(np.empty(shape, tensor.dtype.numpy()), tensor.dtype, name=tensor.name)
    raw = np.memmap(file, np.uint8, "r", offset, length)
    if packed:
        return ir.PackedTensor(raw, tensor.dtype, shape=ir.Shape(shape), name=tensor.name)
    array = raw.view(tensor.dtype.numpy()).reshape(shape)
    return ir.Tensor(array, tensor.dtype, name=tensor.name)


def save_graph(model: ir.Model, path: Path) -> None:
    """Save as ``path`` and ``path``.data beside it (external data has no 2 GB limit)."""
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
