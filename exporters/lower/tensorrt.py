"""TensorRT and TensorRT for RTX, natively: the op expanded, unit-scale Q/DQ around INT8 layers, for strong typing.

The parser refuses INT4 weights in a Conv, and the Cast that would widen them, so the initializers themselves are INT8.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from exporters.passes.expand_timestep_quantize import ExpandTimestepQuantize
from exporters.passes.freeze_bucket import FreezeBucket
from exporters.passes.gather_tables_once import GatherTablesOnce
from exporters.passes.widen_int4 import WidenInt4


def lower(model: ir.Model, *, frozen_bucket: int | None = None) -> ir.Model:
    """Rewrite the portable graph in place and return it; ``frozen_bucket`` makes its scales static (see FreezeBucket)."""
    ir.passes.Sequential(
        ExpandTimestepQuantize(),
        *([] if frozen_bucket is None else [FreezeBucket(frozen_bucket)]),
        WidenInt4(cast_at_runtime=False),
        common.CommonSubexpressionEliminationPass(),
        GatherTablesOnce(),
        common.RemoveUnusedNodesPass(),
    )(model)
    return model
