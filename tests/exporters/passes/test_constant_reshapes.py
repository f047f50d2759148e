from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.editor import array_of
from exporters.passes.constant_reshapes import ConstantReshapes
from tests.helpers import graph_from_text, proto_of, run

X = np.random.default_rng(0).random((2, 3, 8)).astype(np.float32)


def reshaping(sizes: str, target: str, *, other: str = "batch,tokens,8") -> ir.Model:
    """y = Reshape(x, target), from ``sizes``, nodes that make sizes of x or of ``other``."""
    return graph_from_text(
        f"""g (float[batch,tokens,8] x, float[{other}] other) => (float[a,b,c,d] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] four = {{4}}, int64[1] rest = {{-1}}> {{
            {sizes}
            target = Concat <axis = 0> ({target})
            y = Reshape <allowzero = 1> (x, target)
        }}"""
    )


@pytest.mark.parametrize(
    ("sizes", "target", "constant"),
    [
        ("s = Shape (x) \n kept = Slice (s, zero, two)", "kept, four, rest", [0, 0, 4, -1]),
        (
            "s = Shape (x) \n kept = Slice (s, zero, two, zero, one)",
            "kept, rest, two",
            [0, 0, -1, 2],
        ),
        ("kept = Shape <start = 0, end = 2> (x)", "kept, four, two", [0, 0, 4, 2]),
        (
            "b = Shape <end = 1> (x) \n n = Shape <start = 1, end = 2> (x)",
            "b, n, four, two",
            [0, 0, 4, 2],
        ),
        ("b = Shape <end = 1> (other)", "b, rest, four, two", [0, -1, 4, 2]),
    ],
)
def test_axes_that_are_kept_become_zeros_of_a_constant_target(
    sizes: str, target: str, constant: list[int]
) -> None:
    model = reshaping(sizes, target)
    (before,) = run(model, {"x": X, "other": X})
    assert ConstantReshapes()(model).modified
    (reshape,) = (node for node in model.graph if node.op_type == "Reshape")
    assert reshape.inputs[1] is not None
    assert array_of(reshape.inputs[1]).tolist() == constant
    onnx.checker.check_model(proto_of(model), full_check=True)
    np.testing.assert_array_equal(run(model, {"x": X, "other": X})[0], before)


@pytest.mark.parametrize(
    ("sizes", "target", "other"),
    [
        (
            "n = Shape <start = 1, end = 2> (x)",
            "n, rest, four, two",
            "batch,tokens,8",
        ),  # the size moves
        (
            "b = Shape <end = 1> (other)",
            "b, rest, four, two",
            "others,tokens,8",
        ),  # another tensor's, of another size
        (
            "b = Shape <end = 1> (x) \n n = Add (b, one)",
            "n, rest, four, one",
            "batch,tokens,8",
        ),  # computed
        (
            "b = Shape <end = 1> (x) \n s = Shape (x) \n n = Slice (s, one, two, zero, two)",
            "b, n, four, two",
            "batch,tokens,8",
        ),  # strided
        (
            "b = Shape <end = 1> (x)",
            "b, zero, four, two",
            "batch,tokens,8",
        ),  # with allowzero, an empty axis
    ],
)
def test_sizes_that_move_or_belong_to_another_tensor_stay(
    sizes: str, target: str, other: str
) -> None:
    assert not ConstantReshapes()(reshaping(sizes, target, other=other)).modified
