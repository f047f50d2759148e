"""What the tests share: independent reference implementations in numpy, and runs of graphs. Import
as ``tests.helpers``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from exporters.exactness import EXACT_ANYWHERE, LEVELS, Exactness
from exporters.graph_info import CHECKPOINT_KEY, SAMPLE_MULTIPLE_KEY, SAMPLE_SHAPE_KEY, SCHEME_KEY
from exporters.ops import timestep_quantize
from exporters.passes.dequantize_casts import DequantizeCasts
from exporters.passes.insert_quantized_layers import InsertQuantizedLayers
from quest_deploy.artifacts.checkpoint import (
    ActivationQuantizerData,
    Architecture,
    AttentionMatmulData,
    Checkpoint,
    ConvGeometry,
    LayerData,
    PerChannelQuantizerData,
    QuantizerData,
    ScoreScale,
)
from quest_deploy.artifacts.scheme import Scheme, Symmetry
from quest_deploy.errors import InputError
from quest_deploy.files import read_json, sealed, write_json

Array = NDArray[Any]
Feeds = dict[str, Array]
WITH_VNNI = Exactness(dict.fromkeys(EXACT_ANYWHERE.levels, LEVELS[0]))
"""What a CPU's runtimes answer the probe on a processor that has VNNI; on one that has none they
answer ``EXACT_ANYWHERE`` or better.
"""


@contextmanager
def refused(
    *facts: object, error: type[Exception] = InputError
) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Expects ``error`` itself, no subclass of it, with a message that holds the ``facts``; an
    InputError's is one line.
    """
    with pytest.raises(error) as caught:
        yield caught
    assert type(caught.value) is error
    assert error is not InputError or "\n" not in str(caught.value)
    assert_holds(str(caught.value), *facts)


def assert_holds(message: str, *facts: object) -> None:
    """Each fact stands in ``message`` as whole words, in whatever sentence: a name, an option, a
    value, a command.
    """
    words = " ".join(message.split())
    assert [
        x for x in map(str, facts) if not re.search(rf"(?<![\w-]){re.escape(x)}(?![\w-])", words)
    ] == [], message


def float32(*values: float) -> Array:
    """The values as a float32 vector."""
    return np.asarray(values, np.float32)


def of_sample(table: Array, bucket: Array, rank: int) -> Array:
    """table[bucket], [B], shaped to broadcast over the rows of a tensor of ``rank``."""
    return table[bucket].reshape(-1, *[1] * (rank - 1))


def along(values: Array, axis: int, rank: int) -> Array:
    """values [C] shaped to broadcast along ``axis`` of a tensor of ``rank``."""
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


def numpy_codes(
    x: Array,
    bucket: Array,
    scale: Array,
    low: Array,
    high: Array,
    channel: Array,
    axis: int,
    offset: Array | None = None,
) -> Array:
    """TimestepQuantize, from its specification: float32 arithmetic, rounding half to even, int8
    codes.
    """
    x = x.astype(np.float32)
    scales, lows, highs = (of_sample(table, bucket, x.ndim) for table in (scale, low, high))
    codes = np.rint(x / (scales * along(channel, axis, x.ndim)))
    codes = np.minimum(np.maximum(codes, lows), highs)
    return (codes if offset is None else codes + of_sample(offset, bucket, x.ndim)).astype(np.int8)


def quantizer_codes(quantizer: ActivationQuantizerData, x: Array, bucket: Array) -> Array:
    """:func:`numpy_codes` with a quantizer's tables, its offset left out."""
    return numpy_codes(
        x, bucket, quantizer.scale, quantizer.low, quantizer.high, quantizer.channel, quantizer.axis
    )


