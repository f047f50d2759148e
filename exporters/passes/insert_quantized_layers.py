"""Replace each placeholder of the exported skeleton by its layer, or product, in integer form.

Needs: placeholders named after the checkpoint's layers and products; the layers of one quantizer
read one value; an input ``timestep`` [batch].
Guarantees: the value ``bucket`` [batch]; one ``quest::TimestepQuantize`` per integer quantizer; for
each layer

    codes = TimestepQuantize(x, bucket, scale, low, high, offset, channel)
    y = scale[bucket] * Conv|MatMul(DequantizeLinear(codes; 1, 0), DequantizeLinear(weight codes;
    weight scale, 0)) + bias

1. Conv: weight [O, I, kh, kw], INT4 or INT8, scaled along axis 0.
2. Linear: weight stored transposed [I, O] for MatMul, scaled along axis 1.
3. A quantizer with several readers (to_q, to_k, to_v): quantized once.
4. A scheme of one bucket: a single edge beyond every timestep, since engines refuse empty
   constants.
5. A product of two activations: scale_a[bucket] * scale_b[bucket] * MatMul(DequantizeLinear(a),
   DequantizeLinear(b)); an operand that has no quantizer stays as it is.
6. A quantizer whose codes carry an offset o (8-bit unsigned or asymmetric codes): what Conv or
   MatMul adds for it is subtracted, o * sum of the weight per output channel. A convolution's zero
   padding is not code 0 there, so x itself is padded and the Conv pads nothing. In a product, the
   other operand's sum takes the weight's place.
7. An asymmetric weight (imported): UINT4 or UINT8 with its zero-points.
8. A quantizer that is per-channel: quantized and dequantized in float, in the official order of
   operations; its layers are float Conv|MatMul on the weight's codes, cast to float, times the
   weight's scale behind the product. No DequantizeLinear: onnxruntime and OpenVINO quantize float
   activations that meet a dequantized weight, unless they are told not to.
9. A product that may saturate where an 8-bit kernel adds in 16 bits (see ``exporters.exactness``),
   in a form that every session computes right on every processor: an 8-bit weight is stored as
   UINT8 with zero-points of 128, and the codes of two 8-bit activations are cast to float.
10. A branch of low rank, which the layer beside it is added to: float Conv|MatMul ``<name>.down``
   and ``<name>.up`` of x as it is. Their weights are stored in FP16 and cast to float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from exporters.editor import Editor, lazy, replace_value
from exporters.exactness import FOUR_BITS, MIDDLE, SAFE, as_unsigned, pair_magnitude
from exporters.graph_info import (
    BUCKET,
    LAYERS_KEY,
    AttentionMatmulInfo,
    LayerInfo,
    QuantizerInfo,
    describe,
    graph_info,
)
from exporters.ops import timestep_quantize
from exporters.passes.contract import guarantee, need, quantizer_nodes
from quest_deploy.artifacts.checkpoint import (
    DOWN,
    RESIDUAL,
    UP,
    ActivationQuantizerData,
    ConvGeometry,
    QuantizerData,
    pack_4bit,
)
from quest_deploy.artifacts.lazy_tensors import LazyArray

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quest_deploy.artifacts.checkpoint import (
        Checkpoint,
        HalfArray,
        LayerData,
        PerChannelQuantizerData,
    )
    from quest_deploy.artifacts.lazy_tensors import Array

PLACEHOLDER_DOMAIN = "quest.export"
LAYER_PLACEHOLDER, MATMUL_PLACEHOLDER, BRANCH_PLACEHOLDER = "Layer", "Product", "Branch"
_POINTWISE = ConvGeometry((1, 1), (0, 0), (1, 1), 1)


@dataclass(frozen=True)
class _Quantized:
    """A quantized tensor in the graph.

    Attributes:
        x: what was quantized. codes: its codes, int8, or float32 for a per-channel quantizer.
        value: what a layer multiplies: the codes, dequantized with scale 1, or a per-channel
            quantizer's dequantized tensor.
        scale: of each sample, [B, 1, ...]; None for a per-channel quantizer, whose value has it
            already.
        offset: of each sample, [B, 1, ...]; None where it is zero.
        padded: the padding that x was given before it was quantized, as [height, width].
    """

    x: ir.Value
    value: ir.Value
    scale: ir.Value | None
    offset: ir.Value | None
    padded: tuple[int, int]


class InsertQuantizedLayers(ir.passes.InPlacePass):
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def requires(self, model: ir.Model) -> None:
        found = sorted(_layer_name(node) for node in _placeholders(model.graph))
        made = self.checkpoint
        expected = sorted((*made.layers, *made.matmuls, *made.branches))
        strange = set(found) ^ set(expected)
        need(found == expected, f"the graph's layers are not the checkpoint's: {strange}")

    def ensures(self, model: ir.Model) -> None:
        guarantee(not _placeholders(model.graph), "placeholders are left")
        found = {str(node.outputs[0].name) for node in quantizer_nodes(model)}
        quantizers = self.checkpoint.quantizers.items()
        expected = {
            codes_name(name)
            for name, quantizer in quantizers
            if isinstance(quantizer, ActivationQuantizerData)
        }
        guarantee(found == expected, f"sites without their quantizer: {expected - found}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        editor = Editor(graph)
        bucket = _insert_bucket(editor, self.checkpoint.scheme.bucket_edges)
        quantizers = _Quantizers(editor, bucket, self.checkpoint)
        for node in list(_placeholders(graph)):
            name, output = _layer_name(node), node.outputs[0]
            if name in self.checkpoint.layers:
                x = node.inputs[0]
                assert x is not None
                y = _layer(
                    editor,
                    self.checkpoint.layers[name],
                    quantizers.quantized(self.checkpoint.quantizer_of(name), x),
                    output,
                )
            elif name in self.checkpoint.branches:
                x = node.inputs[0]
                assert x is not None
                y = _branch(editor, self.checkpoint, name, x, output)
            else:
                operands = [
                    value
                    if quantizer is None
                    else quantizers.quantized(self.checkpoint.quantizers[quantizer], value)
                    for quantizer, value in zip(
                        self.checkpoint.matmuls[name].sites, node.inputs, strict=True
                    )
                    if value is not None
                ]
                y = _product(editor, name, operands[0], operands[1], output)
            if name not in self.checkpoint.branches:
                y.name = output_name(name)
            editor.insert_before(node)
            replace_value(output, y)
            graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=True)

    @staticmethod
    def describe(model: ir.Model, checkpoint: Checkpoint) -> None:
        """Write where each layer, product and quantizer is into the graph's metadata."""
        values = ir.convenience.create_value_mapping(model.graph)
        inputs = {
            name: input_of(
                values[codes_name(name)],
                name,
                integer=isinstance(quantizer, ActivationQuantizerData),
            ).name
            or ""
            for name, quantizer in checkpoint.quantizers.items()
        }
        nodes = {node.name: node for node in model.graph}
        last = model.graph.outputs[0].name or ""

        def output_of(name: str) -> str:
            return output_name(name) if output_name(name) in values else last

        def operand_of(product: str, index: int) -> str:
            quantizer = checkpoint.matmuls[product].sites[index]
            if quantizer is not None:
                return inputs[quantizer]
            operand = nodes[product_name(product)].inputs[index]
            assert operand is not None
            return operand.name or ""

        describe(
            model,
            [
                LayerInfo(
                    x.name,
                    checkpoint.quantizer_of(x.name).name,
                    x.weight_bits,
                    x.macs,
                    output_of(x.name),
                    weight_name(x.name),
                )
                for x in checkpoint.layers.values()
            ],
            [
                AttentionMatmulInfo(
                    x.name,
                    x.sites,
                    (operand_of(x.name, 0), operand_of(x.name, 1)),
                    x.macs,
                    output_of(x.name),
                )
                for x in checkpoint.matmuls.values()
            ],
            [
                QuantizerInfo(
                    s.name,
                    s.bits,
                    s.axis,
                    inputs[s.name],
                    codes_name(s.name),
                    isinstance(s, ActivationQuantizerData),
                )
                for s in checkpoint.quantizers.values()
            ],
        )


