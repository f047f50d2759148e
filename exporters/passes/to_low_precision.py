"""Compute in FP16 or bf16, with FP32 where those lose accuracy: a strongly typed graph, in which
each value has its one type.

Needs: a graph that computes in FP32; portable, since ``quest::TimestepQuantize`` takes x of any
float type and computes in FP32; its scales balanced where the type is FP16 (see BalanceScales).
Guarantees: products (Conv, MatMul) give the low-precision type, and so does what computes with
them. The graph's inputs and outputs stay FP32, and so does all that no product has touched: the
timestep's path up to its first layer, the choice of the bucket, the quantizers' tables. Values keep
their names. In FP32 besides:

1. Norms, Softmax and sums, and the squares that a mean adds up: they add up many squares,
   exponentials or codes. What follows stays FP32 until it meets a value of the low-precision type,
   so that nothing is rounded between a norm, its SiLU and the quantizer.
2. A product that something is subtracted from, namely what the offset of its codes added: the two
   nearly cancel.
3. A product of integers that is only scaled and masked before a Softmax, which has the exponential
   of its rounding error.
4. The arithmetic of a per-channel quantizer, whose zero-points reach 1e8.
5. Resize's scales, by the operator's definition.
6. Products whose result is divided by a row of itself: linear attention's sums over all tokens.

Constants, and rows gathered from constant tables, are stored in the type that they are read in. A
weight's scale is rounded too, but never to zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of
from exporters.ops import timestep_quantize
from exporters.passes.contract import guarantee, need

if TYPE_CHECKING:
    from numpy.typing import NDArray

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
NORMS = ("GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization")
FLOAT_OPS = (*NORMS, "Softmax", "ReduceMean", "ReduceSum")
FLOAT_INPUTS = {"Resize": (1, 2)}
"""The positions of inputs that are FP32 whatever the others are."""
OPSETS = {ir.DataType.FLOAT16: 21, ir.DataType.BFLOAT16: 22}
"""The first opset in which Conv takes the type; 22 differs from 21 in the types that operators
take.
"""


class ToLowPrecision(ir.passes.InPlacePass):
    def __init__(self, dtype: ir.DataType) -> None:
        self.dtype = dtype

    def requires(self, model: ir.Model) -> None:
        untyped = [str(x.name) for node in model.graph for x in node.outputs if x.dtype is None]
        need(not untyped, f"the types of {', '.join(untyped)} are unknown")

    def ensures(self, model: ir.Model) -> None:
        ends = (*model.graph.inputs, *model.graph.outputs)
        narrow = [str(value.name) for value in ends if value.dtype in OPSETS]
        guarantee(not narrow, f"{', '.join(narrow)} are no longer FP32")
        for node in model.graph:
            if node.op_type in PRODUCTS:
                types = {x.dtype for x in (*node.inputs, *node.outputs) if x is not None}
                wide = types == {ir.DataType.FLOAT} and _is_wide(node)
                half = types == {self.dtype}
                guarantee(half or wide, f"{node.name} computes in {', '.join(map(str, types))}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for imports in (
            model.graph.opset_imports,
            *(function.opset_imports for function in model.functions.values()),
        ):
            imports[""] = max(imports[""], OPSETS[self.dtype])
        _Rewriter(model.graph, self.dtype).rewrite()
        return ir.passes.PassResult(model, modified=True)


class _Rewriter:
    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self.graph, self.dtype, self.editor = graph, dtype, Editor(graph)
        self.wide = {node for node in graph if node.op_type in PRODUCTS and _is_wide(node)}
        self.converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def rewrite(self) -> None:
        for node in list(self.graph):
            if node.op_type == "DequantizeLinear":
                self._dequantize(node)
            elif node.domain != timestep_quantize.DOMAIN and node.op_type != "Cast":
                self._compute(node)
        for i, output in enumerate(self.graph.outputs):
            if output.dtype is self.dtype:
                name = output.name
                output.name = f"{name}_{_name(self.dtype)}"
                self.graph.outputs[i] = self._as(output, ir.DataType.FLOAT)
                self.graph.outputs[i].name = name

    def _dequantize(self, node: ir.Node) -> None:
        """In the low-precision type, unless something reads it in FP32."""
        scale = node.inputs[1]
        assert scale is not None
        if all(
            reader.op_type in PRODUCTS and reader not in self.wide
            for reader in node.outputs[0].consumers()
        ):
            node.replace_input_with(1, self._constant(scale, self.dtype, positive=True))
            node.outputs[0].type = ir.TensorType(self.dtype)

    def _compute(self, node: ir.Node) -> None:
        always_float = FLOAT_INPUTS.get(node.op_type, ())
        inputs = {
            i: x
            for i, x in enumerate(node.inputs)
            if x is not None and self._is_float(x) and i not in always_float
        }
        dtype = self._type_of(node, list(inputs.values()))
        for i, x in inputs.items():
            node.replace_input_with(i, self._as(x, dtype))
        for output in node.outputs:
            if self._is_float(output):
                output.type = ir.TensorType(dtype)

    def _type_of(self, node: ir.Node, inputs: list[ir.Value]) -> ir.DataType:
        if node.op_type in PRODUCTS:
            return ir.DataType.FLOAT if node in self.wide else self.dtype
        if node.op_type in FLOAT_OPS or _begins_rounding(node) or _is_averaged(node):
            return ir.DataType.FLOAT
        return self.dtype if any(x.dtype is self.dtype for x in inputs) else ir.DataType.FLOAT

    def _is_float(self, value: ir.Value) -> bool:
        return value.dtype in (ir.DataType.FLOAT, self.dtype)

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` in another type: once for all that read it so."""
        if value.dtype is dtype:
            return value
        if (value, dtype) not in self.converted:
            self.converted[value, dtype] = self._convert(value, dtype)
        return self.converted[value, dtype]

    def _convert(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.is_initializer():
            return self._constant(value, dtype)
        name, producer = f"{value.name}_{_name(dtype)}", value.producer()
        if producer is not None and _gathers_from_constant(producer):
            first, second = producer.inputs
            assert first is not None
            attributes: dict[str, Any] = {a.name: a.value for a in producer.attributes.values()}
            converted = self.editor.op(
                producer.op_type,
                [self._as(first, dtype), second],
                name,
                shape=value.shape,
                **attributes,
            )
        else:
            converted = self.editor.op(
                "Cast", [value], name, dtype=dtype, shape=value.shape, to=dtype.value
            )
        if producer is None:
            self.graph.insert_before(self.graph[0], self.editor.take())
        else:
            self.graph.insert_after(producer, self.editor.take())
        return converted

    def _constant(self, value: ir.Value, dtype: ir.DataType, *, positive: bool = False) -> ir.Value:
        array: NDArray[Any] = array_of(value).astype(dtype.numpy())
        if positive:  # a scale of zero would divide by it; engines refuse it
            array = np.asarray(
                np.maximum(array, np.nextafter(array.dtype.type(0), array.dtype.type(1)))
            )
        return self.editor.constant(f"{value.name}_{_name(dtype)}", array)


def _name(dtype: ir.DataType) -> str:
    return dtype.name.lower()


def _is_wide(product: ir.Node) -> bool:
    """Whether the product is FP32 (cases 2, 3 and 6)."""
    return _cancels(product) or _gives_scores(product) or _divides(product)


def _cancels(product: ir.Node) -> bool:
    """Whether something is subtracted from the product (case 2)."""
    return any(use.node.op_type == "Sub" and use.idx == 0 for use in product.outputs[0].uses())


def _gives_scores(product: ir.Node) -> bool:
    """Whether integers are multiplied and the product is only scaled, or masked, before a Softmax
    (case 3).
    """
    producers = [x.producer() for x in product.inputs if x is not None]
    if not all(
        producer is not None and producer.op_type == "DequantizeLinear" for producer in producers
    ):
        return False
    readers = list(product.outputs[0].consumers())
    while readers:
        reader = readers.pop()
        if reader.op_type == "Softmax":
            return True
        if reader.op_type in ("Mul", "Div", "Add"):
            readers += reader.outputs[0].consumers()
    return False


def _divides(product: ir.Node) -> bool:
    """Whether a row of the product, or of the product that reads it, divides the rest (case 6)."""
    values = list(product.outputs)
    while values:
        for use in values.pop().uses():
            if use.node.op_type == "Div" and use.idx == 1:
                return True
            if use.node.op_type in ("Add", "MatMul", "Slice", "Split"):
                values += use.node.outputs
    return False


def _is_averaged(node: ir.Node) -> bool:
    """Whether these are the squares of a mean (case 1)."""
    return node.op_type == "Pow" and all(
        reader.op_type == "ReduceMean" for reader in node.outputs[0].consumers()
    )


def _begins_rounding(node: ir.Node) -> bool:
    """Whether a per-channel quantizer begins here (case 4)."""
    return node.op_type == "Div" and any(
        reader.op_type == "Round" for reader in node.outputs[0].consumers()
    )


def _gathers_from_constant(node: ir.Node) -> bool:
    """Whether this is a Gather from an initializer, or an Unsqueeze behind one."""
    source = node.inputs[0]
    if source is None or node.op_type not in ("Gather", "Unsqueeze"):
        return False
    producer = source.producer()
    return (
        source.is_initializer()
        if node.op_type == "Gather"
        else producer is not None and _gathers_from_constant(producer)
    )
