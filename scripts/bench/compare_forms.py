"""Compare the forms that one product of 8-bit codes may take, on a CPU's runtime, beside FP32: the
tables of docs/processors.md.

    python -m scripts.bench.compare_forms [--backend openvino] [--backend onnxruntime] [--runs 15]
    [--json FILE]

The products are of Stable Diffusion 1.5, batch 2, their activations quantized in the graph as the
lowerings write it. One session a form, their runs alternating in this process on one thread;
seconds are the process's own, so that other work beside it counts little.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from onnx import TensorProto, helper, numpy_helper, save

from exporters.passes.conv_to_matmul import TO_FIRST, TO_LAST
from quest_deploy.backends.base import processor_name
from quest_deploy.backends.exactness import measured
from quest_deploy.backends.onnxruntime import open_session
from quest_deploy.backends.openvino.backend import compile_graph
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from onnx import ModelProto

    Array = NDArray[Any]

WARMUP = 2


class Form(StrEnum):
    """How the weights, or attention's second operand, are stored."""

    FP32 = "fp32"
    """Neither operand is quantized."""
    INT8 = "int8"
    """Signed codes: the fastest kernels, which may saturate without VNNI."""
    UINT8 = "uint8"
    """Codes plus 128, with that zero-point."""
    HALVES = "halves"
    """Two signed tensors of seven bits whose sum the weights are, joined along the channels that
    are summed.
    """
    POINTWISE = "1x1 convolution"
    """A linear as a convolution over the tokens, of signed codes (see LinearToConv)."""


class Kind(StrEnum):
    CONVOLUTION = "convolution"
    LINEAR = "linear"
    ATTENTION = "attention"


FORMS = {
    Kind.CONVOLUTION: (Form.FP32, Form.INT8, Form.UINT8, Form.HALVES),
    Kind.LINEAR: (Form.FP32, Form.INT8, Form.UINT8, Form.HALVES, Form.POINTWISE),
    Kind.ATTENTION: (Form.FP32, Form.INT8, Form.UINT8),
}


@dataclass(frozen=True)
class Product:
    """One product of the model.

    Attributes:
        shape: of the activation: [B, C, H, W], [B, tokens, C], or [B·heads, tokens, d].
        outputs: output channels; for attention the columns of the second operand.
        kernel_size: of a convolution.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    outputs: int
    kernel_size: int = 1

    def weights_shape(self) -> tuple[int, ...]:
        if self.kind is Kind.CONVOLUTION:
            return (self.outputs, self.shape[1], self.kernel_size, self.kernel_size)
        leading = self.shape[:1] if self.kind is Kind.ATTENTION else ()
        return (*leading, self.shape[-1], self.outputs)


PRODUCTS = (
    Product("first convolution, 4 to 320", Kind.CONVOLUTION, (2, 4, 64, 64), 320, 3),
    Product("last convolution, 320 to 4", Kind.CONVOLUTION, (2, 320, 64, 64), 4, 3),
    Product("3x3, 320 to 320, 64x64", Kind.CONVOLUTION, (2, 320, 64, 64), 320, 3),
    Product("3x3, 1280 to 1280, 16x16", Kind.CONVOLUTION, (2, 1280, 16, 16), 1280, 3),
    Product("1x1, 640 to 640, 32x32", Kind.CONVOLUTION, (2, 640, 32, 32), 640),
    Product("linear, 320 to 320, 4096 tokens", Kind.LINEAR, (2, 4096, 320), 320),
    Product("linear, 640 to 5120, 1024 tokens", Kind.LINEAR, (2, 1024, 640), 5120),
    Product("linear, 1280 to 1280, 256 tokens", Kind.LINEAR, (2, 256, 1280), 1280),
    Product("attention, 8 heads of 80, 1024 tokens", Kind.ATTENTION, (16, 1024, 80), 1024),
)


class _Graph:
    """Collects one product's nodes and constants."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: Array | np.generic) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def codes(self, x: str, zero_point: Array) -> str:
        """``x`` quantized as the lowerings write it: divided, rounded to even, clipped, stored."""
        divided = self.op("Div", [x, self.constant(f"{x}.scale", np.float32(0.37))], f"{x}.divided")
        low, high = (
            self.constant(f"{x}.low", np.float32(-127)),
            self.constant(f"{x}.high", np.float32(127)),
        )
        clipped = self.op(
            "Min",
            [
                self.op("Max", [self.op("Round", [divided], f"{x}.rounded"), low], f"{x}.raised"),
                high,
            ],
            f"{x}.clipped",
        )
        zero = self.constant(f"{x}.zero", zero_point)
        return self.op(
            "QuantizeLinear",
            [clipped, self.constant(f"{x}.one", np.float32(1)), zero],
            f"{x}.codes",
        )

    def dequantized(self, codes: str, x: str) -> str:
        return self.op("DequantizeLinear", [codes, f"{x}.one", f"{x}.zero"], f"{x}.dequantized")