def numpy_per_channel_codes(quantizer: PerChannelQuantizerData, x: Array, bucket: Array) -> Array:
    """A per-channel quantizer's codes without their zero-points, float32, in the published order of
    float32 operations.
    """
    scale, zero_point = (
        of_channel(table, bucket, quantizer.axis, x.ndim)
        for table in (quantizer.scale, quantizer.zero_point)
    )
    raised = np.rint(x.astype(np.float32) / scale) + zero_point
    return (
        np.clip(raised, np.float32(quantizer.code_low), np.float32(quantizer.code_high))
        - zero_point
    )


def of_channel(table: Array, bucket: Array, axis: int, rank: int) -> Array:
    """table[bucket], [B, C], shaped to broadcast over the rows and along ``axis`` of a tensor of
    ``rank``.
    """
    shape = [1] * rank
    shape[0], shape[axis] = len(bucket), table.shape[1]
    return table[bucket].reshape(shape)


def numpy_quantizer(quantizer: QuantizerData, x: Array, bucket: Array) -> Array:
    """The quantized tensor that the quantizer's readers get, float64: scale * code, the code wide
    enough for any range.
    """
    if isinstance(quantizer, PerChannelQuantizerData):
        scale = of_channel(quantizer.scale, bucket, quantizer.axis, x.ndim)
        return (numpy_per_channel_codes(quantizer, x, bucket) * scale).astype(np.float64)
    step = of_sample(quantizer.scale, bucket, x.ndim) * along(
        quantizer.channel, quantizer.axis, x.ndim
    )
    low, high = (of_sample(table, bucket, x.ndim) for table in (quantizer.low, quantizer.high))
    codes = np.clip(np.rint(x.astype(np.float32) / step), low, high)
    return codes.astype(np.float64) * of_sample(quantizer.scale, bucket, x.ndim)


def numpy_matmul(checkpoint: Checkpoint, name: str, a: Array, b: Array, bucket: Array) -> Array:
    """A product of two activations in float64."""
    quantizers = checkpoint.matmuls[name].sites
    left, right = (
        x.astype(np.float64)
        if quantizer is None
        else numpy_quantizer(checkpoint.quantizers[quantizer], x, bucket)
        for quantizer, x in zip(quantizers, (a, b), strict=True)
    )
    return left @ right


def numpy_layer(checkpoint: Checkpoint, name: str, x: Array, bucket: Array) -> Array:
    """A quantized layer in float64: layer(quantized x, (weight codes - zero-point) * weight scale)
    + bias.
    """
    layer = checkpoint.layers[name]
    product = float_layer(layer, numpy_quantizer(checkpoint.quantizer_of(name), x, bucket))
    bias = (
        0.0
        if layer.bias is None
        else along(
            layer.bias.astype(np.float64), 1 if layer.conv else product.ndim - 1, product.ndim
        )
    )
    return product + bias


def float_layer(layer: LayerData, x: Array, weight: Array | None = None) -> Array:
    """The layer on float64 ``x``, without bias; ``weight`` replaces the dequantized one."""
    import torch

    if weight is None:
        rank = layer.weight_codes.ndim
        zero_point = (
            0.0
            if layer.weight_zero_point is None
            else along(layer.weight_zero_point.astype(np.float64), 0, rank)
        )
        weight = (layer.weight_codes.astype(np.float64) - zero_point) * along(
            layer.weight_scale.astype(np.float64), 0, rank
        )
    if layer.conv is None:
        return x @ weight.T
    g = layer.conv
    return torch.nn.functional.conv2d(
        torch.from_numpy(x),
        torch.from_numpy(weight),
        None,
        g.stride,
        g.padding,
        g.dilation,
        g.groups,
    ).numpy()


def run(model: ir.Model | onnx.ModelProto, feeds: Feeds, *, optimized: bool = False) -> list[Array]:
    """The graph's outputs from onnxruntime, on one thread."""
    return session(model, optimized=optimized)(feeds)


def assert_same(outputs: Iterable[Array], expected: Iterable[Array]) -> None:
    """That two runs gave the same, to the last bit."""
    for found, known in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(found, known)


