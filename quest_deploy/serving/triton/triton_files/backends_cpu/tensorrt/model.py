"""A stand-in for Triton's TensorRT backend on a machine without a GPU: it runs the same repository
from its ONNX files.

A python-based backend: serves every model whose platform is tensorrt_plan with onnxruntime, from
the ``model.onnx`` beside the plan. On the CPU onnxruntime takes any batch without compiling for it,
and each row's result does not depend on what else is in the batch. Needs numpy and onnxruntime.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

TOLERANCE = 1e-5
"""Of the probe's sums, relative to the largest; what saturates is off by percents."""


class TritonPythonModel:
    """See Triton's python backend for what calls it."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """The configuration says all."""
        return config

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph. The parameter ``cpu_threads`` of the configuration is how many threads it
        runs on; 0 means all.
        """
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        threads = int(config["parameters"].get("cpu_threads", {}).get("string_value", 0))
        _check_processor(folder)
        self._session = _session(folder / "model.onnx", threads)
        self._inputs = {
            value.name: (value.type, len(value.shape)) for value in self._session.get_inputs()
        }
        self._outputs = {
            entry["name"]: pb_utils.triton_string_to_numpy(entry["data_type"])
            for entry in config["output"]
        }

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the requests that the dynamic batcher put together as one batch."""
        given = [
            {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            for request in requests
        ]
        rows = [len(next(iter(inputs.values()))) for inputs in given]
        feeds = {
            name: self._cast(name, np.concatenate([inputs[name] for inputs in given]))
            for name in self._inputs
        }
        try:
            results = self._session.run(list(self._outputs), feeds)
        except Exception as e:  # onnxruntime's exceptions share no base class but this one
            if len(requests) > 1:  # one of them is to blame: the others are to have their results
                return [self.execute([request])[0] for request in requests]
            error = pb_utils.TritonError(f"onnxruntime failed: {e}")
            return [pb_utils.InferenceResponse(error=error)]
        ends = np.cumsum(rows)[:-1]
        parts = [
            np.split(result.astype(kind), ends)
            for result, kind in zip(results, self._outputs.values())  # noqa: B905
        ]
        return [
            pb_utils.InferenceResponse(
                output_tensors=[
                    pb_utils.Tensor(name, np.ascontiguousarray(part)) for name, part in row
                ]
            )
            for row in (list(zip(self._outputs, row_parts)) for row_parts in zip(*parts))  # noqa: B905
        ]

    def _cast(self, name: str, value: np.ndarray) -> np.ndarray:
        """The value in the graph's own type and rank: a configuration may say low precision, and
        [B, 1] for [B].
        """
        kind, rank = self._inputs[name]
        value = value.reshape(len(value), *value.shape[1:rank]) if value.ndim > rank else value
        return value.astype({"tensor(float)": np.float32, "tensor(int32)": np.int32}[kind])


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """As `quest-deploy` opens it: no float activation is quantized unasked, and no operand's type
    is changed.
    """
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    settings.add_session_config_entry("session.qdqisint8allowed", "1")
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def _check_processor(folder: Path) -> None:
    """Refuse a model whose integer products saturate on this processor; models without quantized
    products have no probe beside them.
    """
    probe = folder / "probe.onnx"
    if not probe.is_file():
        return
    with np.load(folder / "probe.npz", allow_pickle=False) as arrays:
        feeds, exact = (
            {key.removeprefix(part): arrays[key] for key in arrays if key.startswith(part)}
            for part in ("feed.", "exact.")
        )
    session = _session(probe, 1)
    for rows in (None, 1):  # a single row may have kernels of its own
        outputs = session.run(list(exact), {name: x[:rows] for name, x in feeds.items()})
        for y, e in zip(outputs, exact.values()):  # noqa: B905
            if np.abs(y - e[:rows]).max() > TOLERANCE * np.abs(e).max():
                raise pb_utils.TritonModelException(
                    "this package was made for another processor: 8-bit products saturate on this "
                    "one, and its images would be wrong; make it here with "
                    "`quest-deploy package --triton`, or anywhere with --processor any"
                )
