"""Turn the quantized graph into the float graph of the same model: the baseline of the benchmarks.

Needs: layers as ``insert_quantized_layers`` builds them.
Guarantees: no quantizer, no integer, no scale: each layer is Conv(x, W, bias) or MatMul(x, W) +
bias on float weights, as torch would export it. The weights are the dequantized ones with the
smoothing scale divided out again, so the speed is that of the FP32 model and the output is that of
the weight-quantized one.

1. Conv: the bias becomes its third input.
2. Linear: the bias stays an Add behind the MatMul.
3. The halves of a split shortcut: one Conv on the concatenation that was split, its weight theirs
   side by side.
4. A layer with a branch of low rank: one layer again, whose weight is the sum of both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from exporters.editor import Editor, array_of, replace_value
from exporters.graph_info import (
    SAMPLE_MULTIPLE_KEY,
    SAMPLE_SHAPE_KEY,
    TOKENS_KEY,
    AttentionMatmulInfo,
    GraphInfo,
    graph_info,
)
from exporters.ops import timestep_quantize
from exporters.passes.contract import guarantee
from exporters.passes.dequantize_casts import DequantizeCasts
from exporters.passes.insert_quantized_layers import input_of, need_layers, product_name
from quest_deploy.artifacts.checkpoint import DOWN, UP
from quest_deploy.quantization.layer_kinds import layer_path

if TYPE_CHECKING:
    from numpy.typing import NDArray


class RemoveQuantization(ir.passes.InPlacePass):
    """See the module's docstring; runs on the portable graph."""

    def requires(self, model: ir.Model) -> None:
        need_layers(model)

    def ensures(self, model: ir.Model) -> None:
        integer = ("DequantizeLinear", "QuantizeLinear", timestep_quantize.OP_TYPE)
        left = [str(node.name) for node in model.graph if node.op_type in integer]
        guarantee(not left and not model.functions, f"{', '.join(left[:3])} are still quantized")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        DequantizeCasts()(model)
        info = graph_info(model)
        values = ir.convenience.create_value_mapping(model.graph)
        nodes = {node.name or "": node for node in model.graph}
        editor = Editor(model.graph)
        outputs = {
            layer_path(name): _float_layer(editor, values, nodes, info, name)
            for name in info.layers
        }
        for product in info.matmuls.values():
            _float_product(editor, values, nodes[product_name(product.name)], info, product)
        for name in [name.removesuffix(".first") for name in outputs if name.endswith(".first")]:
            _join_halves(
                editor,
                name,
                _producer(outputs[f"{name}.first"]),
                _producer(outputs[f"{name}.second"]),
            )
        common.RemoveUnusedNodesPass()(model)
        model.functions.clear()
        model.graph.opset_imports.pop(timestep_quantize.DOMAIN, None)
        sizes = (SAMPLE_SHAPE_KEY, SAMPLE_MULTIPLE_KEY, TOKENS_KEY)
        props = model.metadata_props
        kept = {key: props[key] for key in sizes if key in props}
        model.metadata_props.clear()
        model.metadata_props.update(kept)  # builders need the sizes that inputs usually have
        return ir.passes.PassResult(model, modified=True)


def _float_layer(
    editor: Editor,
    values: dict[str, ir.Value],
    nodes: dict[str, ir.Node],
    info: GraphInfo,
    name: str,
) -> ir.Value:
    product, layer = nodes[product_name(name)], info.layers[name]
    output, site = values[layer.output], info.quantizers[layer.site]
    x = input_of(
        values[site.codes], site.name, integer=site.integer
    )  # not by its name: an earlier layer may have been replaced
    quantizer = _producer(values[site.codes])
    channel = array_of(_given(quantizer.inputs[-1])) if site.integer else None
    float_weight = _float_weight(_producer(product.inputs[1]), channel, product.op_type)
    down, up = (nodes.get(f"{layer_path(name)}.{part}") for part in (DOWN, UP))
    if down is not None and up is not None:
        float_weight += _branch_weight(down, up)
    weight = editor.constant(f"{name}.float_weight", float_weight)
    bias = editor.graph.initializers.get(f"{name}.bias")
    if product.op_type == "Conv":
        attributes = {a.name: a.value for a in product.attributes.values()}
        if f"{site.name}.pads" in editor.graph.initializers:
            pads = array_of(editor.graph.initializers[f"{site.name}.pads"]).tolist()
            attributes["pads"] = [*pads[2:4], *pads[6:8]]
        flat = (
            []
            if bias is None
            else [editor.constant(f"{name}.float_bias", array_of(bias).reshape(-1))]
        )
        y = editor.op("Conv", [x, weight, *flat], f"{name}.float", shape=output.shape, **attributes)
    else:
        y = editor.op("MatMul", [x, weight], f"{name}.float", shape=output.shape)
        y = (
            y
            if bias is None
            else editor.op("Add", [y, bias], f"{name}.float_biased", shape=output.shape)
        )
    editor.insert_before(product)
    replace_value(output, y)
    if up is not None:
        (both,) = up.outputs[0].consumers()
        replace_value(both.outputs[0], y)
        editor.graph.remove(both, safe=True)
    return y