def reseal(path: Path, change: Callable[[Any], object]) -> None:
    """Change a document that has its own hash as if quest-deploy had written it so."""
    content = read_json(path)
    del content["sha256"]
    change(content)
    write_json(path, sealed(content))


def session(
    model: ir.Model | onnx.ModelProto, *, optimized: bool = False
) -> Callable[[Feeds], list[Array]]:
    """An onnxruntime session as a function; ``optimized`` lets it fuse. Feeds that the graph does
    not take are left out.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    level = (
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        if optimized
        else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    options.graph_optimization_level = level
    made = ort.InferenceSession(
        proto_of(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    taken = {value.name for value in made.get_inputs()}
    return lambda feeds: list(made.run(None, {k: v for k, v in feeds.items() if k in taken}))


def run_reference(model: ir.Model | onnx.ModelProto, feeds: Feeds) -> list[Array]:
    """The graph's outputs from the ONNX specification's own evaluator."""
    evaluator = ReferenceEvaluator(proto_of(model))
    return list(evaluator.run(None, {k: v for k, v in feeds.items() if k in evaluator.input_names}))


def proto_of(model: ir.Model | onnx.ModelProto) -> onnx.ModelProto:
    """The model as protobuf."""
    return ir.to_proto(model) if isinstance(model, ir.Model) else model


def op_counts(model: ir.Model) -> dict[str, int]:
    """How often each operator occurs in the main graph."""
    counts: dict[str, int] = {}
    for node in model.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def graph_from_text(text: str, **initializers: Array) -> ir.Model:
    """A model from ONNX's textual syntax, at our opset, with the op's function and further
    initializers.

    An initializer "a.b" is written a_b in the text, which knows no dots.
    """
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21, "quest" : 1, "quest.export" : 1]>\n{text}'
    )
    dotted = {name.replace(".", "_"): name for name in initializers}
    for node in proto.graph.node:
        node.input[:] = [dotted.get(name, name) for name in node.input]
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in initializers.items()
    )
    model = ir.from_proto(proto)
    function = timestep_quantize.function_body()
    model.functions[function.identifier()] = function
    return model


def relative_error(found: Array, expected: Array) -> float:
    """The largest difference, relative to the largest expected magnitude."""
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


HAND_TEXT = """
hand (float[batch,2,6,6] sample, float[batch] timestep, float[batch,3,5] tokens)
  => (float[batch,3,3,4] image, float[batch,3,7] first, float[batch,3,6] second)
  <float[batch,4,3,4] inner, float[batch,3,7] q, float[batch,3,6] k>
{
  inner = quest.export.Layer <layer = "conv"> (sample)
  image = quest.export.Layer <layer = "last"> (inner)
  q = quest.export.Layer <layer = "to_q"> (tokens)
  k = quest.export.Layer <layer = "to_k"> (tokens)
  first = Neg (q)
  second = Identity (k)
}
"""
"""A skeleton of :func:`hand_checkpoint`'s layers: a grouped 4-bit Conv, an 8-bit Conv without bias,
two Linears that share a quantizer.
"""


def hand_checkpoint(buckets: int = 2) -> Checkpoint:
    """A small checkpoint with every kind of layer, made without torch."""
    rng = np.random.default_rng(buckets)

    def layer(
        name: str, bits: int, shape: tuple[int, ...], conv: ConvGeometry | None, *, bias: bool
    ) -> LayerData:
        low, high = (-8, 8) if bits == 4 else (-127, 128)
        codes = rng.integers(low, high, shape, dtype=np.int8)
        scale = rng.uniform(0.01, 0.1, shape[0]).astype(np.float32)
        return LayerData(
            name,
            bits,
            codes,
            scale,
            rng.standard_normal(shape[0]).astype(np.float32) if bias else None,
            conv,
            10,
        )

    def quantizer(
        name: str, bits: int, axis: int, channels: int, layers: tuple[str, ...]
    ) -> ActivationQuantizerData:
        low = np.full(buckets, -127) if bits == 8 else -rng.integers(0, 16, buckets)
        high = low + (254 if bits == 8 else 15)
        scale = rng.uniform(0.02 if bits == 8 else 0.1, 0.4, buckets).astype(np.float32)
        channel = rng.uniform(0.5, 2.0, channels).astype(np.float32)
        symmetry = Symmetry.SYMMETRIC if bits == 8 else Symmetry.ASYMMETRIC
        return ActivationQuantizerData(
            name,
            bits,
            symmetry,
            axis,
            layers,
            scale,
            low.astype(np.float32),
            high.astype(np.float32),
            channel,
        )

    layers = [
        layer("conv", 4, (4, 1, 3, 3), ConvGeometry((2, 1), (1, 0), (1, 1), 2), bias=True),
        layer("last", 8, (3, 4, 1, 1), ConvGeometry((1, 1), (0, 0), (1, 1), 1), bias=False),
        layer("to_q", 4, (7, 5), None, bias=True),
        layer("to_k", 8, (6, 5), None, bias=False),
    ]
    quantizers = [
        quantizer("conv", 4, 1, 2, ("conv",)),
        quantizer("last", 8, 1, 4, ("last",)),
        quantizer("to_q", 4, 2, 5, ("to_q", "to_k")),
    ]
    return Checkpoint(
        model="hand",
        architecture=Architecture("UNet2DModel", {"sample_size": 6}, {}, None),
        scheme=Scheme.parse("w4a4", buckets=buckets),
        layers={x.name: x for x in layers},
        quantizers={x.name: x for x in quantizers},
        floats={"norm.weight": rng.standard_normal(3).astype(np.float32)},
        provenance={"method": "by hand"},
    )


def hand_feeds(timesteps: list[float]) -> Feeds:
    """Inputs of the hand-made graph, one sample a timestep."""
    rng, batch = np.random.default_rng(7), len(timesteps)
    sample, tokens = (
        rng.standard_normal((batch, *shape)).astype(np.float32) for shape in ((2, 6, 6), (3, 5))
    )
    return {"sample": sample, "timestep": np.asarray(timesteps, np.float32), "tokens": tokens}


def hand_graph(checkpoint: Checkpoint) -> ir.Model:
    """The hand-made skeleton with ``checkpoint``'s layers inserted, as ``portable_graph`` does
    it.
    """
    return inserted(HAND_TEXT, checkpoint)


def inserted(text: str, checkpoint: Checkpoint) -> ir.Model:
    """A skeleton with ``checkpoint``'s layers inserted."""
    model = graph_from_text(text)
    InsertQuantizedLayers(checkpoint)(model)
    InsertQuantizedLayers.describe(model, checkpoint)
    model.graph.opset_imports.pop("quest.export")
    model.metadata_props[SCHEME_KEY] = json.dumps(checkpoint.scheme.to_json())
    model.metadata_props[CHECKPOINT_KEY] = "0" * 64
    model.metadata_props[SAMPLE_SHAPE_KEY] = "[2, 6, 6]"
    model.metadata_props[SAMPLE_MULTIPLE_KEY] = "2"
    return model


