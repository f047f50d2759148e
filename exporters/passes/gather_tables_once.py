"""Gather all quantizers' values of a sample at once, instead of one Gather and one Unsqueeze for
every table.

Needs: expanded quantizers, and the value ``bucket``: a table [K] is an initializer, read by
Gather(table, bucket) and then Unsqueeze to [B, 1, ...].
Guarantees: for each rank and type, one Gather from a stacked table [K, tables, 1, ...] and
one Split into [B, 1, ...]; the same values.

A UNet has some hundred quantizers with three tables each; the nodes it saves are what choosing a
bucket costs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of, replace_value
from exporters.graph_info import BUCKET
from exporters.passes.contract import guarantee, need_bucket


class GatherTablesOnce(ir.passes.InPlacePass):
    def requires(self, model: ir.Model) -> None:
        need_bucket(model)

    def ensures(self, model: ir.Model) -> None:
        guarantee_gathered(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        bucket = ir.convenience.create_value_mapping(model.graph)[BUCKET]
        groups: dict[tuple[int, str], list[ir.Node]] = {}
        for _, table, unsqueeze, rank in table_reads(bucket):
            groups.setdefault((rank, str(array_of(table).dtype)), []).append(unsqueeze)
        producer = bucket.producer()
        assert producer is not None
        for (rank, dtype), unsqueezes in sorted(groups.items()):
            _gather_once(Editor(model.graph), rank, dtype, bucket, unsqueezes, producer)
        return ir.passes.PassResult(model, modified=bool(groups))


def table_reads(bucket: ir.Value) -> list[tuple[ir.Node, ir.Value, ir.Node, int]]:
    """Each Unsqueeze of a table [K] that is gathered by ``bucket``: the Gather, the table, the
    Unsqueeze, and the rank it gives.
    """
    found = []
    for gather, _ in bucket.uses():
        table = gather.inputs[0]
        if (
            gather.op_type == "Gather"
            and table is not None
            and table.is_initializer()
            and array_of(table).ndim == 1
        ):
            for reader, _ in gather.outputs[0].uses():
                if reader.op_type == "Unsqueeze" and reader.inputs[1] is not None:
                    found.append((gather, table, reader, 1 + array_of(reader.inputs[1]).size))
    return found


def guarantee_gathered(model: ir.Model) -> None:
    """No table is gathered and then brought to its shape."""
    left = table_reads(ir.convenience.create_value_mapping(model.graph)[BUCKET])
    guarantee(not left, f"{len(left)} tables are still read through an Unsqueeze")


def _gather_once(
    editor: Editor,
    rank: int,
    dtype: str,
    bucket: ir.Value,
    unsqueezes: list[ir.Node],
    producer: ir.Node,
) -> None:
    graph = editor.graph
    gathers = []
    for unsqueeze in unsqueezes:
        gather = unsqueeze.inputs[0].producer() if unsqueeze.inputs[0] is not None else None
        assert gather is not None
        gathers.append(gather)
    tables = [array_of(table) for gather in gathers if (table := gather.inputs[0]) is not None]
    stacked = np.stack(tables, axis=1).reshape(*(len(tables[0]), len(tables)), *[1] * (rank - 2))
    stacked = np.ascontiguousarray(stacked)
    kind = f"rank_{rank}_{dtype}"
    rows = editor.op(
        "Gather", [editor.constant(f"tables_of_{kind}", stacked), bucket], f"values_of_{kind}"
    )
    outputs = [
        ir.Value(
            name=f"{u.outputs[0].name}_split", type=u.outputs[0].type, shape=u.outputs[0].shape
        )
        for u in unsqueezes
    ]
    axis, parts = (
        ir.Attr(name, ir.AttributeType.INT, number)
        for name, number in (("axis", 1), ("num_outputs", len(outputs)))
    )
    split = ir.Node("", "Split", [rows], [axis, parts], outputs=outputs, name=f"split_of_{kind}")
    graph.insert_after(producer, [*editor.take(), split])
    for unsqueeze, output in zip(unsqueezes, outputs, strict=True):
        replace_value(unsqueeze.outputs[0], output)
        graph.remove(unsqueeze, safe=True)
    for gather in dict.fromkeys(gathers):
        if not gather.outputs[0].uses():  # a table may be read at two ranks
            graph.remove(gather, safe=True)
