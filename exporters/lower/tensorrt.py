"""TensorRT and TensorRT for RTX, natively: the op expanded, unit-scale Q/DQ around INT8 layers, for strong typing.

The parser refuses INT4 weights in a Conv, and the Cast that would widen them, so the initializers themselves are INT8.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.passes.to_dtype import to_dtype
from exporters.passes.to_native import to_native


def lower(model: ir.Model, *, frozen_bucket: int | None = None, dtype: str = "fp32") -> ir.Model:
    """Rewrite the portable graph in place and return it.

    Args:
        frozen_bucket: makes its scales static (see FreezeBucket).
        dtype: what is computed in besides integers (see ToHalf).
    """
    to_dtype(model, dtype)
    return to_native(model, cast_int4_at_runtime=False, signed_zero_points=False, frozen_bucket=frozen_bucket)