BRANCHED_TEXT = """
branched (float[batch,2,6,6] sample, float[batch] timestep, float[batch,3,5] tokens)
  => (float[batch,3,3,4] image, float[batch,3,7] first, float[batch,3,6] second)
  <float[batch,4,3,4] inner, float[batch,3,3,4] i0, float[batch,3,3,4] i1, float[batch,3,7] q0,
   float[batch,3,7] q1, float[batch,3,6] k>
{
  inner = quest.export.Layer <layer = "conv"> (sample)
  i0 = quest.export.Layer <layer = "last.residual"> (inner)
  i1 = quest.export.Branch <layer = "last"> (inner)
  image = Add (i0, i1)
  q0 = quest.export.Layer <layer = "to_q.residual"> (tokens)
  q1 = quest.export.Branch <layer = "to_q"> (tokens)
  first = Add (q0, q1)
  k = quest.export.Layer <layer = "to_k"> (tokens)
  second = Identity (k)
}
"""
"""A skeleton of :func:`branched_checkpoint`'s layers."""


def branched_checkpoint() -> Checkpoint:
    """:func:`hand_checkpoint` with branches of low rank: beside a Conv, 3x3 and padded, and beside
    a Linear.
    """
    hand, rng = hand_checkpoint(), np.random.default_rng(5)
    scheme = replace(hand.scheme, low_rank=3, low_rank_layers=("last", "to_q"))
    codes = rng.integers(-127, 128, (3, 4, 3, 3), dtype=np.int8)
    last = replace(hand.layers["last"], codes=codes)
    last = replace(last, conv=ConvGeometry((1, 1), (1, 1), (1, 1), 1))
    names = {name: f"{name}.residual" for name in ("last", "to_q")}
    layers = [
        replace(layer, name=names.get(layer.name, layer.name))
        for layer in (hand.layers | {"last": last}).values()
    ]
    quantizers = [
        replace(
            quantizer,
            name=names.get(quantizer.name, quantizer.name),
            layers=tuple(names.get(name, name) for name in quantizer.layers),
        )
        for quantizer in hand.quantizers.values()
    ]
    shapes = {
        "last.down": (2, 4, 3, 3),
        "last.up": (3, 2),
        "to_q.down": (3, 5),
        "to_q.up": (7, 3),
    }
    factors = {key: rng.standard_normal(x).astype(np.float16) for key, x in shapes.items()}
    return replace(
        hand,
        architecture=replace(hand.architecture, low_rank={"last": 2, "to_q": 3}),
        scheme=scheme,
        layers={layer.name: layer for layer in layers},
        quantizers={quantizer.name: quantizer for quantizer in quantizers},
        floats=hand.floats | factors,
    )


