"""Every pass checks what its docstring says that it needs and guarantees."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

import exporters.passes
from exporters.exactness import EXACT_ANYWHERE
from exporters.graph_info import BUCKET
from exporters.passes.avoid_saturation import AvoidSaturation
from exporters.passes.balance_scales import BalanceScales
from exporters.passes.center_weights import CenterWeights
from exporters.passes.compress_weights import CompressWeights
from exporters.passes.constant_reshapes import ConstantReshapes
from exporters.passes.contract import dequantizers, quantizer_nodes
from exporters.passes.conv_to_matmul import ConvToMatMul
from exporters.passes.dequantize_casts import DequantizeCasts
from exporters.passes.expand_timestep_quantize import ExpandTimestepQuantize
from exporters.passes.fix_tokens import FixTokens
from exporters.passes.forward_slices import ForwardSlices
from exporters.passes.freeze_bucket import FreezeBucket
from exporters.passes.fuse_attention import FuseAttention
from exporters.passes.fuse_geglu import FuseGeglu
from exporters.passes.gather_quantize_scale import GatherQuantizeScale
from exporters.passes.gather_shaped_tables import GatherShapedTables
from exporters.passes.gather_tables_once import GatherTablesOnce
from exporters.passes.insert_quantized_layers import InsertQuantizedLayers
from exporters.passes.keep_timestep_quantize import KeepTimestepQuantize
from exporters.passes.linear_to_conv import LinearToConv
from exporters.passes.low_precision_io import LowPrecisionIO
from exporters.passes.merge_scales import MergeScales
from exporters.passes.narrow_weights import NarrowWeights
from exporters.passes.remove_quantization import RemoveQuantization
from exporters.passes.round_in_quantize_linear import RoundInQuantizeLinear
from exporters.passes.split_gates import SplitGates
from exporters.passes.to_low_precision import ToLowPrecision
from exporters.passes.unsigned_activations import UnsignedActivations
from exporters.passes.unsigned_codes import UnsignedCodes
from exporters.passes.widen_int4 import WidenInt4
from exporters.passes.widen_weights import WidenWeights
from tests.exporters.passes.test_compress_weights import of_matmul
from tests.exporters.passes.test_constant_reshapes import reshaping
from tests.exporters.passes.test_fix_tokens import attending
from tests.exporters.passes.test_forward_slices import sliced
from tests.exporters.passes.test_fuse_attention import attention_graph
from tests.exporters.passes.test_narrow_weights import published, two_products
from tests.exporters.passes.test_split_gates import gated, with_bias
from tests.helpers import (
    KINDS_TEXT,
    graph_from_text,
    hand_checkpoint,
    hand_graph,
    kinds_checkpoint,
    kinds_graph,
    lowering_begins_with,
)

FP16 = ir.DataType.FLOAT16


def portable() -> ir.Model:
    """Layers and products of all kinds, as the portable graph has them."""
    return kinds_graph(kinds_checkpoint())


def dequantized() -> ir.Model:
    return lowering_begins_with(portable())


def expanded() -> ir.Model:
    model = dequantized()
    ExpandTimestepQuantize()(model)
    return model


def signed() -> ir.Model:
    """Products of which one is of signed 4-bit weights on tokens."""
    model = lowering_begins_with(hand_graph(hand_checkpoint()))
    ExpandTimestepQuantize()(model)
    return model


def skeleton() -> ir.Model:
    return graph_from_text(KINDS_TEXT)


def gate() -> ir.Model:
    return gated(with_bias(hand_checkpoint(), 4))


def wide() -> ir.Model:
    """Weights in FP32 that bfloat16 holds."""
    return two_products(published(40, 40), published(40, seed=1))


def narrow() -> ir.Model:
    return changed(wide, NarrowWeights())


def read_halves(model: ir.Model) -> None:
    """A product reads a weight as it is stored."""
    product = next(node for node in model.graph if node.op_type == "MatMul")
    product.replace_input_with(1, model.graph.initializers["w"])


def changed(make: Callable[[], ir.Model], change: Callable[[ir.Model], Any]) -> ir.Model:
    model = make()
    change(model)
    return model


def compute_a_scale(model: ir.Model) -> None:
    """A quantizer reads its scale from an input of the graph."""
    node = quantizer_nodes(model)[0]
    scale = ir.Value(name="given", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.append(scale)
    node.replace_input_with(2, scale)


def forget_a_rank(model: ir.Model) -> None:
    x = quantizer_nodes(model)[0].inputs[0]
    assert x is not None
    x.shape = None


def forget_a_type(model: ir.Model) -> None:
    model.graph[-1].outputs[0].type = None


def rename_a_product(model: ir.Model) -> None:
    next(n for n in model.graph if n.op_type in ("Conv", "MatMul")).name = "renamed"


def rename_the_bucket(model: ir.Model) -> None:
    ir.convenience.create_value_mapping(model.graph)[BUCKET].name = "another"


def compute_zero_points(model: ir.Model) -> None:
    """Weights' zero-points are no constants any more."""
    for node in dequantizers(model):
        codes, zero = node.inputs[0], node.inputs[2]
        if codes is not None and codes.is_initializer() and zero is not None:
            given = ir.Value(name=f"{zero.name}_given", shape=zero.shape, type=zero.type)
            model.graph.inputs.append(given)
            node.replace_input_with(2, given)


