from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.passes.low_precision_io import LowPrecisionIO
from tests.helpers import graph_from_text, run


def graph() -> ir.Model:
    """Two outputs, one of which is computed from an integer input."""
    model = graph_from_text(
        "g (float[batch,3] sample, float[batch,1] timestep, int64[batch,3] ids) => (float[batch,3] "
        "y, int64[batch,3] z) "
        "{ scaled = Mul (sample, timestep)\n y = Exp (scaled)\n z = Neg (ids) }"
    )
    model.graph.opset_imports.pop("quest.export")
    return model


def test_float_ends_are_half_but_for_those_kept_and_the_rest_computes_as_before() -> None:
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((4, 3)).astype(np.float16)
    feeds = {
        "sample": sample,
        "timestep": np.full((4, 1), 0.1, np.float32),
        "ids": rng.integers(0, 9, (4, 3)),
    }
    expected = run(graph(), {**feeds, "sample": sample.astype(np.float32)})
    model = graph()
    assert LowPrecisionIO({"timestep"})(model).modified
    types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    half, floats, integers = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT64
    assert types == {"sample": half, "timestep": floats, "ids": integers, "y": half, "z": integers}
    found = run(model, feeds)
    assert found[0].dtype == np.float16
    np.testing.assert_array_equal(found[0], expected[0].astype(np.float16))
    np.testing.assert_array_equal(found[1], expected[1])


def test_a_graph_without_float_ends_is_left_alone() -> None:
    model = graph_from_text("g (int64[batch,3] ids) => (int64[batch,3] z) { z = Neg (ids) }")
    assert not LowPrecisionIO(())(model).modified
