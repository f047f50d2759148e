"""How far a step of our UNet is from the least that its kernels allow: the time of its
convolutions and linears themselves, and its attention's products at the machine's measured peak.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from exporters.exactness import ATTENTION as PRODUCT
from exporters.exactness import integer_products
from exporters.graph_info import graph_info, load_graph
from exporters.multiplications import multiplications
from quest_deploy.backends.base import LOWERED, engine_options, input_shapes
from quest_deploy.backends.openvino.backend import compile_graph
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.errors import QuestDeployError
from quest_deploy.processes import in_own_process
from scripts.bench.compare_openvino import profile_of
from scripts.bench.image.prepare import BACKEND

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

BATCH, RUNS = 2, 6
LAYERS, ATTENTION = "convolution and linear", "attention"
SIDE = 4096
"""Of the weights of the product that shows the peak, large enough for any kernel."""
_PRODUCT = """
    <ir_version: 10, opset_import: ["": 21]>
    peak (float[{side}, {side}] x) => (float[{side}, {side}] y) {{ {nodes} }}
"""
_INTEGER = """
    scale = Constant <value = float {0.03}> ()
    zero = Constant <value = int8 {0}> ()
    codes = QuantizeLinear (x, scale, zero)
    values = DequantizeLinear (codes, scale, zero)
    weights = DequantizeLinear (w, scale, zero)
    y = MatMul (values, weights)
"""
_FLOAT = "y = MatMul (x, w)"


def limit_of(workspace: Path) -> dict[str, float]:
    """Of the workspace's engine, in a process of its own: "step_s", the median run of a batch of
    two; "layers_s", "attention_s" and "other_s" of it, by openvino's profile of the fastest;
    "peak", multiply-adds a second of one large product in what the attention's products are in;
    "attention_at_peak_s"; and "limit_s", that and the layers' own time.
    """
    found: dict[str, float] = in_own_process(_limit, workspace)
    return found


def _limit(workspace: Path) -> dict[str, float]:
    folder = workspace / "engines" / BACKEND
    options, graph = engine_options(get_backend(BACKEND), folder), load_graph(folder / LOWERED)
    shapes = input_shapes(graph, BATCH)
    products = [x for x in multiplications(graph, shapes) if not x.weights]
    unknown = [x.node for x in products if x.macs is None]
    if unknown:
        raise QuestDeployError(f"the graph does not tell the shapes of {', '.join(unknown)}")
    on_integers = sum(product.kind == PRODUCT for product in integer_products(graph))
    integer = 0 < on_integers == len(graph_info(graph).matmuls)
    generator = np.random.default_rng(0)
    feeds = {
        name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    feeds["timestep"][:] = 500
    del graph
    step, profile = _timed(folder / LOWERED, options, feeds)
    peak = peak_rate(options, integer=integer)
    at_peak = BATCH * sum(each.macs or 0 for each in products) / peak
    layers, attention = profile[LAYERS] / 1e3, profile[ATTENTION] / 1e3
    return {
        "step_s": step,
        "layers_s": layers,
        "attention_s": attention,
        "other_s": sum(profile.values()) / 1e3 - layers - attention,
        "peak": peak,
        "attention_at_peak_s": at_peak,
        "limit_s": layers + at_peak,
    }


def peak_rate(options: EngineOptions, *, integer: bool) -> float:
    """The multiply-adds a second of a large product, of 8-bit integers or in ``options.dtype``."""
    feeds = {"x": np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)}
    with TemporaryDirectory(prefix="quest-deploy-") as folder:
        path = Path(folder) / LOWERED
        onnx.save(product(SIDE, integer=integer), path)
        profile = _timed(path, options, feeds)[1]
    return SIDE**3 / (profile[LAYERS] / 1e3)


def product(side: int, *, integer: bool) -> onnx.ModelProto:
    """A product with constant weights, each [side, side]."""
    generator = np.random.default_rng(0)
    weights: NDArray[Any] = (
        generator.integers(-127, 127, (side, side), np.int8)
        if integer
        else generator.standard_normal((side, side), np.float32)
    )
    nodes = _INTEGER if integer else _FLOAT
    model = onnx.parser.parse_model(_PRODUCT.format(side=side, nodes=nodes))
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    return model


def _timed(
    path: Path, options: EngineOptions, feeds: Mapping[str, NDArray[np.float32]]
) -> tuple[float, dict[str, float]]:
    """The median run in seconds, and the fastest's milliseconds by role, after one to warm up."""
    shapes = tuple((name, value.shape) for name, value in sorted(feeds.items()))
    compiled = compile_graph(path, options, shapes, profile=True)
    request = compiled.create_infer_request()
    request.infer(feeds)
    seconds: list[float] = []
    profile: dict[str, float] = {}
    for _ in range(RUNS):
        started = time.perf_counter()
        request.infer(feeds)
        seconds.append(time.perf_counter() - started)
        if seconds[-1] == min(seconds):
            profile = profile_of(compiled, request)
    return median(seconds), profile
