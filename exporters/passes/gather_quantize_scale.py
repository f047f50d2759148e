"""Write a quantizer as one QuantizeLinear whose scale is gathered by the bucket, for batches whose
samples are all in one bucket.

    c = clamp(round(x / (s_k g)), low_k, high_k)
    ->  QuantizeLinear(clamp(x, low_k s_k g, high_k s_k g), s_k g; axis)

with the k of the first sample. QuantizeLinear's scale has one number, or one for each channel, so
that it cannot be each sample's own.

Needs: the portable graph; tables are initializers, bounds are integers.
Guarantees: the same codes where all samples are in one bucket, in arithmetic that rounds each
division and product once: clamping to a bound's multiple of the scale, and rounding, commute with
clamping to the bound. An output's rows are NaN where their sample is in another bucket than the
first: no wrong number can be taken for a right one. Each quantizer's codes keep their name.

1. A smoothing scale of ones is left out: the scale is one number; any other is multiplied by it, a
   number for each channel, along the quantizer's axis.
2. An x that is not float32 is cast first, since the op computes in FP32.
3. The bounds stay, those of int8 too: how a QuantizeLinear saturates an infinity is left to the
   runtime, and onnxruntime's gives -128 for a quotient beyond int32.
4. A quantizer whose codes are offset is left to be expanded: TensorRT's zero-points are zero.

DequantizeLinear keeps its constant scale, and the sample's own scale its Mul behind the layer.
Where a DequantizeLinear's scale is no constant, TensorRT for RTX 1.7 ends in a crash if it has rank
0; if it has rank 1, the engine is half as large again, as if its product were one of floats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of, replace_value
from exporters.graph_info import BUCKET
from exporters.ops import timestep_quantize
from exporters.passes.contract import guarantee, guarantee_codes, need, need_tables, quantizer_nodes

if TYPE_CHECKING:
    from collections.abc import Sequence


class GatherQuantizeScale(ir.passes.InPlacePass):
    """See the module's docstring; run before ExpandTimestepQuantize, which expands the rest."""

    def requires(self, model: ir.Model) -> None:
        nodes = quantizer_nodes(model)
        need_tables(nodes)
        for node in nodes:
            x, _, _, low, high, *_ = node.inputs
            need(x is not None and x.shape is not None, f"{node.name}: its input's rank is unknown")
            for bound in (low, high):
                values = array_of(_given(bound))
                need(bool((values == np.rint(values)).all()), f"{node.name}: a bound is no integer")

    def ensures(self, model: ir.Model) -> None:
        left = [str(node.name) for node in quantizer_nodes(model) if not _is_offset(node)]
        guarantee(not left, f"{', '.join(left[:3])} are not gathered")
        guarantee_codes(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in quantizer_nodes(model) if not _is_offset(node)]
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        bucket = ir.convenience.create_value_mapping(model.graph)[BUCKET]
        producer = bucket.producer()
        assert producer is not None  # it is computed from the timestep
        editor = Editor(model.graph)
        zero = editor.constant("first_sample", np.asarray(0, np.int64))
        first = editor.op("Gather", [bucket, zero], "bucket_of_batch", shape=[], axis=0)
        model.graph.insert_after(producer, editor.take())
        for node in nodes:
            _gather(editor, node, first)
        _poison(editor, bucket, first)
        return ir.passes.PassResult(model, modified=True)


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None  # need_tables has seen it
    return value


def _is_offset(node: ir.Node) -> bool:
    offset = node.inputs[timestep_quantize.INPUTS.index("offset")]
    return bool(array_of(_given(offset)).any())


def _gather(editor: Editor, node: ir.Node, first: ir.Value) -> None:
    x, _, scale, low, high, _, channel = (_given(value) for value in node.inputs)
    assert x.shape is not None  # as requires() saw
    codes = node.outputs[0]
    prefix = (codes.name or "").removesuffix(".codes")
    axis, rank = node.attributes[timestep_quantize.AXIS].as_int(), len(x.shape)
    smoothing = array_of(channel)
    plain = bool((smoothing == 1).all())

    def op(op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: Any) -> ir.Value:
        return editor.op(op_type, inputs, f"{prefix}.{name}", **attributes)

    def of_batch(table: ir.Value) -> ir.Value:
        """The batch's row of a table [K]; a constant where all are equal."""
        values = array_of(table)
        if (values == values[0]).all():
            return editor.constant(f"bound_{values[0]:g}", values[:1].reshape(()))
        return editor.op("Gather", [table, first], f"{table.name}_of_batch", shape=[], axis=0)

    def scaled(name: str, shape: list[int]) -> ir.Value:
        """The scale with its smoothing scale in ``shape``; a number where that is all ones."""
        if plain:
            return number
        rows = editor.constant(f"{channel.name}_{name}", smoothing.reshape(shape))
        return op("Mul", [number, rows], name, shape=shape)

    number = op("Gather", [scale, first], "scale_of_batch", shape=[], axis=0)
    if x.dtype is not ir.DataType.FLOAT:
        float32 = ir.DataType.FLOAT
        x = op("Cast", [x], "x_float", dtype=float32, shape=x.shape, to=float32.value)
    reach = scaled("broadcast_step", [smoothing.size, *[1] * (rank - 1 - axis)])
    for bound, table in (("Max", low), ("Min", high)):
        limit = op("Mul", [reach, of_batch(table)], f"{bound}_limit", shape=reach.shape)
        x = op(bound, [x, limit], f"x_{bound}", shape=x.shape)
    step = scaled("step", [smoothing.size])
    zeros = np.zeros([] if plain else smoothing.size, np.int8)
    zero = editor.constant(f"zero_codes_{zeros.size if zeros.ndim else 'scalar'}", zeros)
    gathered = editor.op(
        "QuantizeLinear",
        [x, step, zero],
        f"{prefix}.gathered",
        dtype=ir.DataType.INT8,
        shape=codes.shape,
        axis=axis,
    )
    editor.insert_before(node)
    name = codes.name
    replace_value(codes, gathered)
    editor.graph.remove(node, safe=True)
    gathered.name = name


def _poison(editor: Editor, bucket: ir.Value, first: ir.Value) -> None:
    """Have an output's rows be NaN where their sample's bucket is not the first's."""
    graph = editor.graph
    same = editor.op("Equal", [bucket, first], "in_batchs_bucket", dtype=ir.DataType.BOOL)
    nan = editor.constant("not_a_number", np.asarray(np.nan, np.float32))
    for i, output in enumerate(graph.outputs):
        assert output.shape is not None
        shape = editor.constant(
            f"shape_of_rows_{len(output.shape)}", np.asarray([-1, *[1] * (len(output.shape) - 1)])
        )
        rows = editor.op("Reshape", [same, shape], f"rows_{i}", dtype=ir.DataType.BOOL)
        name, output.name = output.name, f"{output.name}_of_any_bucket"
        kept = editor.op(
            "Where", [rows, output, nan], str(name), dtype=output.dtype, shape=output.shape
        )
        graph.outputs[i] = kept
    graph.extend(editor.take())
