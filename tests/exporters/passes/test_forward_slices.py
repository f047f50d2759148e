from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.passes.forward_slices import ForwardSlices
from tests.helpers import graph_from_text, op_counts, proto_of, run

LAST = 2**63 - 1
"""What torch exports as the end of x[:, n:]."""


def sliced(
    start: int, end: int, axis: int = 1, step: int = 1, *, concatenated: int = 1
) -> ir.Model:
    """A slice of the concatenation of a [.., 3, ..] and b [.., 5, ..]."""
    a, b = ("3,4", "5,4") if concatenated == 1 else ("4,3", "4,5")
    model = graph_from_text(
        f"g (float[batch,{a}] a, float[batch,{b}] b) => (float y) {{\n"
        f"joined = Concat <axis = {concatenated}> (a, b)\n part = Slice (joined, starts, ends, "
        "axes, steps)\n y = ReduceSum (part) }",
        starts=np.asarray([start]),
        ends=np.asarray([end]),
        axes=np.asarray([axis]),
        steps=np.asarray([step]),
    )
    model.graph.opset_imports.pop("quest.export")
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto_of(model)))


@pytest.mark.parametrize(("start", "end", "part"), [(0, 3, "a"), (3, 8, "b"), (3, LAST, "b")])
def test_a_slice_that_is_one_part_is_gone_and_its_reader_reads_the_part(
    start: int, end: int, part: str
) -> None:
    model = sliced(start, end)
    feeds = {
        name: np.random.default_rng(0).standard_normal((2, size, 4)).astype(np.float32)
        for name, size in (("a", 3), ("b", 5))
    }
    expected = run(model, feeds)[0]
    assert ForwardSlices()(model).modified
    assert "Slice" not in op_counts(model)
    (reader,) = [node for node in model.graph if node.op_type == "ReduceSum"]
    assert reader.inputs[0].name == part
    np.testing.assert_array_equal(run(model, feeds)[0], expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sliced(0, 2),
        lambda: sliced(2, 8),
        lambda: sliced(0, 8),
        lambda: sliced(0, 3, step=2),
        lambda: sliced(0, 4, axis=2),
        lambda: sliced(0, 4, axis=1, concatenated=2),
    ],
    ids=[
        "less than a part",
        "across the seam",
        "everything",
        "every second",
        "along another axis",
        "of another concatenation",
    ],
)
def test_any_other_slice_stays(make: object) -> None:
    model = make()  # type: ignore[operator]
    assert not ForwardSlices()(model).modified
    assert op_counts(model)["Slice"] == 1


def test_a_slice_of_something_else_stays() -> None:
    model = graph_from_text(
        "g (float[batch,8] x) => (float[batch,3] y) { y = Slice (x, starts, ends, axes) }",
        starts=np.asarray([0]),
        ends=np.asarray([3]),
        axes=np.asarray([1]),
    )
    assert not ForwardSlices()(model).modified
