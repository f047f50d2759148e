"""A small portable graph of worst-case codes, to ask a runtime what its integer kernels compute
exactly on this processor.

Every kind of product that a lowering writes is in it: convolutions of few and of many channels,
1x1, grouped and depthwise; linears on rows and on single vectors; both with 8-bit weights and with
4-bit ones; attention's two products, behind the transposes that heads need; activations signed and
unsigned. All scales are 1, and every output is a sum of products of integers below 2^24, which
float32 holds exactly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from exporters.exactness import ATTENTION, CONV, GROUPED_CONV, LINEAR
from exporters.graph_info import CHECKPOINT_KEY, SAMPLE_MULTIPLE_KEY, SAMPLE_SHAPE_KEY, SCHEME_KEY
from exporters.ops import timestep_quantize
from exporters.passes.insert_quantized_layers import (
    LAYER_PLACEHOLDER,
    MATMUL_PLACEHOLDER,
    PLACEHOLDER_DOMAIN,
    InsertQuantizedLayers,
)
from quest_deploy.artifacts.checkpoint import (
    ActivationQuantizerData,
    Architecture,
    AttentionMatmulData,
    Checkpoint,
    ConvGeometry,
    LayerData,
    QuantizerData,
)
from quest_deploy.artifacts.scheme import Scheme, Symmetry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

BATCH, TOKENS, HEADS, HEAD = 2, 24, 2, 40
CHANNELS, OUTPUTS = 48, 32
SIZE = 10
SECOND = (HEADS, TOKENS, HEAD)
"""The shape of the keys and of the values."""


@dataclass(frozen=True)
class Case:
    """One product of the probe, called ``name`` in the graph.

    Attributes:
        kind: see ``exporters.exactness.KINDS``. unsigned: whether its activation's codes are
            0..255, else -127..127.
        shape: its activation's: [C, H, W] of a convolution, [N, C] or [C] of a linear, [heads, N,
            d] of queries, [heads, N, N] of attention's weights.
        kernel_size, groups: of a convolution.
        bits: of a layer's weights; those of 4 bits have the same codes in every probe.
    """

    name: str
    kind: str
    unsigned: bool
    shape: tuple[int, ...]
    kernel_size: int = 1
    groups: int = 1
    bits: int = 8

    @property
    def of_values(self) -> bool:
        """Whether it is attention's second product."""
        return self.shape == (HEADS, TOKENS, TOKENS)


def _cases() -> list[Case]:
    found = []
    for sign, unsigned in (("signed", False), ("unsigned", True)):
        found += [
            Case(f"conv_in_{sign}", CONV, unsigned, (4, SIZE, SIZE), 3),
            Case(f"conv_{sign}", CONV, unsigned, (CHANNELS, SIZE, SIZE), 3),
            Case(f"conv_4bit_{sign}", CONV, unsigned, (CHANNELS, SIZE, SIZE), 3, bits=4),
            Case(f"conv_1x1_{sign}", CONV, unsigned, (64, SIZE, SIZE)),
            Case(f"grouped_conv_{sign}", GROUPED_CONV, unsigned, (64, SIZE, SIZE), 3, 4),
            Case(
                f"depthwise_conv_{sign}", GROUPED_CONV, unsigned, (OUTPUTS, SIZE, SIZE), 3, OUTPUTS
            ),
            Case(f"linear_{sign}", LINEAR, unsigned, (TOKENS, 64)),
            Case(f"linear_of_vector_{sign}", LINEAR, unsigned, (128,)),
            Case(f"linear_4bit_{sign}", LINEAR, unsigned, (TOKENS, 64), bits=4),
            Case(f"scores_{sign}", ATTENTION, unsigned, (HEADS, TOKENS, HEAD)),
            Case(f"mix_{sign}", ATTENTION, unsigned, (HEADS, TOKENS, TOKENS)),
        ]
    return found


CASES = _cases()


@dataclass(frozen=True)
class Probe:
    """The portable graph, what to feed it, and by its outputs' names, the cases', the exact
    results.
    """

    model: ir.Model
    feeds: dict[str, Floats]
    exact: dict[str, Floats]


