"""The one definition of ``quest::TimestepQuantize``, version 1.

    codes[int8, shape of x] = TimestepQuantize(x, bucket[B] int64, scale[K], low[K], high[K],
    offset[K], channel[C]; axis) codes = clamp(round(x / (scale[bucket] * channel)), low[bucket],
    high[bucket]) + offset[bucket]

computed in FP32 whatever x's type, rounding half to even, one bucket per sample (x.shape[0] = B).
``channel`` lies along ``axis``. ``offset`` brings codes into int8 that would not fit (an unsigned
8-bit softmax: 0..255); it is zero everywhere else. The portable graph carries the op with this body
as a model-local function, so any ONNX runtime can run it; lowerings expand the same arithmetic with
static shapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Sequence

DOMAIN = "quest"
OP_TYPE = "TimestepQuantize"
VERSION = 1
INPUTS = ("x", "bucket", "scale", "low", "high", "offset", "channel")
TABLES = ("scale", "low", "high", "offset")
AXIS = "axis"
OPSET = 21
"""The ONNX opset of every graph: the first with INT4 DequantizeLinear."""
IR_VERSION = 10
"""The version of ONNX's file format that goes with it."""


class _Op(Protocol):
    def __call__(
        self, op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: Any
    ) -> ir.Value: ...


def arithmetic(
    op: _Op,
    x: ir.Value,
    scale: ir.Value,
    low: ir.Value,
    high: ir.Value,
    offset: ir.Value | None,
    channel: ir.Value | None,
    one: ir.Value,
    zero: ir.Value,
) -> ir.Value:
    """Build the op's arithmetic on operands that already broadcast against ``x``, and return the
    int8 codes.

    Args:
        op: adds a node to whatever is being built.
        x: float32.
        scale, low, high, offset: each sample's own, [B, 1, ...]; or scalars. None for an offset
            that is zero.
        channel: [C, 1, ...], or None where it is all ones.
        one, zero: the float32 and int8 scalars of the closing QuantizeLinear, which only changes
            the type: its input is an integer within int8's range already. Integer engines look for
                it.
    """
    step = scale if channel is None else op("Mul", [scale, channel], "step")
    ratio = op("Div", [x, step], "ratio")
    rounded = op("Round", [ratio], "rounded")
    raised = op("Max", [rounded, low], "raised")
    clipped = op("Min", [raised, high], "clipped")
    clipped = clipped if offset is None else op("Add", [clipped, offset], "shifted")
    return op("QuantizeLinear", [clipped, one, zero], "codes", dtype=ir.DataType.INT8)


class FunctionBuilder:
    """Builds the body of a model-local function over named operands."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self.operands = {name: ir.Value(name=name) for name in inputs}
        self.nodes: list[ir.Node] = []

    def op(
        self, op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: Any
    ) -> ir.Value:
        """Add a node with one output and return it."""
        return self.ops(op_type, inputs, [name], **attributes)[0]

    def ops(
        self, op_type: str, inputs: Sequence[ir.Value], names: Sequence[str], **attributes: Any
    ) -> list[ir.Value]:
        """Add a node and return its outputs."""
        dtype = attributes.pop("dtype", None)
        outputs = [
            ir.Value(name=name, type=None if dtype is None else ir.TensorType(dtype))
            for name in names
        ]
        attrs = [
            a if isinstance(a, ir.Attr) else ir.convenience.convert_attribute(k, a)
            for k, a in attributes.items()
        ]
        self.nodes.append(ir.Node("", op_type, inputs, attrs, outputs=outputs, name=names[0]))
        return outputs

    def codes(self, x: ir.Value, rank: ir.Value, channel: ir.Value) -> ir.Value:
        """Add the op's arithmetic on ``x``, float32, of ``rank``, a vector of one number;
        ``channel`` broadcasts against ``x``.
        """
        unit = self.op("Constant", [], "unit", value_ints=[1])
        rest = self.op("Constant", [], "rest", value_ints=[-1])
        ones = self.op(
            "Expand", [unit, self.op("Sub", [rank, unit], "rank_less_one")], "sample_ones"
        )
        sample_shape = self.op("Concat", [rest, ones], "sample_shape", axis=0)
        gathered = [
            self.op("Gather", [self.operands[name], self.operands["bucket"]], f"{name}_gathered")
            for name in TABLES
        ]
        scale, low, high, offset = (
            self.op("Reshape", [g, sample_shape], f"{g.name}_of_sample") for g in gathered
        )
        one = self.op("Constant", [], "one", value_float=1.0)
        zero = self.op("Constant", [], "zero", value=ir.tensor(0, dtype=ir.DataType.INT8))
        return arithmetic(self.op, x, scale, low, high, offset, channel, one, zero)

    def function(
        self, op_type: str, output: ir.Value, attributes: Sequence[str] = ()
    ) -> ir.Function:
        """The function of our domain, with integer ``attributes``."""
        graph = ir.Graph(
            list(self.operands.values()),
            [output],
            nodes=self.nodes,
            opset_imports={"": OPSET},
            name=op_type,
        )
        attrs = [ir.Attr(name, ir.AttributeType.INT, None) for name in attributes]
        return ir.Function(DOMAIN, op_type, graph=graph, attributes=attrs)


def function_body() -> ir.Function:
    """The op as a model-local function, for x of any rank and any float type."""
    builder = FunctionBuilder(INPUTS)
    op, operands = builder.op, builder.operands
    axis = op(
        "Constant", [], "axis_scalar", value_int=ir.RefAttr("value_int", AXIS, ir.AttributeType.INT)
    )
    axis = op("Reshape", [axis, op("Constant", [], "vector_shape", value_ints=[1])], "axis_vector")
    rank = op("Shape", [op("Shape", [operands["x"]], "x_shape")], "rank")
    one_axis = op("Constant", [], "one_axis", value_ints=[1])
    before = op("Expand", [one_axis, axis], "ones_before")
    after = op(
        "Expand",
        [one_axis, op("Sub", [op("Sub", [rank, one_axis], "axes"), axis], "axes_after")],
        "ones_after",
    )
    channel_shape = op(
        "Concat",
        [before, op("Constant", [], "all_channels", value_ints=[-1]), after],
        "channel_shape",
        axis=0,
    )
    x = op("Cast", [operands["x"]], "x_float", to=ir.DataType.FLOAT.value)
    codes = builder.codes(
        x, rank, op("Reshape", [operands["channel"], channel_shape], "channel_shaped")
    )
    return builder.function(OP_TYPE, codes, [AXIS])