def _branch_weight(down: ir.Node, up: ir.Node) -> NDArray[np.float32]:
    """The weight of the layer that a branch of low rank is, in the form of its product's."""
    first, second = (
        array_of(_given(_producer(node.inputs[1]).inputs[0])).astype(np.float32)
        for node in (down, up)
    )
    if down.op_type == "MatMul":
        return np.asarray(first @ second, np.float32)
    return np.asarray(np.tensordot(second[:, :, 0, 0], first, 1), np.float32)


def _join_halves(editor: Editor, name: str, first: ir.Node, second: ir.Node) -> None:
    """Undo ``SplitConv2d``: first(a) + second(b), the bias in ``first``, is one convolution of
    concat(a, b).
    """
    (add,) = first.outputs[0].consumers()
    parts = [_given(half.inputs[0]) for half in (first, second)]
    concatenations = (
        node
        for node in parts[0].consumers()
        if node.op_type == "Concat" and list(node.inputs) == parts
    )
    concat = next(concatenations, None)
    whole = (
        concat.outputs[0]
        if concat is not None
        else editor.op("Concat", parts, f"{name}.whole", axis=1)
    )
    weights = [array_of(_given(half.inputs[1])) for half in (first, second)]
    weight = editor.constant(f"{name}.float_weight", np.concatenate(weights, axis=1))
    attributes = {a.name: a.value for a in first.attributes.values()}
    y = editor.op(
        "Conv",
        [whole, weight, *first.inputs[2:]],
        f"{name}.float",
        shape=add.outputs[0].shape,
        **attributes,
    )
    editor.insert_before(add)
    replace_value(add.outputs[0], y)


def _float_product(
    editor: Editor,
    values: dict[str, ir.Value],
    node: ir.Node,
    info: GraphInfo,
    product: AttentionMatmulInfo,
) -> None:
    output = values[product.output]
    operands = [
        operand
        if quantizer is None
        else input_of(
            values[info.quantizers[quantizer].codes],
            quantizer,
            integer=info.quantizers[quantizer].integer,
        )
        for quantizer, operand in zip(product.sites, node.inputs, strict=True)
    ]
    y = editor.op("MatMul", operands, f"{product.name}.float", shape=output.shape)
    editor.insert_before(node)
    replace_value(output, y)


def _float_weight(
    dequantize: ir.Node, channel: NDArray[np.float32] | None, op_type: str
) -> NDArray[np.float32]:
    codes, scale, zero = (array_of(_given(value)).astype(np.float32) for value in dequantize.inputs)
    if op_type == "MatMul":
        weight = (codes - zero) * scale
        return np.asarray(weight if channel is None else weight / channel[:, None], np.float32)
    weight = (codes - zero.reshape(-1, 1, 1, 1)) * scale.reshape(-1, 1, 1, 1)
    if channel is None:
        return np.asarray(weight, np.float32)
    # A grouped convolution sees the smoothing scale in slices, one a group of output channels.
    groups = channel.size // codes.shape[1]
    per_output = channel.reshape(groups, -1).repeat(codes.shape[0] // groups, axis=0)
    return np.asarray(weight / per_output[:, :, None, None], np.float32)


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _producer(value: ir.Value | None) -> ir.Node:
    producer = _given(value).producer()
    assert producer is not None
    return producer
