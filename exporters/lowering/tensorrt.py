"""TensorRT and TensorRT for RTX: unit-scale Q/DQ around INT8 layers, for strong typing; the op
expanded, left to our plugin, or a QuantizeLinear of its own scale.

An optimization profile is for sizes, and so is the engine: of tokens it takes as many as the model.
The parser refuses INT4 weights in a Conv, and the Cast that would widen them, so the initializers
themselves are INT8. Its builder is slow in layers, so that the graph has few.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from exporters.passes.dequantize_casts import DequantizeCasts
from exporters.passes.fix_tokens import FixTokens
from exporters.passes.gather_quantize_scale import GatherQuantizeScale
from exporters.passes.gather_shaped_tables import GatherShapedTables
from exporters.passes.keep_timestep_quantize import KeepTimestepQuantize
from exporters.passes.round_in_quantize_linear import RoundInQuantizeLinear
from exporters.passes.to_dtype import to_dtype
from exporters.passes.to_native import to_native
from exporters.passes.widen_weights import WidenWeights

Quantize = Literal["native", "plugin", "gathered"]


def lower(
    model: ir.Model,
    *,
    frozen_bucket: int | None = None,
    dtype: str = "fp32",
    quantize: Quantize = "native",
) -> ir.Model:
    """Rewrite the portable graph in place and return it.

    Args:
        frozen_bucket: makes its scales static (see FreezeBucket).
        dtype: precision of the non-quantized ops (see ToLowPrecision).
        quantize: ``native`` expands the op into TensorRT's own layers; ``plugin`` keeps it for the
            plugin of trt_plugins/, which TensorRT proper alone takes; ``gathered`` gives
            QuantizeLinear the scale of the batch's bucket (see GatherQuantizeScale). With a frozen
            bucket it is always native: the static-scale graph has no bucket to pick.
    """
    portable: dict[str, tuple[ir.passes.InPlacePass, ...]] = {
        "plugin": (KeepTimestepQuantize(),),
        "gathered": (GatherQuantizeScale(),),
    }
    FixTokens()(model)
    WidenWeights()(model)
    DequantizeCasts()(model)
    to_dtype(model, dtype)
    return to_native(
        model,
        cast_int4_at_runtime=False,
        signed_zero_points=False,
        frozen_bucket=frozen_bucket,
        expanded=(GatherShapedTables(), RoundInQuantizeLinear()),
        portable=portable.get(quantize, ()) if frozen_bucket is None else (),
    )
