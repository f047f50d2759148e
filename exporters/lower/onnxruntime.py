"""ONNX Runtime: the op expanded, weights as INT8.

Linears run as INT8 GEMMs; a convolution without a quantizer behind it stays in float there (ConvInteger is slower than float).
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.passes.to_native import to_native


def lower(model: ir.Model, *, frozen_bucket: int | None = None) -> ir.Model:
    """Rewrite the portable graph in place and return it; ``frozen_bucket`` makes its scales static (see FreezeBucket)."""
    return to_native(model, cast_int4_at_runtime=False, signed_zero_points=True, frozen_bucket=frozen_bucket)