def branch_weight(checkpoint: Checkpoint, name: str) -> Array:
    """The weight of the layer that a branch of low rank is, float64."""
    down, up = (checkpoint.floats[f"{name}.{x}"].astype(np.float64) for x in ("down", "up"))
    return np.asarray(np.einsum("or,ri...->oi...", up, down))


KINDS_TEXT = """
kinds (float[batch,2,6,6] sample, float[batch] timestep, float[batch,3,5] tokens,
       float[batch,2,3,4] q, float[batch,2,4,3] kt, float[batch,2,3,3] weights, float[batch,2,3,4] v)
  => (float[batch,3,3,8] image, float[batch,3,7] plain, float[batch,3,6] by_channel, float[batch,3,4] by_token,
      float[batch,2,3,3] scores, float[batch,2,3,4] mixed, float[batch,2,3,4] half)
  <float[batch,4,3,8] inner, float[batch,3,7] y0, float[batch,3,6] y1, float[batch,3,4] y2,
   float[batch,2,3,3] y3, float[batch,2,3,4] y4, float[batch,2,3,4] y5>
{
  inner = quest.export.Layer <layer = "padded"> (sample)
  image = quest.export.Layer <layer = "free_conv"> (inner)
  y0 = quest.export.Layer <layer = "plain"> (tokens)
  y1 = quest.export.Layer <layer = "by_channel"> (tokens)
  y2 = quest.export.Layer <layer = "by_token"> (tokens)
  y3 = quest.export.Product <layer = "attn.scores"> (q, kt)
  y4 = quest.export.Product <layer = "attn.mix"> (weights, v)
  y5 = quest.export.Product <layer = "half.mix"> (weights, v)
  plain = Identity (y0)
  by_channel = Identity (y1)
  by_token = Identity (y2)
  scores = Identity (y3)
  mixed = Identity (y4)
  half = Identity (y5)
}
"""
"""A skeleton of :func:`kinds_checkpoint`'s layers and products."""