def output_name(layer: str) -> str:
    """The name of a layer's output value."""
    return f"{layer}.output"


def product_name(reader: str) -> str:
    """The name of the node that multiplies, a layer's Conv or MatMul or a product's MatMul."""
    return f"{reader}.product"


def weight_name(layer: str) -> str:
    """The name of the initializer that holds a layer's weight codes."""
    return f"{layer}.weight"


def need_layers(model: ir.Model) -> None:
    """Each layer and product that the metadata names computes by a node of its name."""
    if LAYERS_KEY not in model.metadata_props:
        return  # the user's own graph: the pass itself refuses it, by an InputError
    nodes, info = {node.name for node in model.graph}, graph_info(model)
    lost = [name for name in (*info.layers, *info.matmuls) if product_name(name) not in nodes]
    need(not lost, f"{', '.join(lost[:3])} are not in the graph")


def codes_name(quantizer: str) -> str:
    """The name of a quantizer's codes."""
    return f"{quantizer}.codes"


def _placeholders(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.domain == PLACEHOLDER_DOMAIN]


def _layer_name(node: ir.Node) -> str:
    return node.attributes["layer"].as_string()


def input_of(codes: ir.Value, quantizer: str, *, integer: bool) -> ir.Value:
    """Return what was quantized to the ``codes`` of ``quantizer``, before the padding that a
    quantizer with an offset needs.
    """
    value = codes
    # A per-channel quantizer is Div, Round, Add, Clip, Sub in a row.
    for _ in range(1 if integer else 5):
        value = _first_input(value)
    return _first_input(value) if value.name == f"{quantizer}.padded" else value