def make_probe(magnitude: int) -> Probe:
    """The probe whose weights, and attention's second operands, reach ``magnitude``: of one sign,
    mixed, and random.
    """
    rng = np.random.default_rng(magnitude)
    layers: dict[str, LayerData] = {}
    products: dict[str, AttentionMatmulData] = {}
    quantizers: dict[str, QuantizerData] = {}
    feeds: dict[str, Floats] = {"timestep": np.zeros(BATCH, np.float32)}
    exact: dict[str, Floats] = {}
    skeleton = _Skeleton()
    for case in CASES:
        low, high = (0, 255) if case.unsigned else (-127, 127)
        x = rng.choice(np.asarray([low, high]), (BATCH, *case.shape))
        x[0] = high
        first = _site(f"{case.name}.activation", case, case.shape, low, high)
        quantizers[first.name] = first
        if case.kind == ATTENTION:
            y = rng.choice(np.asarray([-magnitude, magnitude]), (BATCH, *SECOND))
            y[0] = magnitude
            second = _site(f"{case.name}.second", case, SECOND, -127, 127)
            quantizers[second.name] = second
            products[case.name] = AttentionMatmulData(case.name, (first.name, second.name), 1)
            exact[case.name] = (x @ (y if case.of_values else y.swapaxes(2, 3))).astype(np.float32)
            # As heads lie in a model: [B, N, heads, d], transposed before they are quantized.
            feeds |= {
                f"{case.name}.x": _float(x if case.of_values else x.swapaxes(1, 2)),
                f"{case.name}.y": _float(y.swapaxes(1, 2)),
            }
        else:
            layer = _layer(rng, case, magnitude)
            layers[case.name] = layer
            exact[case.name] = _exact(x, layer)
            feeds[f"{case.name}.x"] = _float(x)
        skeleton.add(case)
    checkpoint = Checkpoint(
        "probe",
        Architecture("", {}, {}, None),
        Scheme.parse("w8a8", buckets=1),
        layers,
        quantizers,
        {},
        {},
        products,
    )
    return Probe(skeleton.portable(checkpoint), feeds, exact)


def _float(x: NDArray[Any]) -> Floats:
    return np.ascontiguousarray(x, np.float32)


def _site(
    name: str, case: Case, shape: tuple[int, ...], low: int, high: int
) -> ActivationQuantizerData:
    symmetry = Symmetry.UNSIGNED if low == 0 else Symmetry.SYMMETRIC
    of_conv = case.kind in (CONV, GROUPED_CONV)
    axis, channels = (1, shape[0]) if of_conv else (len(shape), shape[-1])
    one, bounds = (
        np.ones(1, np.float32),
        (np.full(1, low, np.float32), np.full(1, high, np.float32)),
    )
    return ActivationQuantizerData(
        name, 8, symmetry, axis, (case.name,), one, *bounds, np.ones(channels, np.float32)
    )


def _layer(rng: np.random.Generator, case: Case, magnitude: int) -> LayerData:
    of_conv = len(case.shape) == 3
    inputs = case.shape[0] // case.groups if of_conv else case.shape[-1]
    shape = (OUTPUTS, inputs, case.kernel_size, case.kernel_size) if of_conv else (OUTPUTS, inputs)
    low, high = (-8, 7) if case.bits == 4 else (-magnitude, magnitude)
    codes = rng.choice(np.asarray([low, high], np.int8), shape)
    codes[0::4], codes[1::4] = high, low
    codes[2::4] = rng.integers(low, high + 1, codes[2::4].shape)
    pad = case.kernel_size // 2
    geometry = ConvGeometry((1, 1), (pad, pad), (1, 1), case.groups) if of_conv else None
    return LayerData(case.name, case.bits, codes, np.ones(OUTPUTS, np.float32), None, geometry, 1)