def graph_of(product: Product, form: Form, weights: Array, activation_zero: Array) -> ModelProto:
    """The product's graph in ``form``; ``weights`` are INT8 codes of :meth:`Product.weights_shape`,
    each with the scale 0.01.
    """
    graph, inputs = _Graph(), {"x": product.shape}
    if product.kind is Kind.ATTENTION:
        inputs["y"] = weights.shape
        result = _attention(graph, form, activation_zero)
    else:
        result = _layer(graph, product, form, weights, activation_zero)
    graph.op("Mul", [result, graph.constant("out_scale", np.float32(0.37))], "out")
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in inputs.items()
    ]
    made = helper.make_graph(
        graph.nodes,
        product.name,
        values,
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        graph.constants,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _attention(graph: _Graph, form: Form, activation_zero: Array) -> str:
    if form is Form.FP32:
        return graph.op("MatMul", ["x", "y"], "product")
    second_zero = np.uint8(128) if form is Form.UINT8 else np.int8(0)
    first = graph.dequantized(graph.codes("x", activation_zero), "x")
    return graph.op(
        "MatMul",
        [first, graph.dequantized(graph.codes("y", np.asarray(second_zero)), "y")],
        "product",
    )


def _layer(
    graph: _Graph, product: Product, form: Form, weights: Array, activation_zero: Array
) -> str:
    convolution = product.kind is Kind.CONVOLUTION
    summed, scales = 1 if convolution else 0, np.full(product.outputs, 0.01, np.float32)
    if form is Form.FP32:
        shape = (-1, 1, 1, 1) if convolution else (-1,)
        return _product(
            graph,
            convolution,
            "x",
            graph.constant("weights", weights.astype(np.float32) * scales.reshape(shape)),
            weights,
        )
    codes = graph.codes("x", activation_zero)
    if form is Form.HALVES:
        lower = np.floor_divide(weights, 2)
        weights = np.concatenate([lower, weights - lower], summed)
        codes = graph.op("Concat", [codes, codes], "x.twice", axis=1 if convolution else 2)
    dequantized_codes, pointwise = graph.dequantized(codes, "x"), form is Form.POINTWISE
    if pointwise:
        weights = np.ascontiguousarray(weights.T[:, :, None, None])
        row = graph.constant("row", np.asarray([1]))
        image = graph.op("Unsqueeze", [dequantized_codes, row], "x.image")
        dequantized_codes = graph.op("Transpose", [image], "x.channels_first", perm=TO_FIRST)
    stored = (weights.astype(np.int16) + 128).astype(np.uint8) if form is Form.UINT8 else weights
    zeros = np.full(product.outputs, 128 if form is Form.UINT8 else 0, stored.dtype)
    names = [
        graph.constant("weights", stored),
        graph.constant("weights.scale", scales),
        graph.constant("weights.zero", zeros),
    ]
    dequantized = graph.op(
        "DequantizeLinear", names, "weights.dequantized", axis=0 if convolution or pointwise else 1
    )
    result = _product(graph, convolution or pointwise, dequantized_codes, dequantized, weights)
    if pointwise:
        image = graph.op("Transpose", [result], "channels_last", perm=TO_LAST)
        return graph.op("Squeeze", [image, row], "tokens")
    return result


def _product(graph: _Graph, convolution: bool, x: str, weights: str, codes: Array) -> str:
    if not convolution:
        return graph.op("MatMul", [x, weights], "product")
    return graph.op(
        "Conv",
        [x, weights],
        "product",
        kernel_shape=codes.shape[2:],
        pads=[codes.shape[2] // 2] * 4,
    )


def openvino_session(path: Path) -> Callable[[dict[str, Array]], Array]:
    request = compile_graph(path, EngineOptions(threads=1)).create_infer_request()

    def run(feeds: dict[str, Array]) -> Array:
        request.infer(feeds)
        return np.asarray(request.get_output_tensor(0).data)

    return run


def onnxruntime_session(path: Path) -> Callable[[dict[str, Array]], Array]:

    opened = open_session(path, EngineOptions(threads=1))
    return lambda feeds: np.asarray(opened.run(None, feeds)[0])


SESSIONS = {"openvino": openvino_session, "onnxruntime": onnxruntime_session}
ACTIVATION_ZEROS = {"openvino": np.asarray(0, np.int8), "onnxruntime": np.asarray(128, np.uint8)}
"""As each backend's lowering quantizes activations."""


@dataclass(frozen=True)
class Row:
    """One form of one product.

    Attributes:
        seconds: the median run, of the process's own time. speedup: of FP32's median over it.
        error: the largest error over the largest exact result, both without the quantizers'
            rounding: saturation shows here.
    """

    backend: str
    product: str
    form: str
    seconds: float
    speedup: float
    error: float


def compare(product: Product, backend: str, runs: int, seed: int = 0) -> list[Row]:
    """Time the product in every form of its kind, in turn."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(-127, 128, product.weights_shape()).astype(np.int8)
    # Codes times the scale, so that nothing is rounded and every form has the same exact result.
    feeds = {"x": (rng.integers(-127, 128, product.shape) * np.float32(0.37)).astype(np.float32)}
    if product.kind is Kind.ATTENTION:
        feeds["y"] = (weights * np.float32(0.37)).astype(np.float32)
    seconds: dict[Form, list[float]] = {form: [] for form in FORMS[product.kind]}
    outputs: dict[Form, Array] = {}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for form in seconds:
            path = Path(folder) / f"{form.name}.onnx"
            save(graph_of(product, form, weights, ACTIVATION_ZEROS[backend]), path)
            sessions[form] = SESSIONS[backend](path)
        for run in range(WARMUP + runs):
            for form, session in sessions.items():
                started = time.process_time()
                output = session(feeds)
                if run >= WARMUP:
                    seconds[form].append(time.process_time() - started)
                outputs[form] = output.copy() if run == 0 else outputs[form]
    # FP32 multiplies the scaled activations, the other forms their codes: 0.37, or its square in
    # attention, is all that differs.
    scale = np.float32(0.37**2 if product.kind is Kind.ATTENTION else 0.37)
    exact = outputs.pop(Form.FP32) / scale
    errors = {Form.FP32: 0.0} | {
        form: float(np.abs(output - exact).max() / np.abs(exact).max())
        for form, output in outputs.items()
    }
    fp32 = median(seconds[Form.FP32])
    return [
        Row(backend, product.name, form, median(s), fp32 / median(s), errors[form])
        for form, s in seconds.items()
    ]


def main(
    backend: Annotated[
        list[str], typer.Option(help="openvino or onnxruntime; may be given twice.")
    ] = ["openvino", "onnxruntime"],  # noqa: B006 - typer's way
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each form.")] = 15,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Time every product and print a table for each backend."""
    rows: list[Row] = []
    answers = {name: measured(get_backend(name)) for name in backend}
    print(
        f"{processor_name()}, one thread, {runs} runs; medians against FP32 in the same run",
        flush=True,
    )
    for name in backend:
        # Convolutions become matrix products in onnxruntime's lowering.
        for product in (
            p for p in PRODUCTS if name == "openvino" or p.kind is not Kind.CONVOLUTION
        ):
            product_rows = compare(product, name, runs)
            rows += product_rows
            forms = ", ".join(
                f"{row.form} {row.speedup:.2f}x{_wrong(row)}" for row in product_rows[1:]
            )
            print(f"{name}  {product.name}: {forms}", flush=True)
            gc.collect()
    if json_file:
        result = {
            "processor": processor_name(),
            "runs": runs,
            "exact": {name: dict(answer.levels) for name, answer in answers.items()},
        }
        json_file.write_text(
            json.dumps(result | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


def _wrong(row: Row) -> str:
    return f" ({row.error:.0%} off)" if row.error > 1e-4 else ""


if __name__ == "__main__":
    typer.run(main)
