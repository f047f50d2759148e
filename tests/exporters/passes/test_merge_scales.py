from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from exporters.passes.expand_timestep_quantize import ExpandTimestepQuantize
from exporters.passes.freeze_bucket import FreezeBucket
from exporters.passes.merge_scales import MergeScales
from tests.helpers import (
    graph_from_text,
    kinds_checkpoint,
    kinds_feeds,
    kinds_graph,
    op_counts,
    proto_of,
    relative_error,
    run,
)

TIMESTEPS = [999.0, 0.0, 500.0, 3.0]
TEXT = """
g (float[batch,3] y, int64[batch] start) => (float[batch,3] out)
<int64[1] one = {1}, int64 zero = {0}>
{
  bucket = Add(start, zero)
  a1 = Gather(a, bucket)
  a2 = Unsqueeze(a1, one)
  scaled = Mul(y, a2)
  out = Mul(scaled, factor)
}
"""
"""A scale of samples, then a factor that is none."""


def products(model: ir.Model) -> dict[str, int]:
    """How many multiplications lie behind each attention product."""
    readers = dict.fromkeys(("attn.scores.product", "attn.mix.product", "half.mix.product"), 0)
    for name in readers:
        value = ir.convenience.create_value_mapping(model.graph)[name]
        while value.uses() and (node := next(iter(value.consumers()))).op_type in (
            "Mul",
            "Sub",
            "Add",
        ):
            readers[name] += node.op_type == "Mul"
            value = node.outputs[0]
    return readers


def test_case_1_a_product_of_two_quantizers_is_multiplied_once_and_computes_the_same() -> None:
    model = kinds_graph(kinds_checkpoint())
    ExpandTimestepQuantize()(model)
    assert products(model) == {
        "attn.scores.product": 2,
        "attn.mix.product": 2,
        "half.mix.product": 1,
    }
    before = run(model, kinds_feeds(TIMESTEPS))
    assert MergeScales()(model).modified
    assert products(model) == {
        "attn.scores.product": 1,
        "attn.mix.product": 1,
        "half.mix.product": 1,
    }
    onnx.checker.check_model(proto_of(model), full_check=True)
    for ours, theirs in zip(run(model, kinds_feeds(TIMESTEPS)), before, strict=True):
        assert relative_error(ours, theirs) < 1e-6


def test_case_1_holds_for_the_constants_of_a_bucket_that_is_frozen_before_or_after() -> None:
    for order in ((MergeScales(), FreezeBucket(1)), (FreezeBucket(1), MergeScales())):
        model = kinds_graph(kinds_checkpoint())
        ir.passes.Sequential(ExpandTimestepQuantize(), *order)(model)
        assert products(model)["attn.mix.product"] == 1


def test_case_2_a_scale_and_anything_else_stay_two_multiplications() -> None:
    model = graph_from_text(TEXT, a=np.ones(2, np.float32), factor=np.ones(3, np.float32))
    assert not MergeScales()(model).modified
    assert op_counts(model)["Mul"] == 2