def _first_input(value: ir.Value) -> ir.Value:
    producer = value.producer()
    assert producer is not None
    assert producer.inputs[0] is not None
    return producer.inputs[0]


def _insert_bucket(editor: Editor, edges: tuple[float, ...]) -> ir.Value:
    timestep = next(value for value in editor.graph.inputs if value.name == "timestep")
    table = np.asarray(edges or (np.finfo(np.float32).max,), np.float32)
    column = editor.op(
        "Unsqueeze", [timestep, editor.constant("bucket_axis", np.asarray([1]))], "timestep_column"
    )
    reached = editor.op(
        "GreaterOrEqual",
        [column, editor.constant("bucket_edges", table)],
        "edges_reached",
        dtype=ir.DataType.BOOL,
    )
    counted = editor.op(
        "Cast", [reached], "edges_counted", dtype=ir.DataType.INT64, to=ir.DataType.INT64.value
    )
    bucket = editor.op(
        "ReduceSum",
        [counted, editor.constant("bucket_axis", np.asarray([1]))],
        BUCKET,
        shape=timestep.shape,
        keepdims=0,
    )
    editor.insert_before(editor.graph[0])
    return bucket


def _cast_quantizers(checkpoint: Checkpoint) -> set[str]:
    """The quantizers of products whose second operand has 8 bits (case 9)."""
    found: set[str] = set()
    for product in checkpoint.matmuls.values():
        quantizers = [checkpoint.quantizers[name] for name in product.sites if name is not None]
        if (
            len(quantizers) == len(product.sites)
            and all(isinstance(s, ActivationQuantizerData) for s in quantizers)
            and quantizers[1].bits > FOUR_BITS
        ):
            found |= {quantizer.name for quantizer in quantizers}
    return found


def dequantized_codes(editor: Editor, codes: ir.Value, name: str) -> ir.Value:
    """DequantizeLinear of int8 codes with scale 1 and zero-point 0."""
    one = editor.constant("unit_scale", np.asarray(1.0, np.float32))
    zero = editor.constant("zero_code", np.asarray(0, np.int8))
    return editor.op(
        "DequantizeLinear", [codes, one, zero], name, dtype=ir.DataType.FLOAT, shape=codes.shape
    )


