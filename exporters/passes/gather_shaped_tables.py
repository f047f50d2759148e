"""Gather each table in the shape that it is read in, instead of through an Unsqueeze.

Needs: expanded quantizers, and the value ``bucket``: a table [K] is an initializer, read by
Gather(table, bucket) and then Unsqueeze to [B, 1, ...].
Guarantees: one Gather from [K, 1, ...] for each table and rank; the same values.

TensorRT's parser makes three layers of each output of the Split that GatherTablesOnce leaves, and
its builder is slow in layers.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.editor import Editor, array_of, replace_value
from exporters.graph_info import BUCKET
from exporters.passes.contract import need_bucket
from exporters.passes.gather_tables_once import guarantee_gathered, table_reads


class GatherShapedTables(ir.passes.InPlacePass):
    def requires(self, model: ir.Model) -> None:
        need_bucket(model)

    def ensures(self, model: ir.Model) -> None:
        guarantee_gathered(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        editor = Editor(model.graph)
        bucket = ir.convenience.create_value_mapping(model.graph)[BUCKET]
        shaped: dict[tuple[ir.Value, int], ir.Value] = {}
        reads = table_reads(bucket)
        for _, table, unsqueeze, rank in reads:
            if (table, rank) not in shaped:
                name = f"{table.name}_rank_{rank}"
                rows = editor.constant(name, array_of(table).reshape(-1, *[1] * (rank - 1)))
                shaped[table, rank] = editor.op(
                    "Gather", [rows, bucket], f"{name}_of_sample", shape=unsqueeze.outputs[0].shape
                )
            replace_value(unsqueeze.outputs[0], shaped[table, rank])
            model.graph.remove(unsqueeze, safe=True)
        for gather in dict.fromkeys(gather for gather, *_ in reads):
            if not gather.outputs[0].uses() and not gather.outputs[0].is_graph_output():
                model.graph.remove(gather, safe=True)
        producer = bucket.producer()
        assert producer is not None
        model.graph.insert_after(
            producer, editor.take()
        )  # before whoever reads them, in whatever order
        return ir.passes.PassResult(model, modified=bool(shaped))