def kinds_checkpoint(buckets: int = 2) -> Checkpoint:
    """A small checkpoint of what :func:`hand_checkpoint` has not.

    Asymmetric weights of 4 and 8 bits; codes that need an offset, in front of a padded convolution,
    a linear and in both operands of a product; scales that are free by channel, by token, and of
    either sign; a product of 4-bit codes and one with a float operand.
    """
    rng = np.random.default_rng(buckets)

    def layer(
        name: str, bits: int, shape: tuple[int, ...], conv: ConvGeometry | None, *, asymmetric: bool
    ) -> LayerData:
        scale, bias = (
            rng.uniform(0.01, 0.1, shape[0]).astype(np.float32),
            rng.standard_normal(shape[0]).astype(np.float32),
        )
        if not asymmetric:
            return LayerData(
                name, bits, rng.integers(-8, 8, shape, dtype=np.int8), scale, bias, conv, 10
            )
        codes, zero_point = (
            rng.integers(0, 2**bits, size, dtype=np.uint8) for size in (shape, shape[:1])
        )
        codes.flat[:2] = 0, 2**bits - 1
        zero_point[:2] = 0, 2**bits - 1
        return LayerData(name, bits, codes, scale, bias, conv, 10, zero_point)

    def quantizer(
        name: str, bits: int, symmetry: Symmetry, axis: int, channels: int, reader: str
    ) -> ActivationQuantizerData:
        low = (
            np.zeros(buckets)
            if symmetry is Symmetry.UNSIGNED
            else -rng.integers(0, 2**bits, buckets)
        )
        if symmetry is Symmetry.ASYMMETRIC and bits == 8:
            low[0] = -200  # so that codes leave int8 on the negative side in one bucket
        scale = (
            rng.uniform(1.0, 3.0, buckets).astype(np.float32)
            / 2**bits
            * (0.3 if symmetry is Symmetry.UNSIGNED else 2)
        )
        channel = (
            rng.uniform(0.5, 2.0, channels) if "." not in name else np.ones(channels)
        )  # attention's operands have none
        bounds = (low.astype(np.float32), (low + 2**bits - 1).astype(np.float32))
        return ActivationQuantizerData(
            name,
            bits,
            symmetry,
            axis,
            (reader,),
            scale.astype(np.float32),
            *bounds,
            channel.astype(np.float32),
        )

    def per_channel(
        name: str, bits: int, axis: int, channels: int, code_range: tuple[int, int]
    ) -> PerChannelQuantizerData:
        scale = rng.uniform(0.1, 0.5, (buckets, channels)) * rng.choice(
            [-1, 1], (buckets, channels)
        )
        zero_point = rng.integers(-3, 20, (buckets, channels)).astype(np.float32)
        return PerChannelQuantizerData(
            name, bits, axis, (name,), scale.astype(np.float32), zero_point, *code_range
        )

    layers = [
        layer("padded", 4, (4, 2, 3, 3), ConvGeometry((2, 1), (1, 2), (1, 1), 1), asymmetric=True),
        layer(
            "free_conv", 8, (3, 4, 3, 3), ConvGeometry((1, 1), (1, 1), (1, 1), 1), asymmetric=True
        ),
        layer("plain", 8, (7, 5), None, asymmetric=True),
        layer("by_channel", 4, (6, 5), None, asymmetric=False),
        layer("by_token", 4, (4, 5), None, asymmetric=True),
    ]
    asymmetric, unsigned = Symmetry.ASYMMETRIC, Symmetry.UNSIGNED
    quantizers = [
        quantizer("padded", 8, asymmetric, 1, 2, "padded"),
        per_channel("free_conv", 4, 1, 4, (0, 15)),
        quantizer("plain", 8, asymmetric, 2, 5, "plain"),
        per_channel("by_channel", 8, 2, 5, (-127, 127)),
        per_channel("by_token", 8, 1, 3, (0, 255)),
        quantizer("attn.q", 4, asymmetric, 3, 4, "attn.scores"),
        quantizer("attn.k", 4, asymmetric, 3, 3, "attn.scores"),
        quantizer("attn.softmax", 8, unsigned, 3, 3, "attn.mix"),
        quantizer("attn.v", 8, asymmetric, 3, 4, "attn.mix"),
        quantizer("half.v", 8, asymmetric, 3, 4, "half.mix"),
    ]
    products = [
        AttentionMatmulData("attn.scores", ("attn.q", "attn.k"), 36),
        AttentionMatmulData("attn.mix", ("attn.softmax", "attn.v"), 36),
        AttentionMatmulData("half.mix", (None, "half.v"), 36),
    ]
    return Checkpoint(
        model="kinds",
        architecture=Architecture(
            "UNet2DModel", {"sample_size": 6}, {"up.conv_shortcut": 8}, ScoreScale.OPERANDS
        ),
        scheme=Scheme.parse(
            "w4a4", buckets=buckets, attention_bits=4, softmax_bits=8, split_shortcuts=True
        ),
        layers={x.name: x for x in layers},
        quantizers={x.name: x for x in quantizers},
        floats={"norm.weight": rng.standard_normal(3).astype(np.float32)},
        provenance={"method": "by hand"},
        matmuls={x.name: x for x in products},
    )