class _Quantizers:
    """Quantizes each tensor once."""

    def __init__(self, editor: Editor, bucket: ir.Value, checkpoint: Checkpoint) -> None:
        self.editor, self.bucket, self.checkpoint = editor, bucket, checkpoint
        self.outputs = {output_name(name) for name in (*checkpoint.layers, *checkpoint.matmuls)}
        self.cast = _cast_quantizers(checkpoint)
        self.done: dict[str, _Quantized] = {}

    def quantized(self, quantizer: QuantizerData, x: ir.Value) -> _Quantized:
        """The quantizer's quantized tensor; raise PreconditionError where its layers read different
        values.
        """
        if quantizer.name not in self.done:
            if x.shape is None:
                raise ir.passes.PreconditionError(
                    f"quantizer {quantizer.name}: the exporter gave its tensor no rank"
                )
            if x.producer() is not None and x.name not in self.outputs:
                x.name = (
                    f"{quantizer.name}.input"  # a tensor that is a layer's output keeps that name
                )
            self.done[quantizer.name] = (
                self._integer(quantizer, x)
                if isinstance(quantizer, ActivationQuantizerData)
                else self._per_channel(quantizer, x)
            )
        elif self.done[quantizer.name].x is not x:
            raise ir.passes.PreconditionError(
                f"quantizer {quantizer.name}: its layers read different values in the graph"
            )
        return self.done[quantizer.name]

    def _integer(self, quantizer: ActivationQuantizerData, x: ir.Value) -> _Quantized:
        editor, padding = self.editor, self._padding(quantizer)
        source = x
        if any(padding):
            pads = editor.constant(
                f"{quantizer.name}.pads", np.asarray([0, 0, *padding, 0, 0, *padding])
            )
            sizes = list(x.shape or [])
            padded = [
                *sizes[:2],
                *(size + 2 * pad for size, pad in zip(sizes[2:], padding, strict=True)),
            ]
            source = editor.op("Pad", [x, pads], f"{quantizer.name}.padded", shape=padded)
        tables = [
            editor.constant(f"{quantizer.name}.{name}", getattr(quantizer, name))
            for name in timestep_quantize.TABLES
        ]
        tables.append(editor.constant(f"{quantizer.name}.channel", self._channel(quantizer)))
        codes = editor.op(
            timestep_quantize.OP_TYPE,
            [source, self.bucket, *tables],
            codes_name(quantizer.name),
            dtype=ir.DataType.INT8,
            shape=source.shape,
            domain=timestep_quantize.DOMAIN,
            **{timestep_quantize.AXIS: quantizer.axis},
        )
        name = f"{quantizer.name}.dequantized"
        if quantizer.name in self.cast:
            value = editor.op(
                "Cast",
                [codes],
                name,
                dtype=ir.DataType.FLOAT,
                shape=source.shape,
                to=ir.DataType.FLOAT.value,
            )
        else:
            value = dequantized_codes(editor, codes, name)
        offset = self._of_sample(quantizer, x, "offset") if quantizer.offset.any() else None
        return _Quantized(x, value, self._of_sample(quantizer, x, "scale"), offset, padding)

    def _channel(self, quantizer: ActivationQuantizerData) -> NDArray[np.float32]:
        """The smoothing scale; a single one for ones that lie along a product's tokens, whose
        number the graph leaves open.
        """
        of_layers = any(name in self.checkpoint.layers for name in quantizer.layers)
        return (
            quantizer.channel
            if of_layers or (quantizer.channel != 1).any()
            else np.ones(1, np.float32)
        )

    def _padding(self, quantizer: ActivationQuantizerData) -> tuple[int, int]:
        if not quantizer.offset.any():
            return (0, 0)
        layers = [
            self.checkpoint.layers[name]
            for name in quantizer.layers
            if name in self.checkpoint.layers
        ]
        paddings = {layer.conv.padding for layer in layers if layer.conv is not None}
        if len(paddings) > 1:
            raise ir.passes.PreconditionError(
                f"quantizer {quantizer.name}: its convolutions pad differently, so they need "
                "quantizers of their own"
            )
        return next(iter(paddings), (0, 0))

    def _of_sample(self, quantizer: ActivationQuantizerData, x: ir.Value, table: str) -> ir.Value:
        editor, rank = self.editor, len(x.shape or [])
        values = editor.constant(f"{quantizer.name}.{table}", getattr(quantizer, table))
        gathered = editor.op(
            "Gather",
            [values, self.bucket],
            f"{quantizer.name}.{table}_gathered",
            dtype=ir.DataType.FLOAT,
        )
        axes = editor.constant(f"unsqueeze_to_rank_{rank}", np.arange(1, rank))
        shape = [(x.shape or [None])[0], *[1] * (rank - 1)]
        return editor.op(
            "Unsqueeze", [gathered, axes], f"{quantizer.name}.{table}_of_sample", shape=shape
        )

    def _per_channel(self, quantizer: PerChannelQuantizerData, x: ir.Value) -> _Quantized:
        editor, rank = self.editor, len(x.shape or [])
        rows = {}
        for table in ("scale", "zero_point"):
            # Stored in the shape in which a sample's row broadcasts against it.
            array = getattr(quantizer, table)
            shaped = array.reshape(
                len(array), *[-1 if axis == quantizer.axis else 1 for axis in range(1, rank)]
            )
            values = editor.constant(f"{quantizer.name}.{table}", shaped)
            rows[table] = editor.op(
                "Gather",
                [values, self.bucket],
                f"{quantizer.name}.{table}_of_sample",
                dtype=ir.DataType.FLOAT,
            )
        bounds = [
            editor.constant(f"code_bound_{bound}", np.asarray(bound, np.float32))
            for bound in (quantizer.code_low, quantizer.code_high)
        ]
        value = x
        for op_type, name, operands in (
            ("Div", "ratio", [rows["scale"]]),
            ("Round", "rounded", []),
            ("Add", "raised", [rows["zero_point"]]),
            ("Clip", "clipped", bounds),
            ("Sub", "codes", [rows["zero_point"]]),
        ):
            value = editor.op(
                op_type, [value, *operands], f"{quantizer.name}.{name}", shape=x.shape
            )
        value.name = codes_name(quantizer.name)
        return _Quantized(
            x,
            editor.op(
                "Mul", [value, rows["scale"]], f"{quantizer.name}.dequantized", shape=x.shape
            ),
            None,
            None,
            (0, 0),
        )


