"""The multiplications of a graph: every Conv and every matrix product, those of quantized layers
and all others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from exporters.editor import array_of
from exporters.ops import timestep_quantize

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

OPERATORS = ("Conv", "ConvInteger", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger")
_COMPUTED = "_computed"
_SIZES = ("Add", "Concat", "Div", "Mul", "Reshape", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze")
"""What exporters compute sizes with."""
_KEEP_SHAPE = (timestep_quantize.OP_TYPE, "GroupNormalization")
_KEEP_CONSTANT = ("Cast", "DequantizeLinear", "Identity", "Mul", "Reshape", "Sub", "Transpose")
"""What lies between an initializer and the weight that a multiplication reads."""


@dataclass(frozen=True)
class Multiplication:
    """One node that multiplies.

    Attributes:
        node: its name. output: the name of its value. operator: its type.
        weights: how many weights it reads; 0 where both operands are computed.
        weight_names: the names of the constants that the weights come from, and of what is made of
            them.
        operands: for each of its first two inputs, the names of the nodes and values it comes from,
            nearest first, as far as the previous multiplication.
        macs: multiply-adds for one sample; None where the graph's shapes do not tell.
    """

    node: str
    output: str
    operator: str
    weights: int
    weight_names: frozenset[str]
    operands: tuple[tuple[str, ...], tuple[str, ...]]
    macs: int | None


def multiplications(model: ir.Model, shapes: dict[str, tuple[int, ...]]) -> list[Multiplication]:
    """All of them, in the graph's order.

    Args:
        shapes: of the graph's inputs, by name, the batch in axis 0.
    """
    inferred = _inferred_shapes(model, shapes)
    return [_multiplication(node, inferred) for node in _nodes(model)]


def multiplication_names(model: ir.Model) -> list[str]:
    """The names of their nodes alone, in the graph's order."""
    return [node.name or "" for node in _nodes(model)]


def _nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type in OPERATORS]


def _multiplication(node: ir.Node, shapes: dict[str, list[int | None]]) -> Multiplication:
    left, right = (value for value in node.inputs[:2])
    assert left is not None
    assert right is not None
    weights, names = 0, frozenset[str]()
    for value in (left, right):
        constants = _constants(value)
        if constants is not None:
            weights = max(
                (c.const_value.size for c in constants if c.const_value is not None), default=0
            )
            names = frozenset(_names_behind(value))
    operands = (tuple(_chain(left)), tuple(_chain(right)))
    output = node.outputs[0].name or ""
    return Multiplication(
        node.name or "",
        output,
        node.op_type,
        weights,
        names,
        operands,
        _macs(node, weights, shapes),
    )


def _macs(node: ir.Node, weights: int, shapes: dict[str, list[int | None]]) -> int | None:
    """Axis 0, the batch, is left out; an output element takes a multiply-add for each weight of its
    channel or element of its row.
    """
    output = shapes.get(node.outputs[0].name or "")
    if output is None or None in output[1:]:
        return None
    elements = math.prod(size for size in output[1:] if size is not None)
    if node.op_type in ("Conv", "ConvInteger"):
        return elements * weights // (output[1] or 1)
    if node.op_type == "ConvTranspose":
        return None
    for value, axis in zip(node.inputs[:2], (-1, -2), strict=True):
        shape = shapes.get(value.name or "") if value is not None else None
        if shape is not None and shape[axis] is not None:
            return elements * (shape[axis] or 0)
    return None


