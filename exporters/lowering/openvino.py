"""OpenVINO: the op expanded, weights stored as INT4 and widened by a Cast, which the CPU plugin
folds when it compiles.

Convolutions and linears run as INT8 there; so does quantized attention, whose products, scales and
softmax become one kernel. Without VNNI its integer linears are slow, and become convolutions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporters.exactness import EXACT, LEVELS, LINEAR, SIGNED, Exactness, kernel
from exporters.passes.dequantize_casts import DequantizeCasts
from exporters.passes.linear_to_conv import LinearToConv
from exporters.passes.merge_scales import MergeScales
from exporters.passes.split_gates import SplitGates
from exporters.passes.to_native import to_native
from exporters.passes.unsigned_codes import UnsignedCodes

if TYPE_CHECKING:
    import onnx_ir as ir


def lower(
    model: ir.Model, *, frozen_bucket: int | None = None, exactness: Exactness = EXACT
) -> ir.Model:
    """Rewrite the portable graph in place and return it.

    Args:
        frozen_bucket: makes its scales static (see FreezeBucket).
        exactness: what the runtime's integer kernels compute exactly (see AvoidSaturation).
    """
    DequantizeCasts()(model)
    return to_native(
        model,
        cast_int4_at_runtime=True,
        signed_zero_points=True,
        frozen_bucket=frozen_bucket,
        exactness=exactness,
        expanded=(UnsignedCodes(), MergeScales(), SplitGates()),
        exact=() if _fast_linears(exactness) else (LinearToConv(exactness),),
    )


def _fast_linears(exactness: Exactness) -> bool:
    """Whether integer linears are faster than float ones: those that add in 32 bits, by VNNI."""
    return exactness.holds(kernel(LINEAR, SIGNED, SIGNED), LEVELS[0])
