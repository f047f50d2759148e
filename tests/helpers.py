"""What the tests share: independent reference implementations in numpy, and runs of graphs. Import as ``tests.helpers``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from exporters import timestep_quantize
from exporters.graph_info import CHECKPOINT_KEY, SCHEME_KEY
from exporters.passes.insert_quantized_layers import InsertQuantizedLayers
from quest_deploy.checkpoint import Architecture, Checkpoint, ConvGeometry, LayerData, SiteData
from quest_deploy.scheme import Scheme, Symmetry

if TYPE_CHECKING:
    from collections.abc import Callable

Array = NDArray[Any]
Feeds = dict[str, Array]


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
    x: Array, bucket: Array, scale: Array, low: Array, high: Array, channel: Array, axis: int, offset: Array | None = None
) -> Array:
    """TimestepQuantize, from its specification: float32 arithmetic, rounding half to even, int8 codes."""
    x = x.astype(np.float32)
    scales, lows, highs = (of_sample(table, bucket, x.ndim) for table in (scale, low, high))
    codes = np.rint(x / (scales * along(channel, axis, x.ndim)))
    codes = np.minimum(np.maximum(codes, lows), highs)
    return (codes if offset is None else codes + of_sample(offset, bucket, x.ndim)).astype(np.int8)


def site_codes(site: SiteData, x: Array, bucket: Array) -> Array:
    """:func:`numpy_codes` with a site's tables."""
    return numpy_codes(x, bucket, site.scale, site.low, site.high, site.channel, site.axis)


def numpy_layer(checkpoint: Checkpoint, name: str, x: Array, bucket: Array) -> Array:
    """A quantized layer in float64: scale[bucket] * layer(codes, weight codes * weight scale) + bias."""
    layer, site = checkpoint.layers[name], checkpoint.site_of(name)
    codes = site_codes(site, x, bucket).astype(np.float64)
    product = float_layer(layer, codes)
    bias = 0.0 if layer.bias is None else along(layer.bias.astype(np.float64), 1 if layer.conv else product.ndim - 1, product.ndim)
    return product * of_sample(site.scale.astype(np.float64), bucket, product.ndim) + bias


def float_layer(layer: LayerData, x: Array, weight: Array | None = None) -> Array:
    """The layer on float64 ``x``, without bias; ``weight`` replaces the dequantized one."""
    import torch

    if weight is None:
        weight = layer.weight_codes.astype(np.float64) * along(layer.weight_scale.astype(np.float64), 0, layer.weight_codes.ndim)
    if layer.conv is None:
        return x @ weight.T
    g = layer.conv
    return torch.nn.functional.conv2d(
        torch.from_numpy(x), torch.from_numpy(weight), None, g.stride, g.padding, g.dilation, g.groups
    ).numpy()


def run(model: ir.Model | onnx.ModelProto, feeds: Feeds, *, optimized: bool = False) -> list[Array]:
    """The graph's outputs from onnxruntime, on one thread."""
    return session(model, optimized=optimized)(feeds)


def session(model: ir.Model | onnx.ModelProto, *, optimized: bool = False) -> Callable[[Feeds], list[Array]]:
    """An onnxruntime session as a function; ``optimized`` lets it fuse. Feeds that the graph does not take are left out."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL if optimized else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.graph_optimization_level = level
    made = ort.InferenceSession(proto_of(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
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
    """A model from ONNX's textual syntax, at our opset, with the op's function and further initializers.

    An initializer "a.b" is written a_b in the text, which knows no dots.
    """
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21, "quest" : 1, "quest.export" : 1]>\n{text}')
    dotted = {name.replace(".", "_"): name for name in initializers}
    for node in proto.graph.node:
        node.input[:] = [dotted.get(name, name) for name in node.input]
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in initializers.items())
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
"""A skeleton of :func:`hand_checkpoint`'s layers: a grouped 4-bit Conv, an 8-bit Conv without bias, two Linears that share a site."""


def hand_checkpoint(buckets: int = 2) -> Checkpoint:
    """A small checkpoint with every kind of layer, made without torch."""
    rng = np.random.default_rng(buckets)

    def layer(name: str, bits: int, shape: tuple[int, ...], conv: ConvGeometry | None, *, bias: bool) -> LayerData:
        low, high = (-8, 8) if bits == 4 else (-127, 128)
        codes = rng.integers(low, high, shape, dtype=np.int8)
        scale = rng.uniform(0.01, 0.1, shape[0]).astype(np.float32)
        return LayerData(name, bits, codes, scale, rng.standard_normal(shape[0]).astype(np.float32) if bias else None, conv, 10)

    def site(name: str, bits: int, axis: int, channels: int, layers: tuple[str, ...]) -> SiteData:
        low = np.full(buckets, -127) if bits == 8 else -rng.integers(0, 16, buckets)
        high = low + (254 if bits == 8 else 15)
        scale = rng.uniform(0.02 if bits == 8 else 0.1, 0.4, buckets).astype(np.float32)
        channel = rng.uniform(0.5, 2.0, channels).astype(np.float32)
        symmetry = Symmetry.SYMMETRIC if bits == 8 else Symmetry.ASYMMETRIC
        return SiteData(name, bits, symmetry, axis, layers, scale, low.astype(np.float32), high.astype(np.float32), channel)

    layers = [
        layer("conv", 4, (4, 1, 3, 3), ConvGeometry((2, 1), (1, 0), (1, 1), 2), bias=True),
        layer("last", 8, (3, 4, 1, 1), ConvGeometry((1, 1), (0, 0), (1, 1), 1), bias=False),
        layer("to_q", 4, (7, 5), None, bias=True),
        layer("to_k", 8, (6, 5), None, bias=False),
    ]
    sites = [site("conv", 4, 1, 2, ("conv",)), site("last", 8, 1, 4, ("last",)), site("to_q", 4, 2, 5, ("to_q", "to_k"))]
    return Checkpoint(
        model="hand",
        architecture=Architecture("UNet2DModel", {"sample_size": 6}),
        scheme=Scheme.parse("w4a4", buckets=buckets),
        layers={x.name: x for x in layers},
        sites={x.name: x for x in sites},
        floats={"norm.weight": rng.standard_normal(3).astype(np.float32)},
        provenance={"method": "by hand"},
    )


def hand_feeds(timesteps: list[float]) -> Feeds:
    """Inputs of the hand-made graph, one sample a timestep."""
    rng, batch = np.random.default_rng(7), len(timesteps)
    sample, tokens = (rng.standard_normal((batch, *shape)).astype(np.float32) for shape in ((2, 6, 6), (3, 5)))
    return {"sample": sample, "timestep": np.asarray(timesteps, np.float32), "tokens": tokens}


def hand_graph(checkpoint: Checkpoint) -> ir.Model:
    """The hand-made skeleton with ``checkpoint``'s layers inserted, as ``portable_graph`` does it."""
    model = graph_from_text(HAND_TEXT)
    InsertQuantizedLayers(checkpoint)(model)
    InsertQuantizedLayers.describe(model, checkpoint)
    model.graph.opset_imports.pop("quest.export")
    model.metadata_props[SCHEME_KEY] = json.dumps(checkpoint.scheme.to_json())
    model.metadata_props[CHECKPOINT_KEY] = "0" * 64
    return model
