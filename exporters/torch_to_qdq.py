"""From a checkpoint to the portable graph: QDQ ONNX with one activation-scale set per timestep
bucket.

torch exports the float skeleton only: each quantized layer is one placeholder node, which
``passes.insert_quantized_layers`` then replaces with its integer form, taken from the checkpoint.
So no integer weight ever passes through torch, and the graph's names and shapes are ours. What
stays in float is traced by its shape alone. A weight is read, and laid out as the graph holds it,
when the graph is saved: so one at a time is in memory, whatever the model's size.
"""

from __future__ import annotations

import json
import logging
import warnings
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import to_torch_dtype
from onnxscript import optimizer, rewriter
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention
from onnxscript.onnx_opset import opset21
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from exporters.editor import lazy
from exporters.graph_info import (
    ADDED_INPUTS_KEY,
    CHECKPOINT_KEY,
    HEIGHT,
    SAMPLE_MULTIPLE_KEY,
    SAMPLE_SHAPE_KEY,
    SCHEME_KEY,
    STATES,
    TOKENS,
    TOKENS_KEY,
    WIDTH,
)
from exporters.ops import timestep_quantize
from exporters.passes.constant_reshapes import ConstantReshapes
from exporters.passes.forward_slices import ForwardSlices
from exporters.passes.insert_quantized_layers import (
    BRANCH_PLACEHOLDER,
    LAYER_PLACEHOLDER,
    MATMUL_PLACEHOLDER,
    PLACEHOLDER_DOMAIN,
    InsertQuantizedLayers,
)
from exporters.passes.narrow_weights import NarrowWeights
from quest_deploy.artifacts.checkpoint import RESIDUAL
from quest_deploy.quantization.model import (
    build_float_model,
    downsampling,
    set_submodule,
    token_inputs,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quest_deploy.artifacts.checkpoint import Checkpoint, ConvGeometry, LayerData

OUTPUT_NAME = "out_sample"
BATCH_LIMIT = 63
"""To torch.export alone: diffusers copies larger batches before it upsamples them, which leaves no
trace in the graph.
"""
SIZES = (("rows", 2**12), ("columns", 2**12))
"""The names, to torch.export, of the smallest feature map's height and width, and their limits."""
TRACED_TOKENS, MOST_TOKENS = 5, 2**12
"""The number of tokens that is traced, and torch.export's limit."""


def portable_graph(
    checkpoint: Checkpoint,
    example: dict[str, Tensor],
    checkpoint_sha256: str,
    added: Sequence[str] = (),
) -> ir.Model:
    """Build the portable graph.

    Args:
        example: the model's inputs, batch 2 or more. Their batch becomes dynamic, and so do the
            height and the width of ``sample``, any multiple of the model's total downsampling, and
            the number of tokens of ``encoder_hidden_states``, where there are several, and of what
            has as many. Not where scales may lie along them, as in an imported checkpoint. Height
            and width of another input are that part of the sample's which they are in the example.
            Other dimensions stay.
        checkpoint_sha256: recorded in the graph's metadata, with the scheme and the sample's shape.
        added: the inputs among them that may be zeros, which add nothing.

    Returns:
        Inputs ``sample`` [batch, C, height, width] float32, ``timestep`` [batch] float32 and the
        conditions; output ``out_sample``. Its weights are read from the checkpoint whenever they
        are asked for.
    """
    with init_empty_weights(
        include_buffers=False
    ):  # what is quantized would be made, and thrown away, at four bytes a weight
        model = build_float_model(checkpoint.architecture)
    official = checkpoint.architecture.official_sums
    any_tokens = STATES in example and example[STATES].shape[1] > 1 and not official
    of_tokens = [x for x in token_inputs(model) if x in example] if any_tokens else []
    skeleton = _Skeleton(model, checkpoint, list(example))
    graph = _traced(skeleton, example, of_tokens)
    _take_floats(graph, checkpoint)
    _simplify(graph)
    graph.ir_version = timestep_quantize.IR_VERSION
    ForwardSlices()(graph)
    NarrowWeights()(graph)
    InsertQuantizedLayers(checkpoint)(graph)
    common.ClearMetadataAndDocStringPass()(graph)
    common.RemoveUnusedNodesPass()(graph)
    common.RemoveUnusedOpsetsPass()(graph)
    function = timestep_quantize.function_body()
    graph.functions[function.identifier()] = function
    graph.graph.opset_imports[timestep_quantize.DOMAIN] = timestep_quantize.VERSION
    graph.producer_name = "quest-deploy"
    graph.graph.name = checkpoint.model
    InsertQuantizedLayers.describe(graph, checkpoint)
    graph.metadata_props[SCHEME_KEY] = json.dumps(checkpoint.scheme.to_json())
    graph.metadata_props[CHECKPOINT_KEY] = checkpoint_sha256
    graph.metadata_props[SAMPLE_SHAPE_KEY] = json.dumps(list(example["sample"].shape[1:]))
    if any_tokens:
        graph.metadata_props[TOKENS_KEY] = json.dumps(example[STATES].shape[1])
    if added:
        graph.metadata_props[ADDED_INPUTS_KEY] = json.dumps(list(added))
    return graph


def _traced(skeleton: _Skeleton, example: dict[str, Tensor], of_tokens: list[str]) -> ir.Model:
    """The skeleton as torch exports it: ``sample`` [batch, C, height, width], those ``of_tokens``
    [batch, tokens, ...], the other inputs [batch, ...], those of four dimensions with sizes like
    "height/2".
    """
    factor = downsampling(skeleton.model)
    height = example["sample"].shape[2]
    divisors = {
        name: height // value.shape[2] for name, value in example.items() if value.dim() == 4
    }
    batch, rows, columns = (
        torch.export.Dim(name, max=limit) for name, limit in (("batch", BATCH_LIMIT), *SIZES)
    )
    shapes = {name: {0: batch} for name in example}
    sizes = {d: (factor // d * rows, factor // d * columns) for d in divisors.values()}
    # Sizes are only what the symbols begin with: small ones, and all different, since equal ones
    # would be taken for one.
    inputs = {name: value.new_zeros(2, *value.shape[1:]) for name, value in example.items()}
    for name, divisor in divisors.items():
        multiple = factor // divisor
        shapes[name] |= dict(zip((2, 3), sizes[divisor], strict=True))
        inputs[name] = inputs[name].new_zeros(2, example[name].shape[1], 3 * multiple, 4 * multiple)
    tokens = torch.export.Dim(TOKENS, max=MOST_TOKENS)
    for name in of_tokens:
        shapes[name] |= {1: tokens}
        inputs[name] = inputs[name].new_zeros(2, TRACED_TOKENS, *inputs[name].shape[2:])
    with warnings.catch_warnings(), quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            skeleton, tuple(inputs.values()), dynamic_shapes=(tuple(shapes.values()),)
        )
        program = _to_onnx(exported, list(example), shapes)
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        if value.shape is not None and len(value.shape) == 4:
            divisor = divisors.get(value.name or "", 1)
            part = f"/{divisor}" if divisor > 1 else ""
            value.shape = ir.Shape([*value.shape[:2], f"{HEIGHT}{part}", f"{WIDTH}{part}"])
    program.model.metadata_props[SAMPLE_MULTIPLE_KEY] = json.dumps(factor)
    return program.model


def _take_floats(graph: ir.Model, checkpoint: Checkpoint) -> None:
    """Give the initializers that were traced by their shape alone the checkpoint's values."""
    for name, value in graph.graph.initializers.items():
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            value.const_value = lazy(name, checkpoint.floats[name.removeprefix(SKELETON)])


def _to_onnx(
    exported: torch.export.ExportedProgram, names: list[str], shapes: dict[str, Any]
) -> torch.onnx.ONNXProgram | None:
    """torch.onnx's translation, without tracing the model a second time to decompose its operators,
    where it does without.

    That is two fifths of the time. torch.onnx knows the operators of the usual models as they are,
    once conversions are written as it knows them; it must decompose what it does not know, and what
    writes into a tensor.
    """

    def translated() -> torch.onnx.ONNXProgram | None:
        return torch.onnx.export(
            exported,
            opset_version=timestep_quantize.OPSET,
            dynamic_shapes=(tuple(shapes.values()),),  # for its names alone
            input_names=names,
            output_names=[OUTPUT_NAME],
            verbose=False,
            optimize=False,  # see _simplify
            custom_translation_table={
                torch.ops.aten.scaled_dot_product_attention.default: _attention,
                torch.ops.aten.rms_norm.default: _rms_norm,
            },
        )

    targets = {node.target for node in exported.graph.nodes}
    if not any(
        target._schema.is_mutable for target in targets if isinstance(target, torch._ops.OpOverload)
    ):
        _rewrite_conversions(exported.graph)
        exported.run_decompositions = lambda _: exported
        try:
            return translated()
        except torch.onnx.OnnxExporterError as e:
            logging.getLogger(__name__).info(
                "torch.onnx does not know all of the model's operators: %s", e
            )
        finally:
            del exported.run_decompositions
    return translated()


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention on [B, heads, N, d] without a mask, its keys transposed by one node; torch.onnx
    reshapes them for it and back.

    The operands are onnx_ir's values, which onnxscript's operators take and give while torch.onnx
    traces this.
    """
    op: Any = opset21
    width = None if query.shape is None or len(query.shape) != 4 else query.shape[-1]
    if attn_mask is not None or dropout_p or is_causal or enable_gqa or not isinstance(width, int):
        return aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    factor = op.Constant(
        value_float=(width**-0.5 if scale is None else scale) ** 0.5
    )  # on both, as torch does: nothing overflows
    scores = op.MatMul(op.Mul(query, factor), op.Mul(op.Transpose(key, perm=[0, 1, 3, 2]), factor))
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _rms_norm(x: Any, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """x by its root mean square over the last dimensions, ``shape``; torch.onnx knows it from opset
    23 on, and would decompose the whole model for it.
    """
    op: Any = opset21
    square = op.Pow(x, op.Constant(value_float=2.0))
    mean = op.ReduceMean(square, op.Constant(value_ints=list(range(-len(shape), 0))))
    least = torch.finfo(torch.float32).eps if eps is None else eps
    root = op.Sqrt(op.Add(mean, op.Constant(value_float=least)))
    normal = op.Mul(x, op.Reciprocal(root))
    return normal if weight is None else op.Mul(normal, weight)


def _rewrite_conversions(graph: torch.fx.Graph) -> None:
    """Write each ``x.to(dtype)`` as the copy that it is, or as x where it is none."""
    for node in list(graph.nodes):
        if node.target in (torch.ops.aten.to.dtype, torch.ops.aten.to.dtype_layout):
            x, dtype = node.args[0], node.meta["val"].dtype
            if x.meta["val"].dtype == dtype:
                node.replace_all_uses_with(x)
                graph.erase_node(node)
            else:
                node.target, node.args, node.kwargs = (
                    torch.ops.aten._to_copy.default,
                    (x,),
                    {"dtype": dtype},
                )


def _no_op(operator: str, neutral: float) -> rewriter.pattern.RewriteRule:
    """``operator`` on x and the scalar ``neutral``, which gives x. onnxscript's own rules take
    1.000009 for 1, and for 0 the 1e-15 that keeps a division from infinity.
    """

    def is_neutral(context: Any, constant: ir.Value, **_: Any) -> bool:
        tensor = ir.convenience.get_const_tensor(constant)
        # Of another shape than a scalar's it may broadcast x.
        return tensor is not None and not tensor.shape and tensor.numpy().item() == neutral

    return rewriter.pattern.RewriteRule(
        lambda op, x, constant: getattr(op, operator)(x, constant),
        lambda op, x, **_: op.Identity(x),
        is_neutral,
    )


_NO_OPS = (_no_op("Mul", 1), _no_op("Div", 1), _no_op("Add", 0), _no_op("Sub", 0))


def _simplify(model: ir.Model) -> None:
    """onnxscript's optimizer, without the one of its rules that looks through the whole graph for
    each node: most of the export.
    """
    common.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        rewriter.rewrite(
            model,
            [
                *_NO_OPS,
                rules.cast_cast_rule,
                rules.no_op_cast_rule,
                rules.no_op_expand_rule,
                rules.no_op_transpose_rule,
                rules.transpose_transpose_rule,
                rules.reshape_reshape_rule,
                rules.materialize_reshape_shape_rule,
                rules.unsqueeze_unsqueeze_rule,
                rules.squeeze_reshape_1d_rule,
            ],
        )
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ConstantReshapes()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.DeduplicateInitializersPass()(model)
    # Layers that read the same tensor read the same value only after equal subexpressions (one SiLU
    # per ResBlock) are merged.
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)


SKELETON = "model."
"""What the names of a skeleton's parameters begin with."""


class _Skeleton(nn.Module):
    """The float model, its quantized layers and products replaced by placeholders, the rest without
    values; called with the inputs ``names`` in order.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for layer in checkpoint.layers.values():
            parent, _, child = layer.name.rpartition(".")
            setattr(model.get_submodule(parent), child, _Placeholder(layer))
        for name in checkpoint.matmuls:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _MatmulPlaceholder(name))
        with FakeTensorMode():
            floats = {
                key: torch.empty(
                    value.shape, dtype=to_torch_dtype(ir.DataType.from_numpy(value.dtype))
                )
                for key, value in checkpoint.floats.items()
            }
        model.load_state_dict(floats, strict=True, assign=True)
        for name in checkpoint.architecture.low_rank:
            residual = model.get_submodule(f"{name}.{RESIDUAL}")
            set_submodule(model, name, _BranchPlaceholder(name, residual))
        for name, module in list(model.named_modules()):
            _replace_by_onnx(model, name, module)
        self.model = model.requires_grad_(requires_grad=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.model(
            **dict(zip(self.names, inputs, strict=True)), return_dict=False
        )[0]
        return output


class _Placeholder(nn.Module):
    def __init__(self, layer: LayerData) -> None:
        super().__init__()
        self.name, self.conv, self.codes_shape = layer.name, layer.conv, layer.codes.shape
        # diffusers reads these to choose dtypes and shapes; they hold no values.
        self.weight = torch.empty(0)
        groups = 1 if layer.conv is None else layer.conv.groups
        self.in_features = self.in_channels = self.codes_shape[1] * groups
        self.out_features = self.out_channels = self.codes_shape[0]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.onnx.ops.symbolic(
            f"{PLACEHOLDER_DOMAIN}::{LAYER_PLACEHOLDER}",
            (x,),
            {"layer": self.name},
            dtype=x.dtype,
            shape=self._shape(x),
            version=1,
        )
        return result

    def _shape(self, x: Tensor) -> list[Any]:
        if self.conv is None:
            return [*x.shape[:-1], self.codes_shape[0]]
        return [
            x.shape[0],
            self.codes_shape[0],
            *(_output_size(x.shape[2 + i], self.conv, self.codes_shape[2 + i], i) for i in (0, 1)),
        ]


CROSS_NORM = "norm_cross"
"""A norm of hidden states, whose class diffusers asks for while it runs."""


def _replace_by_onnx(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put what exports as one node in the place of a norm, and nothing in a dropout's: torch takes
    long over them at open sizes.
    """
    if type(module) is nn.Dropout:
        set_submodule(model, name, nn.Identity())
    elif name.rpartition(".")[2] == CROSS_NORM:
        return
    elif (
        isinstance(module, (nn.GroupNorm, nn.LayerNorm))
        and module.weight is not None
        and module.bias is not None
    ):
        set_submodule(model, name, _OnnxNorm(module))


class _OnnxNorm(nn.Module):
    """GroupNorm or LayerNorm as the ONNX operator of that name."""

    def __init__(self, norm: nn.GroupNorm | nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.attributes: dict[str, Any] = {"epsilon": norm.eps}
        if isinstance(norm, nn.GroupNorm):
            self.op_type = "GroupNormalization"
            self.attributes["num_groups"] = norm.num_groups
        else:
            self.op_type = "LayerNormalization"
            self.attributes["axis"] = -len(norm.normalized_shape)

    def forward(self, x: Tensor) -> Tensor:
        operands, version = (x, self.weight, self.bias), timestep_quantize.OPSET
        result: Tensor = torch.onnx.ops.symbolic(
            self.op_type, operands, self.attributes, dtype=x.dtype, shape=x.shape, version=version
        )
        return result


class _BranchPlaceholder(nn.Module):
    """A layer with a branch of low rank, the branch a placeholder too."""

    def __init__(self, name: str, residual: nn.Module) -> None:
        super().__init__()
        self.name, self.residual = name, residual

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.residual(x)
        op = f"{PLACEHOLDER_DOMAIN}::{BRANCH_PLACEHOLDER}"
        branch: Tensor = torch.onnx.ops.symbolic(
            op, (x,), {"layer": self.name}, dtype=x.dtype, shape=y.shape, version=1
        )
        return y + branch


class _MatmulPlaceholder(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        op, shape = f"{PLACEHOLDER_DOMAIN}::{MATMUL_PLACEHOLDER}", [*a.shape[:-1], b.shape[-1]]
        result: Tensor = torch.onnx.ops.symbolic(
            op, (a, b), {"layer": self.name}, dtype=a.dtype, shape=shape, version=1
        )
        return result


def _output_size(size: Any, conv: ConvGeometry, kernel: int, axis: int) -> Any:
    return (size + 2 * conv.padding[axis] - conv.dilation[axis] * (kernel - 1) - 1) // conv.stride[
        axis
    ] + 1


class quiet:  # noqa: N801 - reads as a context manager
    """Raise one logger's level to ERROR for a while."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)
        self._level = self._logger.level

    def __enter__(self) -> None:
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *exception: object) -> None:
        self._logger.setLevel(self._level)
