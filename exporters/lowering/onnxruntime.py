"""ONNX Runtime: the op expanded, all layers as INT8 matrix products, weights stored as INT4 and
widened by a Cast.

Its integer convolutions requantize what they put out (QLinearConv) or are slower than float
(ConvInteger), while its matrix products run as INT8 on unsigned activations and signed weights.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.exactness import EXACT, Exactness
from exporters.passes.conv_to_matmul import ConvToMatMul
from exporters.passes.dequantize_casts import DequantizeCasts
from exporters.passes.to_dtype import to_dtype
from exporters.passes.to_native import to_native
from exporters.passes.unsigned_activations import UnsignedActivations


def lower(
    model: ir.Model,
    *,
    frozen_bucket: int | None = None,
    dtype: str = "fp32",
    exactness: Exactness = EXACT,
) -> ir.Model:
    """Rewrite the portable graph in place and return it.

    Args:
        frozen_bucket: makes its scales static (see FreezeBucket).
        dtype: precision of the non-quantized ops (see ToLowPrecision); a low-precision type is for
            GPUs, which need none of the CPU's own forms.
        exactness: what the runtime's integer kernels compute exactly (see AvoidSaturation).
    """
    DequantizeCasts()(model)
    to_dtype(model, dtype)
    return to_native(
        model,
        cast_int4_at_runtime=True,
        signed_zero_points=True,
        frozen_bucket=frozen_bucket,
        exactness=exactness,
        expanded=(UnsignedActivations(), ConvToMatMul()) if dtype == "fp32" else (),
    )
