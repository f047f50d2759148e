from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.lowering import tensorrt
from exporters.ops import geglu_timestep_quantize
from exporters.passes.fuse_geglu import FuseGeglu
from tests.helpers import Array, Feeds, float32, graph_from_text, op_counts, proto_of, run

TABLES = {
    "scale": float32(0.1, 0.02),
    "low": float32(-3, -100),
    "high": float32(12, 100),
    "offset": float32(0, 1),
    "channel": float32(0.5, 1, 2, 3),
}
GEGLU = """
  values, gates = Split <axis = -1, num_outputs = 2> (y)
  gelu = Gelu <approximate = "none"> (gates)
  x = Mul (values, gelu)
"""
QUANTIZE = (
    'codes = quest.TimestepQuantize <axis = 2, plugin_namespace = "quest", plugin_version = "1">'
)
OPERANDS = "(x, bucket, s_scale, s_low, s_high, s_offset, s_channel)"
FEEDS: Feeds = {
    "y": np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32) * 2,
    "bucket": np.asarray([1, 0, 1]),
}


def graph(body: str, outputs: str = "int8[batch,5,4] codes", dtype: str = "float") -> ir.Model:
    values = (
        f"{dtype}[batch,5,4] values, {dtype}[batch,5,4] gates, {dtype}[batch,5,4] gelu, "
        f"{dtype}[batch,5,4] x"
    )
    text = f"one ({dtype}[batch,5,8] y, int64[batch] bucket) => ({outputs}) <{values}> {{ {body} }}"
    model = graph_from_text(text, **{f"s.{name}": table for name, table in TABLES.items()})
    model.functions.clear()
    model.graph.opset_imports.pop("quest.export")
    return model


def expected_codes(y: Array, bucket: Array) -> tuple[Array, Array]:
    """The codes in float64, and how far each ratio is from a tie."""
    import torch

    values, gates = np.split(y.astype(np.float64), 2, axis=-1)
    x = values * torch.nn.functional.gelu(torch.from_numpy(gates)).numpy()
    scale, low, high, offset = (
        TABLES[name][bucket][:, None, None] for name in ("scale", "low", "high", "offset")
    )
    ratio = x / (scale * TABLES["channel"])
    return np.clip(np.rint(ratio), low, high) + offset, np.abs(np.abs(ratio - np.rint(ratio)) - 0.5)


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_case_1_geglu_and_its_quantizer_become_one_node_that_gives_the_same_codes(
    dtype: str,
) -> None:
    model = graph(GEGLU + QUANTIZE + OPERANDS, dtype=dtype)
    assert FuseGeglu()(model).modified
    (node,) = model.graph
    assert (node.domain, node.op_type) == ("quest", "GegluTimestepQuantize")
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {
        "plugin_namespace": "quest",
        "plugin_version": "1",
    }
    onnx.checker.check_model(proto_of(model))
    function = geglu_timestep_quantize.function_body()
    model.functions[function.identifier()] = function
    node.attributes.clear()
    feeds = {**FEEDS, "y": FEEDS["y"].astype(np.float32 if dtype == "float" else np.float16)}
    codes, from_tie = expected_codes(feeds["y"], feeds["bucket"])
    assert from_tie.min() > 1e-4  # so that each code is decided
    np.testing.assert_array_equal(run(model, feeds)[0], codes)
    assert len(np.unique(codes)) > 20


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (GEGLU.replace("none", "tanh") + QUANTIZE + OPERANDS, "int8[batch,5,4] codes"),
        (
            GEGLU.replace("(values, gelu)", "(gates, gelu)") + QUANTIZE + OPERANDS,
            "int8[batch,5,4] codes",
        ),
        (
            GEGLU
            + QUANTIZE.replace(
                'axis = 2, plugin_namespace = "quest", plugin_version = "1"', "axis = 2"
            )
            + OPERANDS,
            "int8[batch,5,4] codes",
        ),
        (GEGLU + QUANTIZE + OPERANDS, "int8[batch,5,4] codes, float[batch,5,4] x"),
        (
            GEGLU + QUANTIZE + OPERANDS + " more = Neg (values)",
            "int8[batch,5,4] codes, float[batch,5,4] more",
        ),
        (
            "values, gates = Split <axis = -1> (y, three_to_five) gelu = Gelu (gates) x = Neg "
            "(gelu)" + QUANTIZE + OPERANDS,
            "int8[batch,5,4] codes",
        ),
    ],
    ids=[
        "another gelu",
        "gates twice",
        "not the plugin's",
        "x read elsewhere",
        "values read elsewhere",
        "no product",
    ],
)
def test_case_2_anything_else_stays(body: str, outputs: str) -> None:
    model = graph(body.replace("three_to_five", "s_scale"), outputs)
    before = op_counts(model)
    assert not FuseGeglu()(model).modified
    assert op_counts(model) == before


def test_every_geglu_of_a_lowered_unet_is_fused(small_graph: ir.Model) -> None:
    lowered = tensorrt.lower(small_graph, quantize="plugin")
    gates = op_counts(lowered)["Gelu"]
    assert gates > 0
    assert FuseGeglu()(lowered).modified
    counts = op_counts(lowered)
    assert counts["GegluTimestepQuantize"] == gates
    assert "Gelu" not in counts
    onnx.checker.check_model(proto_of(lowered))