def _layer(editor: Editor, layer: LayerData, x: _Quantized, like: ir.Value) -> ir.Value:
    y = _compute(editor, x, layer, like)
    if x.offset is not None:
        sums = (
            layer.dequantized_weight.reshape(layer.codes.shape[0], -1)
            .sum(1, dtype=np.float64)
            .astype(np.float32)
        )
        sums_of = editor.constant(
            f"{layer.name}.weight_sums", sums if layer.conv is None else sums.reshape(1, -1, 1, 1)
        )
        excess = editor.op("Mul", [x.offset, sums_of], f"{layer.name}.offset_excess")
        y = editor.op("Sub", [y, excess], f"{layer.name}.centered", shape=like.shape)
    if x.scale is not None:
        y = editor.op("Mul", [y, x.scale], f"{layer.name}.scaled", shape=like.shape)
    if layer.bias is not None:
        shaped = layer.bias if layer.conv is None else layer.bias.reshape(1, -1, 1, 1)
        y = editor.op(
            "Add",
            [y, editor.constant(f"{layer.name}.bias", shaped)],
            f"{layer.name}.biased",
            shape=like.shape,
        )
    return y


def _branch(
    editor: Editor, checkpoint: Checkpoint, name: str, x: ir.Value, like: ir.Value
) -> ir.Value:
    conv, (down, up) = checkpoint.layers[f"{name}.{RESIDUAL}"].conv, checkpoint.branches[name]
    sizes = list(like.shape or [])
    if conv is None:
        inner = [*sizes[:-1], len(down)]
        hidden = _half_product(editor, f"{name}.{DOWN}", x, down.T, None, inner)
        return _half_product(editor, f"{name}.{UP}", hidden, up.T, None, sizes)
    inner = [sizes[0], len(down), *sizes[2:]]
    hidden = _half_product(editor, f"{name}.{DOWN}", x, down, conv, inner)
    return _half_product(editor, f"{name}.{UP}", hidden, up[:, :, None, None], _POINTWISE, sizes)