def kinds_feeds(timesteps: list[float]) -> Feeds:
    """Inputs of the graph of kinds, one sample a timestep; ``weights`` as a softmax gives them."""
    rng, batch = np.random.default_rng(11), len(timesteps)
    shapes = {
        "sample": (2, 6, 6),
        "tokens": (3, 5),
        "q": (2, 3, 4),
        "kt": (2, 4, 3),
        "v": (2, 3, 4),
    }
    feeds = {
        name: rng.standard_normal((batch, *shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    weights = np.exp(2 * rng.standard_normal((batch, 2, 3, 3)))
    weights /= weights.sum(-1, keepdims=True)
    return {
        **feeds,
        "weights": weights.astype(np.float32),
        "timestep": np.asarray(timesteps, np.float32),
    }


def kinds_expected(checkpoint: Checkpoint, feeds: Feeds) -> dict[str, Array]:
    """What the graph of kinds gives, in float64, by the name of its output; ``image`` from the
    float32 result of its first layer.
    """
    bucket = np.asarray([checkpoint.scheme.bucket_of(float(t)) for t in feeds["timestep"]])
    inner = numpy_layer(checkpoint, "padded", feeds["sample"], bucket).astype(np.float32)
    linears = {
        name: numpy_layer(checkpoint, name, feeds["tokens"], bucket)
        for name in ("plain", "by_channel", "by_token")
    }
    return {
        "inner": inner,
        "image": numpy_layer(checkpoint, "free_conv", inner, bucket),
        **linears,
        "scores": numpy_matmul(checkpoint, "attn.scores", feeds["q"], feeds["kt"], bucket),
        "mixed": numpy_matmul(checkpoint, "attn.mix", feeds["weights"], feeds["v"], bucket),
        "half": numpy_matmul(checkpoint, "half.mix", feeds["weights"], feeds["v"], bucket),
    }


def lowering_begins_with(portable: ir.Model) -> ir.Model:
    """``portable``, as every lowering begins: with each cast of codes a DequantizeLinear."""
    DequantizeCasts()(portable)
    return portable


def kinds_graph(checkpoint: Checkpoint) -> ir.Model:
    """The skeleton of kinds with ``checkpoint``'s layers and products inserted, as
    ``portable_graph`` does it.
    """
    return inserted(KINDS_TEXT, checkpoint)
