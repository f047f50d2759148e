from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from exporters.editor import array_of
from exporters.passes.compress_weights import CompressWeights
from tests.helpers import graph_from_text, op_counts, run

RNG = np.random.default_rng(0)
WIDE = RNG.standard_normal((64, 32)).astype(np.float32) * np.logspace(-2, 1, 32, dtype=np.float32)
KERNEL = RNG.standard_normal((32, 16, 3, 3)).astype(np.float32)
X = RNG.standard_normal((3, 64)).astype(np.float32)
CASES = {
    "MatMul": ("y = MatMul (x, w)", X, WIDE, 1),
    "Gemm": ("y = Gemm (x, w)", X, WIDE, 1),
    "transposed Gemm": ("y = Gemm <transB = 1> (x, w)", X, WIDE.T.copy(), 0),
    "Conv": ("y = Conv (x, w)", RNG.standard_normal((1, 16, 5, 5)).astype(np.float32), KERNEL, 0),
    "Gather": ("y = Gather (w, x)", np.asarray([[5, 0, 63]], np.int64), WIDE, 0),
}


def graph(body: str, x: np.ndarray, w: np.ndarray) -> ir.Model:
    kind = "int64" if x.dtype == np.int64 else "float"
    dims = ",".join(map(str, x.shape))
    return graph_from_text(f"g ({kind}[{dims}] x) => (float[a,b,c,d] y) {{ {body} }}", w=w)


def of_matmul() -> ir.Model:
    """A graph with a weight to compress."""
    return graph(*CASES["MatMul"][:3])


@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_stored_with_a_scale_for_each_output_and_read_as_it_was(name: str) -> None:
    body, x, weight, axis = CASES[name]
    model = graph(body, x, weight)
    (expected,) = run(model, {"x": x})
    assert CompressWeights()(model).modified
    codes, scale = (array_of(model.graph.initializers[f"w.{kind}"]) for kind in ("codes", "scale"))
    assert (codes.dtype, scale.shape) == (np.int8, (weight.shape[axis],))
    others = tuple(i for i in range(weight.ndim) if i != axis)
    assert (np.abs(codes).max(axis=others) == 127).all()
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    assert (np.abs(codes * scale.reshape(shape) - weight) <= scale.reshape(shape) * 0.5001).all()
    (found,) = run(model, {"x": x})
    assert 0 < np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("least", [0, 1e-45], ids=["zeros", "least subnormal numbers"])
def test_a_channel_of_next_to_nothing_stays_finite(least: float) -> None:
    weight = WIDE.copy()
    weight[:, 3] = least
    model = graph("y = MatMul (x, w)", X, weight)
    CompressWeights()(model)
    (found,) = run(model, {"x": X})
    assert np.isfinite(found).all()
    assert np.abs(found[:, 3]).max() <= 64 * np.abs(X).max() * least


@pytest.mark.parametrize(
    ("body", "weight"),
    [
        ("y = MatMul (x, w)", WIDE[:, :8].copy()),
        ("y = Mul (x, w)", np.ones((16, 3, 64), np.float32)),
        ("z = Gather (w, i)  y = MatMul (x, w)", WIDE),
        ("y = Gather (w, i)", np.ones(2048, np.float32)),
    ],
    ids=["small", "no weight", "two axes", "a number a row"],
)
def test_what_is_no_large_weight_of_one_axis_stays(body: str, weight: np.ndarray) -> None:
    text = f"g (float[3,64] x, int64[2] i) => (float[a,b] y) {{ {body} }}"
    model = graph_from_text(text, w=weight)
    assert not CompressWeights()(model).modified
    assert "DequantizeLinear" not in op_counts(model)