def _half_product(
    editor: Editor,
    name: str,
    x: ir.Value,
    factor: HalfArray,
    conv: ConvGeometry | None,
    shape: list[Any],
) -> ir.Value:
    """x times a weight that is stored in FP16, computed in x's type."""
    weight = editor.op(
        "Cast",
        [editor.constant(f"{name}.weight", factor)],
        f"{name}.weight_float",
        dtype=ir.DataType.FLOAT,
        shape=factor.shape,
        to=ir.DataType.FLOAT.value,
    )
    if conv is None:
        return editor.op("MatMul", [x, weight], name, shape=shape)
    attributes = _conv_attributes(conv, factor.shape, conv.padding)
    return editor.op("Conv", [x, weight], name, shape=shape, **attributes)


def _product(
    editor: Editor, name: str, a: _Quantized | ir.Value, b: _Quantized | ir.Value, like: ir.Value
) -> ir.Value:
    left, right = (
        operand.value if isinstance(operand, _Quantized) else operand for operand in (a, b)
    )
    y = editor.op("MatMul", [left, right], product_name(name), shape=like.shape)
    offset_a = a.offset if isinstance(a, _Quantized) else None
    offset_b = b.offset if isinstance(b, _Quantized) else None
    # (a - oa) @ (b - ob), with a = codes that carry their offsets: what the offsets add is taken
    # away again.
    if offset_a is not None:
        y = _less(editor, y, f"{name}.left", offset_a, right, axis=2, like=like)
    if offset_b is not None:
        y = _less(editor, y, f"{name}.right", offset_b, left, axis=3, like=like)
    if offset_a is not None and offset_b is not None:
        inner = _inner_size(editor, name, left)
        both = editor.op(
            "Mul",
            [editor.op("Mul", [offset_a, offset_b], f"{name}.offsets"), inner],
            f"{name}.offsets_summed",
        )
        y = editor.op("Add", [y, both], f"{name}.recentered", shape=like.shape)
    for operand, side in ((a, "left"), (b, "right")):
        if isinstance(operand, _Quantized) and operand.scale is not None:
            y = editor.op("Mul", [y, operand.scale], f"{name}.{side}_scaled", shape=like.shape)
    return y


def _inner_size(editor: Editor, name: str, left: ir.Value) -> ir.Value:
    """How many products are summed, as float32: a constant, or read off where it depends on the
    sample's size.
    """
    size = None if left.shape is None else left.shape[3]
    if isinstance(size, int):
        return editor.constant(f"{name}.inner", np.asarray(size, np.float32))
    found = editor.op(
        "Shape", [left], f"{name}.inner_int64", dtype=ir.DataType.INT64, shape=[1], start=3, end=4
    )
    return editor.op(
        "Cast",
        [found],
        f"{name}.inner",
        dtype=ir.DataType.FLOAT,
        shape=[1],
        to=ir.DataType.FLOAT.value,
    )


def _less(
    editor: Editor,
    y: ir.Value,
    prefix: str,
    offset: ir.Value,
    other: ir.Value,
    *,
    axis: int,
    like: ir.Value,
) -> ir.Value:
    sums = editor.op(
        "ReduceSum",
        [other, editor.constant(f"axis_{axis}", np.asarray([axis]))],
        f"{prefix}_sums",
        keepdims=1,
    )
    return editor.op(
        "Sub",
        [y, editor.op("Mul", [offset, sums], f"{prefix}_excess")],
        f"{prefix}_centered",
        shape=like.shape,
    )


