"""Store float weights in FP32 again that NarrowWeights stored in 16 bits, for runtimes that do not
take those everywhere: TensorRT refuses bfloat16 for processors before SM80. Branches of low rank
are widened too.

Needs: nothing but Casts to FLOAT reads an initializer of 16 bits.

Guarantees: no float initializer has 16 bits, and the Casts that read them are gone.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.editor import replace_value, store_as
from exporters.passes.contract import guarantee, need
from exporters.passes.narrow_weights import NARROW


class WidenWeights(ir.passes.InPlacePass):
    def requires(self, model: ir.Model) -> None:
        for value in _narrow(model):
            casts = all(
                node.op_type == "Cast" and node.outputs[0].dtype is ir.DataType.FLOAT
                for node, _ in value.uses()
            )
            need(casts and not value.is_graph_output(), f"{value.name} is read in 16 bits")

    def ensures(self, model: ir.Model) -> None:
        left = [str(value.name) for value in _narrow(model)]
        guarantee(not left, f"{', '.join(left[:3])} have 16 bits")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        narrow = _narrow(model)
        for value in narrow:
            store_as(value, ir.DataType.FLOAT)
            for cast, _ in tuple(value.uses()):
                replace_value(cast.outputs[0], value)
                model.graph.remove(cast, safe=True)
        return ir.passes.PassResult(model, modified=bool(narrow))


def _narrow(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.initializers.values() if value.dtype in NARROW]
