from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.passes.conv_to_matmul import ConvToMatMul
from quest_deploy.artifacts.checkpoint import pack_4bit
from tests.helpers import Array, graph_from_text, op_counts, proto_of, run

TEXT = """
g (uint8[batch,4,height,width] codes) => (float[batch,6,h,w] y)
<float one = {{1.0}}, uint8 middle = {{128}}>
{{
  x = DequantizeLinear(codes, one, middle)
  weight = DequantizeLinear <axis = 0> (w, ws, wz)
  y = Conv <{attributes}> (x, weight)
}}
"""


def convolution(
    attributes: str,
    kernel: tuple[int, int],
    *,
    groups: int = 1,
    dtype: ir.DataType = ir.DataType.INT4,
) -> ir.Model:
    """A convolution of 4 channels to 6 on unsigned codes; asymmetric weights have zero-points."""
    rng = np.random.default_rng(0)
    # No larger INT8 ones: an optimized session may saturate on a processor without VNNI.
    low, high = {"INT4": (-8, 8), "UINT4": (0, 16), "INT8": (-64, 65), "UINT8": (0, 256)}[
        dtype.name
    ]
    codes = rng.integers(low, high, (6, 4 // groups, *kernel))
    zero = rng.integers(0, high, 6) if low == 0 else np.zeros(6, int)
    carrier = np.uint8 if low == 0 else np.int8
    arrays = {"w": codes.astype(carrier), "wz": zero.astype(carrier)}
    model = graph_from_text(
        TEXT.format(attributes=attributes),
        **arrays,
        ws=rng.uniform(0.01, 0.1, 6).astype(np.float32),
    )
    for name, array in arrays.items() if high in (8, 16) else ():
        value = model.graph.initializers[name]
        value.const_value, value.dtype = (
            ir.PackedTensor(pack_4bit(array), dtype, shape=array.shape, name=name),
            dtype,
        )
    return model


def codes(height: int, width: int) -> Array:
    return np.random.default_rng(1).integers(0, 256, (3, 4, height, width), dtype=np.uint8)


def assert_same(
    model: ir.Model, sizes: list[tuple[int, int]], change: Callable[[ir.Model], object]
) -> None:
    before = [run(model, {"codes": codes(*size)})[0] for size in sizes]
    change(model)
    onnx.checker.check_model(proto_of(model), full_check=True)
    for size, expected in zip(sizes, before, strict=True):
        (found,) = run(model, {"codes": codes(*size)})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        (optimized,) = run(model, {"codes": codes(*size)}, optimized=True)
        np.testing.assert_allclose(optimized, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_case_1_a_1x1_convolution_is_a_product_with_the_channels_last() -> None:
    model = convolution("kernel_shape = [1, 1]", (1, 1))
    assert_same(model, [(5, 7), (1, 1)], ConvToMatMul())
    assert op_counts(model) == {"Transpose": 2, "DequantizeLinear": 2, "MatMul": 1}


@pytest.mark.parametrize(
    "dtype", [ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8]
)
def test_case_2_a_larger_one_is_a_product_of_its_taps_and_weights_keep_their_type(
    dtype: ir.DataType,
) -> None:
    model = convolution("kernel_shape = [3, 2]", (3, 2), dtype=dtype)
    assert_same(model, [(5, 7), (3, 2)], ConvToMatMul())
    counts = op_counts(model)
    assert (counts["Slice"], counts["Concat"], "Conv" in counts, "Pad" in counts) == (
        6,
        1,
        False,
        False,
    )
    weight = model.graph.initializers["w_of_matmul"]
    assert (weight.dtype, list(weight.shape or [])) == (dtype, [24, 6])
    assert "w" not in model.graph.initializers


@pytest.mark.parametrize("pads", ["1, 1, 1, 1", "0, 2, 1, 0"])
def test_case_3_padding_is_code_0(pads: str) -> None:
    assert_same(
        convolution(f"kernel_shape = [3, 3], pads = [{pads}]", (3, 3)),
        [(5, 7), (4, 4)],
        ConvToMatMul(),
    )


@pytest.mark.parametrize(
    "attributes",
    [
        "strides = [2, 2]",
        "strides = [2, 1], dilations = [1, 2]",
        "dilations = [2, 2], strides = [1, 3]",
    ],
)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (1, 3)])
def test_case_4_strides_and_dilations_are_those_of_the_slices(
    attributes: str, kernel: tuple[int, int]
) -> None:
    shape = f"kernel_shape = [{kernel[0]}, {kernel[1]}], pads = [1, 1, 1, 1], {attributes}"
    assert_same(convolution(shape, kernel), [(6, 7), (9, 8)], ConvToMatMul())


def test_case_5_a_grouped_convolution_and_a_float_one_are_left_alone() -> None:
    grouped = convolution("kernel_shape = [3, 3], group = 2", (3, 3), groups=2)
    assert not ConvToMatMul()(grouped).modified
    assert op_counts(grouped)["Conv"] == 1
    text = "g (float[1,2,3,3] x, float[2,2,1,1] w) => (float[1,2,3,3] y) { y = Conv(x, w) }"
    assert not ConvToMatMul()(graph_from_text(text)).modified


def test_the_product_has_the_name_that_the_convolution_had() -> None:
    model = convolution("kernel_shape = [3, 3]", (3, 3))
    (conv,) = [node for node in model.graph if node.op_type == "Conv"]
    conv.name, conv.outputs[0].name = "layer.product", "layer.product"
    model.graph.outputs[0] = conv.outputs[0]
    identity = ir.Node(
        "", "Identity", [conv.outputs[0]], outputs=[ir.Value(name="y", type=conv.outputs[0].type)]
    )
    model.graph.append(identity)
    model.graph.outputs[0] = identity.outputs[0]
    ConvToMatMul()(model)
    (product,) = [node for node in model.graph if node.op_type == "MatMul"]
    assert (product.name, product.outputs[0].name) == ("layer.product", "layer.product")
