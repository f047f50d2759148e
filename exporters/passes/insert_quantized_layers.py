"""Replace each placeholder of the exported skeleton by its layer in integer form.

Needs: placeholders named after the checkpoint's layers; the layers of one site read one value; an input ``timestep`` [batch].
Guarantees: the value ``bucket`` [batch]; one ``quest::TimestepQuantize`` per site; for each layer

    codes = TimestepQuantize(x, bucket, scale, low, high, channel)
    y = scale[bucket] * Conv|MatMul(DequantizeLinear(codes; 1, 0), DequantizeLinear(weight codes; weight scale, 0)) + bias

1. Conv: weight [O, I, kh, kw], INT4 or INT8, scaled along axis 0.
2. Linear: weight stored transposed [I, O] for MatMul, scaled along axis 1.
3. A site with several readers (to_q, to_k, to_v): quantized once.
4. A scheme of one bucket: a single edge beyond every timestep, since engines refuse empty constants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from exporters import timestep_quantize
from exporters.editor import Editor, replace_value
from exporters.graph_info import BUCKET, LayerInfo, SiteInfo, describe
from quest_deploy.checkpoint import pack_int4

if TYPE_CHECKING:
    from quest_deploy.checkpoint import Checkpoint, LayerData, SiteData

PLACEHOLDER_DOMAIN = "quest.export"
PLACEHOLDER_OP = "Layer"
TABLES = ("scale", "low", "high")


class InsertQuantizedLayers(ir.passes.InPlacePass):
    """See the module's docstring."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def requires(self, model: ir.Model) -> None:
        found = sorted(_layer_name(node) for node in _placeholders(model.graph))
        if found != sorted(self.checkpoint.layers):
            raise ir.passes.PreconditionError(
                f"the graph's layers are not the checkpoint's: {set(found) ^ set(self.checkpoint.layers)}"
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        editor = Editor(graph)
        bucket = _insert_bucket(editor, self.checkpoint.scheme.bucket_edges)
        outputs = {output_name(layer) for layer in self.checkpoint.layers}
        codes: dict[str, ir.Value] = {}
        scales: dict[str, ir.Value] = {}
        for node in list(_placeholders(graph)):
            layer = self.checkpoint.layers[_layer_name(node)]
            site = self.checkpoint.site_of(layer.name)
            x = node.inputs[0]
            assert x is not None
            if site.name not in codes:
                codes[site.name] = _quantize(editor, x, bucket, site, outputs)
                scales[site.name] = _scale_of_sample(editor, x, bucket, site)
            elif _input_of(codes[site.name]) is not x:
                raise ir.passes.PreconditionError(f"site {site.name}: its layers read different values in the graph")
            dequantized = _dequantize(editor, codes[site.name], layer.name)
            y = _compute(editor, dequantized, layer, node.outputs[0])
            y = editor.op("Mul", [y, scales[site.name]], f"{layer.name}.scaled", shape=node.outputs[0].shape)
            if layer.bias is not None:
                shaped = layer.bias if layer.conv is None else layer.bias.reshape(1, -1, 1, 1)
                y = editor.op("Add", [y, editor.constant(f"{layer.name}.bias", shaped)], f"{layer.name}.biased", shape=y.shape)
            y.name = output_name(layer.name)
            editor.insert_before(node)
            replace_value(node.outputs[0], y)
            graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=True)

    @staticmethod
    def describe(model: ir.Model, checkpoint: Checkpoint) -> None:
        """Write where each layer and site is into the graph's metadata."""
        values = ir.convenience.create_value_mapping(model.graph)
        inputs = {name: _input_of(values[codes_name(name)]).name or "" for name in checkpoint.sites}
        last = model.graph.outputs[0].name or ""
        outputs = {name: output_name(name) if output_name(name) in values else last for name in checkpoint.layers}
        describe(
            model,
            [
                LayerInfo(x.name, checkpoint.site_of(x.name).name, x.weight_bits, x.macs, outputs[x.name], weight_name(x.name))
                for x in checkpoint.layers.values()
            ],
            [SiteInfo(s.name, s.bits, inputs[s.name], codes_name(s.name)) for s in checkpoint.sites.values()],
        )


def output_name(layer: str) -> str:
    """The name of a layer's output value."""
    return f"{layer}.output"


def weight_name(layer: str) -> str:
    """The name of the initializer that holds a layer's weight codes."""
    return f"{layer}.weight"


def codes_name(site: str) -> str:
    """The name of a site's codes."""
    return f"{site}.codes"


def _placeholders(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.domain == PLACEHOLDER_DOMAIN and node.op_type == PLACEHOLDER_OP]


def _layer_name(node: ir.Node) -> str:
    return node.attributes["layer"].as_string()


