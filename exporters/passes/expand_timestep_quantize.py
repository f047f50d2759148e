"""Expand each ``quest::TimestepQuantize`` into standard ONNX with static shapes, for runtimes
without our plugin.

Needs: every x has a known rank; tables are initializers.
Guarantees: no node and no function of the ``quest`` domain, but for quantizers kept for the plugin
(KeepTimestepQuantize); each quantizer's codes keep their name.

1. A table that varies over the buckets is gathered by each sample's bucket, [B] -> [B, 1, ...].
2. A table that is the same in every bucket (the bounds of symmetric codes) becomes a scalar
   constant.
3. A smoothing scale of ones is left out: x / (s * 1) is x / s, exactly; so is an offset of zeros.
4. An x that is not float32 is cast first, since the op computes in FP32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of, replace_value
from exporters.ops import timestep_quantize
from exporters.passes.contract import (
    guarantee,
    guarantee_codes,
    is_kept,
    need,
    need_tables,
    quantizer_nodes,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


class ExpandTimestepQuantize(ir.passes.InPlacePass):
    def requires(self, model: ir.Model) -> None:
        nodes = [node for node in quantizer_nodes(model) if not is_kept(node)]
        need_tables(nodes)
        for node in nodes:
            known = node.inputs[0] is not None and node.inputs[0].shape is not None
            need(known, f"{node.name}: the rank of its input is unknown")

    def ensures(self, model: ir.Model) -> None:
        need_all = [node for node in quantizer_nodes(model) if not is_kept(node)]
        guarantee(not need_all and not model.functions, "quantizers are left")
        guarantee_codes(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        editor = Editor(model.graph)
        ours = quantizer_nodes(model)
        nodes = [node for node in ours if not is_kept(node)]
        for node in nodes:
            _expand(editor, node)
        model.functions.clear()
        if len(nodes) == len(ours):
            model.graph.opset_imports.pop(timestep_quantize.DOMAIN, None)
        return ir.passes.PassResult(model, modified=bool(nodes))


def _expand(editor: Editor, node: ir.Node) -> None:
    x, bucket, *tables, channel = (value for value in node.inputs if value is not None)
    assert x.shape is not None  # as requires() saw
    rank, axis = len(x.shape), node.attributes[timestep_quantize.AXIS].as_int()
    codes = node.outputs[0]
    prefix = (codes.name or "").removesuffix(".codes")

    def op(op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: Any) -> ir.Value:
        shape = x.shape if inputs[0] is not scale else None
        return editor.op(op_type, inputs, f"{prefix}.{name}", shape=shape, **attributes)

    scale, low, high = (_of_sample(editor, table, bucket, rank) for table in tables[:3])
    offset = _of_sample(editor, tables[3], bucket, rank) if array_of(tables[3]).any() else None
    if x.dtype is not ir.DataType.FLOAT:
        x = op("Cast", [x], "x_float", dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT.value)
    expanded = timestep_quantize.arithmetic(
        op,
        x,
        scale,
        low,
        high,
        offset,
        _shaped_channel(editor, channel, rank, axis),
        editor.constant("unit_scale", np.asarray(1.0, np.float32)),
        editor.constant("zero_code", np.asarray(0, np.int8)),
    )
    editor.insert_before(node)
    name = codes.name
    replace_value(codes, expanded)
    editor.graph.remove(node, safe=True)
    expanded.name = name


def _of_sample(editor: Editor, table: ir.Value, bucket: ir.Value, rank: int) -> ir.Value:
    values = array_of(table)
    if (values == values[0]).all() and not (table.name or "").endswith(".scale"):
        return editor.constant(f"bound_{values[0]:g}", values[:1].reshape(()))
    gathered = editor.op("Gather", [table, bucket], f"{table.name}_gathered_by_quantizer")
    axes = editor.constant(f"unsqueeze_to_rank_{rank}", np.arange(1, rank))
    return editor.op("Unsqueeze", [gathered, axes], f"{table.name}_by_quantizer")


def _shaped_channel(editor: Editor, channel: ir.Value, rank: int, axis: int) -> ir.Value | None:
    values = array_of(channel)
    if (values == 1).all():
        return None
    return editor.constant(f"{channel.name}_shaped", values.reshape(-1, *[1] * (rank - 1 - axis)))
