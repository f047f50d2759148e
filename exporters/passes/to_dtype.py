"""The passes, in order, that turn the portable graph into one that computes in another type than
FP32 besides integers.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.passes.balance_scales import BalanceScales
from exporters.passes.to_low_precision import ToLowPrecision
from exporters.passes.widen_weights import WidenWeights

LOW_PRECISION_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def to_dtype(model: ir.Model, dtype: str) -> ir.Model:
    """Rewrite the portable graph ``model`` in place and return it; ``dtype`` is fp32, which changes
    nothing, fp16 or bf16.
    """
    if dtype in LOW_PRECISION_TYPES:
        low = ToLowPrecision(LOW_PRECISION_TYPES[dtype])
        ir.passes.Sequential(WidenWeights(), BalanceScales(), low)(model)
    return model
