"""OpenVINO: the op expanded, weights stored as INT4 and widened by a Cast, which the CPU plugin folds when it compiles.

Convolutions and linears run as INT8 there; so does quantized attention, whose products, scales and softmax become one kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporters.passes.merge_scales import MergeScales
from exporters.passes.split_gates import SplitGates
from exporters.passes.to_native import to_native
from exporters.passes.unsigned_codes import UnsignedCodes

if TYPE_CHECKING:
    import onnx_ir as ir


def lower(model: ir.Model, *, frozen_bucket: int | None = None) -> ir.Model:
    """Rewrite the portable graph in place and return it; ``frozen_bucket`` makes its scales static (see FreezeBucket)."""
    return to_native(
        model,
        cast_int4_at_runtime=True,
        signed_zero_points=True,
        frozen_bucket=frozen_bucket,
        expanded=(UnsignedCodes(), MergeScales(), SplitGates()),
    )
