from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from exporters.passes.expand_timestep_quantize import ExpandTimestepQuantize
from exporters.passes.unsigned_codes import UnsignedCodes
from tests.helpers import (
    Array,
    kinds_checkpoint,
    kinds_expected,
    kinds_feeds,
    kinds_graph,
    lowering_begins_with,
    op_counts,
    proto_of,
    relative_error,
    run,
)

TIMESTEPS = [999.0, 0.0, 500.0, 3.0]
PRODUCTS = ("scores", "mixed", "half")


def expanded() -> ir.Model:
    model = lowering_begins_with(kinds_graph(kinds_checkpoint()))
    ExpandTimestepQuantize()(model)
    return model


def codes_of(model: ir.Model, quantizer: str) -> Array:
    model.graph.outputs[:] = [
        ir.convenience.create_value_mapping(model.graph)[f"{quantizer}.codes"]
    ]
    return run(model, kinds_feeds(TIMESTEPS))[0]


def test_case_1_a_softmax_is_stored_unsigned_its_codes_128_more_and_its_products_stay_right() -> (
    None
):
    assert codes_of(expanded(), "attn.softmax").dtype == np.int8
    model = expanded()
    assert UnsignedCodes()(model).modified
    onnx.checker.check_model(proto_of(model), full_check=True)
    names = [value.name for value in model.graph.outputs]
    found = dict(zip(names, run(model, kinds_feeds(TIMESTEPS)), strict=True))
    theirs = kinds_expected(kinds_checkpoint(), kinds_feeds(TIMESTEPS))
    for name in PRODUCTS:
        assert relative_error(found[name], theirs[name]) < 5e-6, name
    after = codes_of(model, "attn.softmax")
    assert after.dtype == np.uint8
    np.testing.assert_array_equal(
        after.astype(int), codes_of(expanded(), "attn.softmax").astype(int) + 128
    )


def test_case_1_nothing_is_computed_from_the_offset_any_more() -> None:
    model = expanded()
    before = op_counts(model)
    UnsignedCodes()(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    after = op_counts(model)
    # The softmax's correction, a sum over the other operand, and the product of both operands'
    # offsets; v keeps its own.
    assert (before["ReduceSum"] - after["ReduceSum"], before["Sub"] - after["Sub"]) == (1, 1)
    assert not any(
        "attn.softmax.offset" in (value.name or "")
        for node in model.graph
        for value in node.inputs
        if value is not None
    )


def test_case_2_codes_with_a_zero_point_and_codes_that_fit_int8_stay() -> None:
    model = expanded()
    UnsignedCodes()(model)
    for quantizer in ("padded", "plain", "attn.v", "attn.q", "half.v"):
        np.testing.assert_array_equal(codes_of(model, quantizer), codes_of(expanded(), quantizer))


def test_a_second_run_changes_nothing() -> None:
    model = expanded()
    UnsignedCodes()(model)
    counts = op_counts(model)
    assert not UnsignedCodes()(model).modified
    assert op_counts(model) == counts
