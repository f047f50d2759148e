"""Let what integer layers compute stay within FP16: their sums of codes, up to 127 * 127 * inputs,
are far above its largest number.

Needs: the portable graph: ``quest::TimestepQuantize`` with its tables as initializers,
DequantizeLinear of its codes with scale 1, and each Gather from a quantizer's scales read as a
factor of what its readers compute. Guarantees: such a DequantizeLinear carries a power of two near
the quantizer's
median scale, and the factor is the quotient:

    y = scale[bucket] * Conv(DQ(codes; 1), w)    becomes    y = (scale / p)[bucket] * Conv(DQ(codes;
    p), w)

1. A power of two changes no bit in floating point, but at the ends of its range: the results are
   the same.
2. ``p`` lies where FP16 is exact: p >= 2^-14, its smallest normal number, and 127 p <= 65504.
3. A quantizer whose codes carry an offset is left alone: what is subtracted for the offset goes
   with the unit scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, array_of
from exporters.ops import timestep_quantize
from exporters.passes.contract import guarantee, need_tables, quantizer_nodes

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST, MOST = -14, 9
"""Exponents of two: 2^-14 is FP16's smallest normal number, and 127 * 2^9 = 65024."""


class BalanceScales(ir.passes.InPlacePass):
    def requires(self, model: ir.Model) -> None:
        need_tables(quantizer_nodes(model))

    def ensures(self, model: ir.Model) -> None:
        for codes, scale in _balanced(model).items():
            power = power_of_two_near(array_of(scale))
            for reader in codes.consumers():
                if reader.op_type == "DequantizeLinear" and reader.inputs[1] is not None:
                    carried = (array_of(reader.inputs[1]) == power).all()
                    guarantee(bool(carried), f"{reader.name}: its scale is not {power:g}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        editor = Editor(model.graph)
        balanced = _balanced(model)
        for codes, scale in balanced.items():
            _balance(editor, codes, scale)
        return ir.passes.PassResult(model, modified=bool(balanced))


def _balanced(model: ir.Model) -> dict[ir.Value, ir.Value]:
    """The codes of the quantizers without an offset, each with its scales."""
    found = {}
    for node in quantizer_nodes(model):
        operands = dict(zip(timestep_quantize.INPUTS, node.inputs, strict=True))
        scale, offset = operands["scale"], operands["offset"]
        assert scale is not None
        assert offset is not None
        if not array_of(offset).any():
            found[node.outputs[0]] = scale
    return found


def _balance(editor: Editor, codes: ir.Value, scale: ir.Value) -> None:
    power = power_of_two_near(array_of(scale))
    constant = editor.constant(f"scale_{power:g}", np.asarray(power, np.float32))
    for reader, _ in codes.uses():
        if reader.op_type == "DequantizeLinear":
            reader.replace_input_with(1, constant)
    quotient = editor.constant(f"{scale.name}_quotient", array_of(scale) / power)
    for reader, _ in scale.uses():
        if reader.op_type == "Gather":
            reader.replace_input_with(0, quotient)


def power_of_two_near(scales: NDArray[np.float32]) -> np.float32:
    """The power of two nearest to the median of ``scales`` by ratio, within the bounds of case
    2.
    """
    exponent = np.rint(np.log2(np.median(scales)))
    return np.float32(2.0) ** np.float32(np.clip(exponent, LEAST, MOST))