BROKEN_NEEDS: list[tuple[ir.passes.InPlacePass, Callable[[], ir.Model]]] = [
    (AvoidSaturation(EXACT_ANYWHERE), dequantized),
    (
        AvoidSaturation(EXACT_ANYWHERE),
        lambda: changed(expanded, WidenInt4(cast_at_runtime=True)),
    ),
    (BalanceScales(), lambda: changed(dequantized, compute_a_scale)),
    (
        CenterWeights(signed_zero_points=True),
        lambda: changed(dequantized, compute_zero_points),
    ),
    (CompressWeights(), portable),
    (ConvToMatMul(), dequantized),
    (DequantizeCasts(), lambda: changed(portable, rename_a_product)),
    (ExpandTimestepQuantize(), lambda: changed(dequantized, compute_a_scale)),
    (ExpandTimestepQuantize(), lambda: changed(dequantized, forget_a_rank)),
    (FreezeBucket(0), dequantized),
    (GatherQuantizeScale(), lambda: changed(portable, compute_a_scale)),
    (GatherShapedTables(), dequantized),
    (GatherShapedTables(), lambda: changed(expanded, rename_the_bucket)),
    (GatherTablesOnce(), dequantized),
    (GatherTablesOnce(), lambda: changed(expanded, rename_the_bucket)),
    (InsertQuantizedLayers(hand_checkpoint()), skeleton),
    (KeepTimestepQuantize(), expanded),
    (LinearToConv(EXACT_ANYWHERE), dequantized),
    (LinearToConv(EXACT_ANYWHERE), lambda: changed(expanded, WidenInt4(cast_at_runtime=True))),
    (MergeScales(), dequantized),
    (RemoveQuantization(), lambda: changed(portable, rename_a_product)),
    (RoundInQuantizeLinear(), dequantized),
    (SplitGates(), lambda: changed(gate, WidenInt4(cast_at_runtime=True))),
    (ToLowPrecision(FP16), lambda: changed(dequantized, forget_a_type)),
    (UnsignedActivations(), dequantized),
    (UnsignedCodes(), dequantized),
    (WidenInt4(cast_at_runtime=False), lambda: changed(dequantized, compute_zero_points)),
    (WidenWeights(), lambda: changed(narrow, read_halves)),
]