def _input_of(codes: ir.Value) -> ir.Value:
    producer = codes.producer()
    assert producer is not None
    assert producer.inputs[0] is not None
    return producer.inputs[0]


def _insert_bucket(editor: Editor, edges: tuple[float, ...]) -> ir.Value:
    timestep = next(value for value in editor.graph.inputs if value.name == "timestep")
    table = np.asarray(edges or (np.finfo(np.float32).max,), np.float32)
    column = editor.op("Unsqueeze", [timestep, editor.constant("bucket_axis", np.asarray([1]))], "timestep_column")
    reached = editor.op("GreaterOrEqual", [column, editor.constant("bucket_edges", table)], "edges_reached", dtype=ir.DataType.BOOL)
    counted = editor.op("Cast", [reached], "edges_counted", dtype=ir.DataType.INT64, to=ir.DataType.INT64.value)
    bucket = editor.op(
        "ReduceSum", [counted, editor.constant("bucket_axis", np.asarray([1]))], BUCKET, shape=timestep.shape, keepdims=0
    )
    editor.insert_before(editor.graph[0])
    return bucket


def _quantize(editor: Editor, x: ir.Value, bucket: ir.Value, site: SiteData, outputs: set[str]) -> ir.Value:
    if x.producer() is not None and x.name not in outputs:
        x.name = f"{site.name}.input"  # a tensor that is a layer's output keeps that name
    tables = [editor.constant(f"{site.name}.{name}", getattr(site, name)) for name in (*TABLES, "channel")]
    return editor.op(
        timestep_quantize.OP_TYPE,
        [x, bucket, *tables],
        codes_name(site.name),
        dtype=ir.DataType.INT8,
        shape=x.shape,
        domain=timestep_quantize.DOMAIN,
        **{timestep_quantize.AXIS: site.axis},
    )


def _scale_of_sample(editor: Editor, x: ir.Value, bucket: ir.Value, site: SiteData) -> ir.Value:
    if x.shape is None:
        raise ir.passes.PreconditionError(f"site {site.name}: the exporter gave its tensor no rank")
    rank = len(x.shape)
    gathered = editor.op("Gather", [editor.constant(f"{site.name}.scale", site.scale), bucket], f"{site.name}.scale_gathered")
    axes = editor.constant(f"unsqueeze_to_rank_{rank}", np.arange(1, rank))
    return editor.op("Unsqueeze", [gathered, axes], f"{site.name}.scale_of_sample", shape=[x.shape[0], *[1] * (rank - 1)])


def _dequantize(editor: Editor, codes: ir.Value, layer: str) -> ir.Value:
    one = editor.constant("unit_scale", np.asarray(1.0, np.float32))
    zero = editor.constant("zero_code", np.asarray(0, np.int8))
    return editor.op("DequantizeLinear", [codes, one, zero], f"{layer}.dequantized_input", dtype=ir.DataType.FLOAT, shape=codes.shape)


def _compute(editor: Editor, x: ir.Value, layer: LayerData, like: ir.Value) -> ir.Value:
    weight = _weight(editor, layer)
    if layer.conv is None:
        return editor.op("MatMul", [x, weight], f"{layer.name}.product", shape=like.shape)
    (top, left), geometry = layer.conv.padding, layer.conv
    return editor.op(
        "Conv",
        [x, weight],
        f"{layer.name}.product",
        shape=like.shape,
        kernel_shape=list(layer.weight_codes.shape[2:]),
        strides=list(geometry.stride),
        pads=[top, left, top, left],
        dilations=list(geometry.dilation),
        group=geometry.groups,
    )


def _weight(editor: Editor, layer: LayerData) -> ir.Value:
    codes, axis = (layer.weight_codes, 0) if layer.conv is not None else (np.ascontiguousarray(layer.weight_codes.T), 1)
    name = weight_name(layer.name)
    if layer.weight_bits == 4:
        stored: ir.TensorProtocol = ir.PackedTensor(pack_int4(codes), ir.DataType.INT4, shape=codes.shape, name=name)
        zeros: ir.TensorProtocol = ir.PackedTensor(
            pack_int4(np.zeros(codes.shape[axis], np.int8)), ir.DataType.INT4, shape=[codes.shape[axis]], name=f"{name}_zero"
        )
    else:
        stored, zeros = ir.tensor(codes, name=name), ir.tensor(np.zeros(codes.shape[axis], np.int8), name=f"{name}_zero")
    scale = editor.constant(f"{name}_scale", layer.weight_scale)
    operands = [editor.constant(name, stored), scale, editor.constant(f"{name}_zero", zeros)]
    return editor.op("DequantizeLinear", operands, f"{name}_dequantized", dtype=ir.DataType.FLOAT, shape=codes.shape, axis=axis)
