"""How large the integers may be that a runtime's kernels add up exactly on one processor.

Without VNNI, x86's 8-bit kernels add each two products in 16 bits and saturate (vpmaddubsw): exact
as long as any two weights that meet there stay small together, wrong by tens of percents above.
What a runtime does is not read off the processor's name but asked, by the graph of
``exporters.probe``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.editor import array_of
from exporters.graph_info import graph_info

CONV, GROUPED_CONV, LINEAR, ATTENTION = KINDS = ("conv", "grouped conv", "linear", "attention")
LEVELS = (127, 64, 15)
"""The magnitudes of weights that are asked about: all of INT8, those whose pairs fit 16 bits with
any activation, 4-bit ones.
"""
SAFE = 64
"""The level that no known runtime breaks: 255 * (64 + 64) < 2^15."""
SIGNED, UNSIGNED = ACTIVATIONS = ("int8", "uint8")
FOUR_BITS = 4
SATURATING_KEY = "quest.saturating"
"""A lowered graph's metadata: by node, the form that it was given since signed 8-bit operands may
saturate (see AvoidSaturation).
"""
_TYPES = {
    ir.DataType.INT4: SIGNED,
    ir.DataType.INT8: SIGNED,
    ir.DataType.UINT4: UNSIGNED,
    ir.DataType.UINT8: UNSIGNED,
}


def kernel(kind: str, activation: str, weight: str) -> str:
    """The name of a kernel, such as "linear uint8 x int8"; an attention product's second operand is
    its weight.
    """
    return f"{kind} {activation} x {weight}"


@dataclass(frozen=True)
class Exactness:
    """By :func:`kernel`, the largest of ``LEVELS`` at which its sums are exact; 0 where they never
    are, or where nobody asked.

    ``always`` is for runtimes whose kernels add in 32 bits (GPUs).
    """

    levels: Mapping[str, int] = field(default_factory=dict)
    always: bool = False

    def holds(self, name: str, magnitude: float) -> bool:
        """Whether the kernel ``name`` is exact for weights of ``magnitude``, half the largest sum
        of two.
        """
        return self.always or magnitude <= self.levels.get(name, 0)

    def short_of(self, needs: Mapping[str, int]) -> list[str]:
        """The kernels of ``needs`` that are not exact at the level needed."""
        return [name for name, level in needs.items() if not self.holds(name, level)]


EXACT = Exactness(always=True)
"""Kernels that add in 32 bits."""
EXACT_ANYWHERE = Exactness(
    {
        kernel(kind, activation, weight): SAFE if weight == SIGNED else LEVELS[0]
        for kind in KINDS
        for activation in ACTIVATIONS
        for weight in ACTIVATIONS
        if (kind, weight) != (ATTENTION, UNSIGNED)
    }
)
"""What holds on every x86-64 processor and runtime that was asked (docs/processors.md): small
signed weights, and unsigned weights.
"""


MIDDLE = 128
"""The zero-point of signed codes that are stored as unsigned ones."""


def as_unsigned(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """int8 codes plus 128."""
    return np.asarray(codes ^ np.int8(-MIDDLE)).view(np.uint8)


def pair_magnitude(codes: NDArray[Any], output_axis: int) -> float:
    """Half the largest sum, in magnitude, of two weights of one output channel, whichever two a
    kernel may pair.
    """
    rows = np.moveaxis(codes, output_axis, 0).reshape(codes.shape[output_axis], -1).astype(np.int32)
    if rows.shape[1] < 2:
        return float(np.abs(rows).max(initial=0)) / 2
    highest, lowest = (
        np.partition(sign * rows, -2, axis=1)[:, -2:].clip(0).sum(1).max() for sign in (1, -1)
    )
    return max(int(highest), int(lowest)) / 2


@dataclass(frozen=True)
class IntegerProduct:
    """A Conv or MatMul whose operands are both dequantized codes.

    Attributes:
        node: it. kind: of ``KINDS``. activation, weight: the types of its codes.
        dequantize: the DequantizeLinear of its second operand.
        bits: of the second operand's codes in a product of two activations, where known.
    """

    node: ir.Node
    kind: str
    activation: str
    weight: str
    dequantize: ir.Node
    bits: int | None = None

    @property
    def magnitude(self) -> float:
        """Of its weights (see :func:`pair_magnitude`), or of the second operand's codes in a
        product of two activations; reads all weights.
        """
        highest, codes = float(LEVELS[0]), self.dequantize.inputs[0]
        assert codes is not None
        constant = constant_codes(codes)
        if constant is None:
            return float(LEVELS[-1]) if self.bits == FOUR_BITS else highest
        return min(pair_magnitude(constant, 1 if self.kind == LINEAR else 0), highest)

    @property
    def kernel(self) -> str:
        """The name of the kernel that computes it."""
        return kernel(self.kind, self.activation, self.weight)


def integer_products(model: ir.Model) -> list[IntegerProduct]:
    """All of them in a graph whose quantizers have been expanded, in the graph's order."""
    bits = {quantizer.codes: quantizer.bits for quantizer in graph_info(model).quantizers.values()}
    return [found for node in model.graph if (found := _integer_product(node, bits)) is not None]


def _integer_product(node: ir.Node, bits: Mapping[str, int]) -> IntegerProduct | None:
    if node.op_type not in ("Conv", "MatMul"):
        return None
    dequantizers = [
        _dequantizer(_unmoved(node.inputs[0]) if node.op_type == "Conv" else node.inputs[0]),
        _dequantizer(node.inputs[1]),
    ]
    if dequantizers[0] is None or dequantizers[1] is None:
        return None
    activation, weight = (
        dequantize.inputs[0] for dequantize in dequantizers if dequantize is not None
    )
    if (
        activation is None
        or weight is None
        or activation.dtype not in _TYPES
        or weight.dtype not in _TYPES
    ):
        return None
    if not _is_constant(weight):
        kind = ATTENTION
    elif node.op_type == "Conv":
        kind = CONV if node.attributes.get_int("group", 1) == 1 else GROUPED_CONV
    else:
        kind = LINEAR
    types = _TYPES[activation.dtype], _TYPES[weight.dtype]
    return IntegerProduct(node, kind, *types, dequantizers[1], bits.get(weight.name or ""))


def constant_codes(codes: ir.Value) -> NDArray[Any] | None:
    """The weight's codes behind ``codes``, widened from 4 bits or not; None for what is
    computed.
    """
    stored = _stored(codes)
    return array_of(stored) if stored.is_initializer() else None


def _is_constant(codes: ir.Value) -> bool:
    return _stored(codes).is_initializer()


def _stored(codes: ir.Value) -> ir.Value:
    """``codes`` before they were widened from 4 bits."""
    producer = codes.producer()
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        return producer.inputs[0]
    return codes


def _unmoved(value: ir.Value | None) -> ir.Value | None:
    """``value`` before it was made an image (see LinearToConv)."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type in ("Transpose", "Unsqueeze"):
        return _unmoved(producer.inputs[0])
    return value


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def kernel_needs(model: ir.Model) -> dict[str, int]:
    """By kernel, the least of ``LEVELS`` at which the lowered graph's integer products are
    exact.
    """
    found: dict[str, int] = {}
    for product in integer_products(model):
        magnitude = product.magnitude
        level = min(level for level in LEVELS if level >= magnitude)
        found[product.kernel] = max(level, found.get(product.kernel, 0))
    return found
