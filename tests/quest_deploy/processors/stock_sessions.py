"""Run in a process of its own, on whatever processor it sees: opens portable graphs of every kind
of product in stock sessions.

onnxruntime with all its optimizations, and OpenVINO as it comes, but for bf16, which it would take
unasked where the processor has it. OpenVINO reads no graph with local functions, so onnx's own
inliner goes before. Prints the largest relative error of each session's outputs as JSON, by graph
and runtime.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import onnx.inliner
import onnx_ir as ir
import onnxruntime as ort
import openvino

from exporters.exactness import LEVELS
from exporters.graph_info import save_graph
from exporters.probe import make_probe
from tests.helpers import (
    Array,
    Feeds,
    kinds_checkpoint,
    kinds_expected,
    kinds_feeds,
    kinds_graph,
    relative_error,
)


def stock_errors(model: ir.Model, feeds: Feeds, expected: dict[str, Array]) -> dict[str, float]:
    """By runtime, the largest relative error of any output."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unet.onnx"
        save_graph(model, path)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        found = {"onnxruntime": dict(zip(names, session.run(names, feeds), strict=True))}
        inlined = onnx.inliner.inline_local_functions(ir.to_proto(model))
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(inlined.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        results = compiled(feeds)
        found["openvino"] = {
            name: results[output] for output in compiled.outputs for name in output.get_names()
        }
    return {
        runtime: max(
            relative_error(np.asarray(outputs[name]), exact)
            for name, exact in expected.items()
            if name in outputs
        )
        for runtime, outputs in found.items()
    }


def main() -> dict[str, float]:
    """The errors, by graph and runtime."""
    probe = make_probe(LEVELS[0])
    graphs = {"worst-case codes": (probe.model, probe.feeds, probe.exact)}
    checkpoint, feeds = kinds_checkpoint(), kinds_feeds([999.0, 0.0, 500.0, 499.0])
    graphs["free, asymmetric and offset codes"] = (
        kinds_graph(checkpoint),
        feeds,
        kinds_expected(checkpoint, feeds),
    )
    return {
        f"{name}, {runtime}": e
        for name, graph in graphs.items()
        for runtime, e in stock_errors(*graph).items()
    }


if __name__ == "__main__":
    print(json.dumps(main()))