def _exact(x: NDArray[Any], layer: LayerData) -> Floats:
    """The layer's sums of products of integers, in int64."""
    weight = layer.weight_codes.astype(np.int64)
    if layer.conv is None:
        return np.asarray(x @ weight.T, np.float32)
    pad, groups = layer.conv.padding[0], layer.conv.groups
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], (2, 3))
    parts = zip(np.split(windows, groups, axis=1), np.split(weight, groups), strict=True)
    return np.concatenate(
        [np.einsum("bchwij,ocij->bohw", x_part, w) for x_part, w in parts], axis=1
    ).astype(np.float32)


class _Skeleton:
    """The graph of placeholders that torch's exporter would give, and InsertQuantizedLayers
    takes.
    """

    def __init__(self) -> None:
        self.inputs = [_value("timestep", ["batch"])]
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []

    def add(self, case: Case) -> None:
        """A placeholder of ``case`` between an input and an output."""
        if case.kind == ATTENTION:
            y = self._input(f"{case.name}.y", (TOKENS, HEADS, HEAD))
            if case.of_values:
                x = self._input(f"{case.name}.x", case.shape)
                y = self._transpose(y, f"{case.name}.values", [0, 2, 1, 3])
            else:
                x = self._input(f"{case.name}.x", (TOKENS, HEADS, HEAD))
                x = self._transpose(x, f"{case.name}.heads", [0, 2, 1, 3])
                y = self._transpose(y, f"{case.name}.keys_transposed", [0, 2, 3, 1])
            shape = [HEADS, TOKENS, HEAD if case.of_values else TOKENS]
            result = self._placeholder(MATMUL_PLACEHOLDER, case, [x, y], shape)
        else:
            x = self._input(f"{case.name}.x", case.shape)
            shape = (
                [OUTPUTS, *case.shape[1:]] if len(case.shape) == 3 else [*case.shape[:-1], OUTPUTS]
            )
            result = self._placeholder(LAYER_PLACEHOLDER, case, [x], shape)
        self.outputs.append(
            self._node("Identity", [result], case.name, list(result.shape or [])[1:])
        )

    def portable(self, checkpoint: Checkpoint) -> ir.Model:
        """The portable graph of ``checkpoint``."""
        imports = {"": timestep_quantize.OPSET, timestep_quantize.DOMAIN: timestep_quantize.VERSION}
        graph = ir.Graph(
            self.inputs, self.outputs, nodes=self.nodes, opset_imports=imports, name="probe"
        )
        model = ir.Model(graph, ir_version=timestep_quantize.IR_VERSION)
        InsertQuantizedLayers(checkpoint)(model)
        InsertQuantizedLayers.describe(model, checkpoint)
        function = timestep_quantize.function_body()
        model.functions[function.identifier()] = function
        model.metadata_props.update(
            {
                SCHEME_KEY: json.dumps(checkpoint.scheme.to_json()),
                CHECKPOINT_KEY: "",
                SAMPLE_SHAPE_KEY: json.dumps([1, SIZE, SIZE]),
                SAMPLE_MULTIPLE_KEY: "1",
            }
        )
        return model

    def _input(self, name: str, shape: Sequence[int]) -> ir.Value:
        self.inputs.append(_value(name, ["batch", *shape]))
        return self.inputs[-1]

    def _transpose(self, x: ir.Value, name: str, perm: list[int]) -> ir.Value:
        shape = list(x.shape or [])
        return self._node("Transpose", [x], name, [shape[i] for i in perm[1:]], perm=perm)

    def _placeholder(
        self, op_type: str, case: Case, operands: list[ir.Value], shape: Sequence[int]
    ) -> ir.Value:
        return self._node(
            op_type, operands, f"{case.name}.result", shape, PLACEHOLDER_DOMAIN, layer=case.name
        )

    def _node(
        self,
        op_type: str,
        operands: list[ir.Value],
        name: str,
        shape: Sequence[Any],
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        output = _value(name, ["batch", *shape])
        attrs = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
        self.nodes.append(ir.Node(domain, op_type, operands, attrs, outputs=[output], name=name))
        return output


def _value(name: str, shape: Sequence[Any]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
