"""Take and give FP16 at a graph's ends, and compute as before: half the bytes to move for who calls
it.

Needs: any graph that is about to be compiled; what verification looks for by name is not kept.
Guarantees: the graph's FP32 inputs and outputs are FP16 under their names, but for inputs that are
kept (rounded to FP16, a timestep can land in another bucket). Everything between is as it was,
between two casts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from exporters.passes.contract import guarantee

if TYPE_CHECKING:
    from collections.abc import Collection

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


class LowPrecisionIO(ir.passes.InPlacePass):
    """See the module's docstring.

    Args:
        keep: names of inputs that stay as they are.
    """

    def __init__(self, keep: Collection[str]) -> None:
        self.keep = keep

    def ensures(self, model: ir.Model) -> None:
        given = [value for value in model.graph.inputs if value.name not in self.keep]
        left = [str(value.name) for value in (*given, *model.graph.outputs) if value.dtype is FLOAT]
        guarantee(not left, f"{', '.join(left)} are still FP32")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for i, value in enumerate(graph.inputs):
            if value.dtype is FLOAT and value.name not in self.keep:
                given = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(HALF))
                graph.inputs[i] = given
                value.name = f"{given.name}_float"
                graph.insert_before(
                    graph[0], ir.node("Cast", [given], {"to": FLOAT}, outputs=[value])
                )
                modified = True
        for i, value in enumerate(graph.outputs):
            if value.dtype is FLOAT:
                put_out = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(HALF))
                value.name = f"{put_out.name}_float"
                graph.append(ir.node("Cast", [value], {"to": HALF}, outputs=[put_out]))
                graph.outputs[i] = put_out
                modified = True
        return ir.passes.PassResult(model, modified=modified)