WORK: list[tuple[ir.passes.InPlacePass, Callable[[], ir.Model]]] = [
    (AvoidSaturation(EXACT_ANYWHERE), expanded),
    (BalanceScales(), dequantized),
    (CenterWeights(signed_zero_points=True), expanded),
    (CompressWeights(), of_matmul),
    (
        ConstantReshapes(),
        lambda: reshaping("kept = Shape <start = 0, end = 2> (x)", "kept, four, two"),
    ),
    (ConvToMatMul(), expanded),
    (DequantizeCasts(), portable),
    (ExpandTimestepQuantize(), dequantized),
    (FixTokens(), lambda: attending(5)),
    (ForwardSlices(), lambda: sliced(0, 3)),
    (FreezeBucket(0), expanded),
    (FuseAttention(), attention_graph),
    (GatherQuantizeScale(), portable),
    (GatherShapedTables(), expanded),
    (GatherTablesOnce(), expanded),
    (LinearToConv(EXACT_ANYWHERE), signed),
    (LowPrecisionIO(()), dequantized),
    (InsertQuantizedLayers(kinds_checkpoint()), skeleton),
    (KeepTimestepQuantize(), portable),
    (MergeScales(), expanded),
    (NarrowWeights(), wide),
    (RemoveQuantization(), portable),
    (RoundInQuantizeLinear(), expanded),
    (SplitGates(), gate),
    (ToLowPrecision(FP16), dequantized),
    (UnsignedActivations(), expanded),
    (UnsignedCodes(), expanded),
    (WidenInt4(cast_at_runtime=False), expanded),
    (WidenWeights(), narrow),
]
"""Each pass with a graph in which it has work to do."""

LOSES_CODES = (
    (ExpandTimestepQuantize(), dequantized),
    (FuseGeglu(), dequantized),
    (GatherQuantizeScale(), portable),
    (KeepTimestepQuantize(), portable),
    (UnsignedCodes(), expanded),
)
"""Those that promise to keep the names of codes."""

WITHOUT_NEEDS = {
    ConstantReshapes,
    FixTokens,
    ForwardSlices,
    FuseAttention,
    FuseGeglu,
    LowPrecisionIO,
    NarrowWeights,
}


def name_of(value: Any) -> str | None:
    return type(value).__name__ if isinstance(value, ir.passes.InPlacePass) else ""


@pytest.mark.parametrize(("step", "broken"), BROKEN_NEEDS, ids=name_of)
def test_a_graph_that_breaks_what_a_pass_needs_is_refused_before_it_is_changed(
    step: ir.passes.InPlacePass, broken: Callable[[], ir.Model]
) -> None:
    model = broken()
    before = [node.name for node in model.graph]
    with pytest.raises(ir.passes.PreconditionError):
        step(model)
    assert [node.name for node in model.graph] == before


@pytest.mark.parametrize(("step", "make"), WORK, ids=name_of)
def test_a_pass_that_leaves_its_work_undone_is_caught(
    step: ir.passes.InPlacePass, make: Callable[[], ir.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert step(make()).modified
    undone = ir.passes.PassResult
    monkeypatch.setattr(type(step), "call", lambda self, model: undone(model, modified=False))
    with pytest.raises(ir.passes.PostconditionError):
        step(make())


@pytest.mark.parametrize(("step", "make"), LOSES_CODES, ids=name_of)
def test_a_pass_that_loses_the_name_of_codes_is_caught(
    step: ir.passes.InPlacePass, make: Callable[[], ir.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = type(step).call

    def lose(self: Any, model: ir.Model) -> ir.passes.PassResult:
        result = call(self, model)
        ir.convenience.create_value_mapping(model.graph)["padded.codes"].name = "lost"
        return result

    monkeypatch.setattr(type(step), "call", lose)
    with pytest.raises(ir.passes.PostconditionError):
        step(make())


def test_a_product_of_two_types_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = ToLowPrecision.call

    def mix(self: ToLowPrecision, model: ir.Model) -> ir.passes.PassResult:
        result = call(self, model)
        half = (x for x in model.graph if x.op_type == "MatMul" and x.outputs[0].dtype is FP16)
        next(half).outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        return result

    monkeypatch.setattr(ToLowPrecision, "call", mix)
    with pytest.raises(ir.passes.PostconditionError):
        ToLowPrecision(FP16)(dequantized())


def test_the_cases_above_are_of_every_pass() -> None:
    found = set()
    for module in pkgutil.iter_modules(exporters.passes.__path__):
        loaded = vars(importlib.import_module(f"exporters.passes.{module.name}")).values()
        found |= {
            x
            for x in loaded
            if isinstance(x, type)
            and issubclass(x, ir.passes.InPlacePass)
            and x.__module__.endswith(module.name)
        }
    assert {type(step) for step, _ in BROKEN_NEEDS} | WITHOUT_NEEDS == found
    assert {type(step) for step, _ in (*WORK, *LOSES_CODES)} == found
