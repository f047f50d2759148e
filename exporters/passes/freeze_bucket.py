"""Freeze the graph to one bucket: a static-scale graph, for measuring what choosing a bucket costs.

Needs: tables [K] that are read by Gather with the value ``bucket`` and then by Unsqueeze, or [K,
...] that are read by Gather alone. Guarantees: every table has one row, the chosen bucket's, and is
read as a constant; nothing reads ``bucket``.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.editor import Editor, array_of, replace_value
from exporters.graph_info import BUCKET
from exporters.passes.contract import guarantee, need, quantizer_nodes


class FreezeBucket(ir.passes.InPlacePass):
    """See the module's docstring; run after ExpandTimestepQuantize, before GatherTablesOnce."""

    def __init__(self, bucket: int) -> None:
        self.bucket = bucket

    def requires(self, model: ir.Model) -> None:
        need(not quantizer_nodes(model), "expand TimestepQuantize before freezing its bucket")

    def ensures(self, model: ir.Model) -> None:
        bucket = ir.convenience.create_value_mapping(model.graph)[BUCKET]
        readers = [str(node.name) for node in bucket.consumers()]
        guarantee(not readers, f"{', '.join(readers[:3])} still choose by the bucket")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        editor = Editor(model.graph)
        bucket = ir.convenience.create_value_mapping(model.graph)[BUCKET]
        gathers = [user for user, _ in bucket.uses() if user.op_type == "Gather"]
        for gather in gathers:
            table = gather.inputs[0]
            assert table is not None
            row = array_of(table)[self.bucket : self.bucket + 1]
            if self.bucket < 0 or not len(row):
                raise ir.passes.PreconditionError(
                    f"expected a bucket from 0 to {len(array_of(table)) - 1}, as {table.name} has, "
                    f"found {self.bucket}"
                )
            # A table [K] is read through an Unsqueeze; a per-channel quantizer's, [K, 1, C, ...],
            # is gathered in its final shape.
            frozen = editor.constant(
                f"{table.name}_frozen", row.reshape(()) if row.ndim == 1 else row
            )
            for reader in (
                [user for user, _ in gather.outputs[0].uses()] if row.ndim == 1 else [gather]
            ):
                replace_value(reader.outputs[0], frozen)
                if reader is not gather:
                    model.graph.remove(reader, safe=True)
            model.graph.remove(gather, safe=True)
        return ir.passes.PassResult(model, modified=bool(gathers))