def _inferred_shapes(
    model: ir.Model, shapes: dict[str, tuple[int, ...]]
) -> dict[str, list[int | None]]:
    proto = ir.to_proto(model)  # initializers in a file beside the graph stay there
    del proto.graph.value_info[
        :
    ]  # with their symbols, which would hide sizes that follow from ``shapes``
    sizes = _computed_sizes(model, shapes)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, f"{name}{_COMPUTED}") for name, array in sizes.items()
    )
    for node in proto.graph.node:
        if node.op_type in _KEEP_SHAPE:
            _pass_shape_on(node)
        elif node.op_type == "Reshape" and node.input[1] in sizes:
            node.input[1] += _COMPUTED
    for value in proto.graph.input:
        if value.name in shapes:
            value.CopyFrom(
                onnx.helper.make_tensor_value_info(
                    value.name, value.type.tensor_type.elem_type, shapes[value.name]
                )
            )
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    found: dict[str, list[int | None]] = {
        value.name: [
            dim.dim_value if dim.HasField("dim_value") else None
            for dim in value.type.tensor_type.shape.dim
        ]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
        if value.type.tensor_type.HasField("shape")
    }
    return {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer} | found


def _computed_sizes(model: ir.Model, shapes: dict[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    """The targets of Reshapes that are computed from the sizes of the graph's inputs: shape
    inference does not divide.
    """
    found: dict[ir.Value, NDArray[Any] | None] = {}

    def value_of(value: ir.Value | None) -> NDArray[Any] | None:
        if value is None:
            return None
        if value.const_value is not None:
            return array_of(value)
        if value not in found:
            found[value] = computed(value.producer())
        return found[value]

    def computed(node: ir.Node | None) -> NDArray[Any] | None:
        if node is None or node.op_type not in _SIZES:
            return None
        if node.op_type == "Shape":
            source = node.inputs[0]
            if source is None or source.name not in shapes:
                return None
            operands = [np.empty(shapes[source.name])]
        else:
            known = [value_of(operand) for operand in node.inputs]
            operands = [operand for operand in known if operand is not None]
            if len(operands) < len(known):
                return None
        feeds = {
            x.name or "": operand
            for x, operand in zip(node.inputs, operands, strict=True)
            if x is not None
        }
        results: Any = ReferenceEvaluator(ir.to_proto(node)).run(None, feeds)
        return np.asarray(results[0])

    targets = {node.inputs[1] for node in model.graph if node.op_type == "Reshape"}
    arrays = {
        target.name or "": value_of(target)
        for target in targets
        if target is not None and target.const_value is None
    }
    return {name: array for name, array in arrays.items() if array is not None}


def _pass_shape_on(node: onnx.NodeProto) -> None:
    """Make ``node`` an operator of the same shape that shape inference knows: it fails at these,
    and at all that follows.
    """
    to = (
        onnx.TensorProto.INT8
        if node.op_type == timestep_quantize.OP_TYPE
        else onnx.TensorProto.FLOAT
    )
    del node.input[1:], node.attribute[:]
    node.op_type, node.domain = "Cast", ""
    node.attribute.append(onnx.helper.make_attribute("to", to))


def _constants(value: ir.Value) -> list[ir.Value] | None:
    """The initializers that ``value`` is computed from; None where it also depends on the graph's
    inputs.
    """
    if value.is_initializer():
        return [value]
    producer = value.producer()
    if producer is None or producer.op_type not in _KEEP_CONSTANT:
        return None
    found: list[ir.Value] = []
    for operand in producer.inputs:
        constants = [] if operand is None else _constants(operand)
        if constants is None:
            return None
        found += constants
    return found


def _names_behind(value: ir.Value) -> Iterator[str]:
    """The names of ``value``, of the nodes it is made by and of what it is made of, as far as it is
    the first input.
    """
    yield value.name or ""
    producer = value.producer()
    if producer is not None:
        yield producer.name or ""
        if producer.inputs and producer.inputs[0] is not None:
            yield from _names_behind(producer.inputs[0])


def _chain(value: ir.Value) -> Iterator[str]:
    """The names of ``value`` and the nodes behind it, along first inputs, as far as the previous
    multiplication.
    """
    producer = value.producer()
    if producer is None:
        yield value.name or ""
        return
    yield producer.name or ""
    yield value.name or ""
    if producer.op_type not in OPERATORS and producer.inputs and producer.inputs[0] is not None:
        yield from _chain(producer.inputs[0])