def _compute(editor: Editor, x: _Quantized, layer: LayerData, like: ir.Value) -> ir.Value:
    if x.scale is not None:
        return _multiply(editor, x, layer, _weight(editor, layer), like)
    # Case 8: the codes themselves are multiplied, and their scale comes after.
    name, codes, zero_point = weight_name(layer.name), *_weight_constants(layer, integer=False)
    before, after = ((-1, 1, 1, 1), (1, -1, 1, 1)) if layer.conv is not None else ((1, -1), (-1,))
    weight = editor.constant(name, stored(layer.weight_bits, codes, name))
    weight = editor.op(
        "Cast",
        [weight],
        f"{name}_float",
        dtype=ir.DataType.FLOAT,
        shape=codes.shape,
        to=ir.DataType.FLOAT.value,
    )
    if zero_point is not None:
        zeros = editor.constant(f"{name}_zero_float", zero_point.astype(np.float32).reshape(before))
        weight = editor.op("Sub", [weight, zeros], f"{name}_centered", shape=codes.shape)
    y = _multiply(editor, x, layer, weight, like)
    scale = editor.constant(f"{name}_scale", layer.weight_scale.reshape(after))
    return editor.op("Mul", [y, scale], f"{layer.name}.weighted", shape=like.shape)


def _multiply(
    editor: Editor, x: _Quantized, layer: LayerData, weight: ir.Value, like: ir.Value
) -> ir.Value:
    if layer.conv is None:
        return editor.op("MatMul", [x.value, weight], product_name(layer.name), shape=like.shape)
    top, left = (size - done for size, done in zip(layer.conv.padding, x.padded, strict=True))
    attributes = _conv_attributes(layer.conv, layer.codes.shape, (top, left))
    name = product_name(layer.name)
    return editor.op("Conv", [x.value, weight], name, shape=like.shape, **attributes)


def _conv_attributes(
    geometry: ConvGeometry, weight: tuple[int, ...], padding: tuple[int, int]
) -> dict[str, Any]:
    return {
        "kernel_shape": list(weight[2:]),
        "strides": list(geometry.stride),
        "pads": [*padding, *padding],
        "dilations": list(geometry.dilation),
        "group": geometry.groups,
    }


def _weight_constants(layer: LayerData, *, integer: bool) -> tuple[Array, NDArray[Any] | None]:
    """The weight's codes as the graph stores them, a linear's transposed, and their zero-points;
    None where all are zero.
    """
    codes, axis = (layer.codes, 0) if layer.conv is not None else (_transposed(layer.codes), 1)
    wide = integer and codes.dtype == np.int8 and layer.weight_bits > FOUR_BITS
    if wide and pair_magnitude(np.asarray(codes), axis) > SAFE:
        unsigned = LazyArray(
            codes.shape, np.dtype(np.uint8), lambda: as_unsigned(np.asarray(codes))
        )
        return unsigned, np.full(codes.shape[axis], MIDDLE, np.uint8)
    return codes, layer.weight_zero_point


def _transposed(codes: Array) -> LazyArray:
    return LazyArray(codes.shape[::-1], codes.dtype, lambda: np.asarray(codes).T)


def _weight(editor: Editor, layer: LayerData) -> ir.Value:
    name, codes, zero_point = weight_name(layer.name), *_weight_constants(layer, integer=True)
    axis = 0 if layer.conv is not None else 1
    zeros = np.zeros(codes.shape[axis], codes.dtype) if zero_point is None else zero_point
    operands = [
        editor.constant(name, stored(layer.weight_bits, codes, name)),
        editor.constant(f"{name}_scale", layer.weight_scale),
        editor.constant(f"{name}_zero", stored(layer.weight_bits, zeros, f"{name}_zero")),
    ]
    return editor.op(
        "DequantizeLinear",
        operands,
        f"{name}_dequantized",
        dtype=ir.DataType.FLOAT,
        shape=codes.shape,
        axis=axis,
    )


def stored(bits: int, codes: Array, name: str) -> ir.TensorProtocol:
    """Codes as the graph holds them: INT4 or UINT4, packed, or INT8 or UINT8; in memory no longer
    than they are read.
    """
    if bits != FOUR_BITS:
        return lazy(name, codes)
    dtype = ir.DataType.INT4 if codes.dtype == np.int8 else ir.DataType.UINT4
    return ir.LazyTensor(
        lambda: ir.PackedTensor(pack_4bit(np.asarray(codes)), dtype, shape=codes.shape, name=name),
        dtype,
        ir.Shape(codes.shape),
        name=name,
    )
