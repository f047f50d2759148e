"""The one definition of ``quest::GegluTimestepQuantize``, version 1: GEGLU and the quantizer behind
it in one pass over memory.

    codes[int8, [B, ..., C]] = GegluTimestepQuantize(x [B, ..., 2 * C], bucket[B], scale[K], low[K],
    high[K], offset[K], channel[C]) codes = TimestepQuantize(values * gelu(gates), ...; axis = the
    last)        values, gates = the halves of x along its last axis

computed in FP32 whatever x's type, gelu by the error function. No exported graph has the op:
FuseGeglu makes it for TensorRT, whose plugin computes it (trt_plugins/geglu_timestep_quantize). The
function is for tests, which run a fused graph without the plugin.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.ops.timestep_quantize import INPUTS, FunctionBuilder

OP_TYPE = "GegluTimestepQuantize"


def function_body() -> ir.Function:
    """The op as a model-local function."""
    builder = FunctionBuilder(INPUTS)
    op, operands = builder.op, builder.operands
    x = op("Cast", [operands["x"]], "x_float", to=ir.DataType.FLOAT.value)
    values, gates = builder.ops("Split", [x], ["values", "gates"], axis=-1, num_outputs=2)
    activation = op("Mul", [values, op("Gelu", [gates], "gelu", approximate="none")], "activation")
    rank = op("Shape", [op("Shape", [x], "x_shape")], "rank")
    return builder.function(OP_TYPE, builder.codes(activation, rank, operands["channel"]))
