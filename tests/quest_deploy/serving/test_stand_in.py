"""The stand-in for Triton's TensorRT backend, called as Triton calls it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from tests.quest_deploy.processors.packages import stand_in


class Tensor:
    """Triton's."""

    def __init__(self, name: str, value: np.ndarray) -> None:
        self.name, self.as_numpy = lambda: name, lambda: value


def response(output_tensors: Any = (), error: str = "") -> SimpleNamespace:
    """Triton's InferenceResponse."""
    return SimpleNamespace(outputs=[x.as_numpy() for x in output_tensors], error=error)


def test_a_request_that_fails_leaves_the_others_of_its_batch_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = stand_in()
    monkeypatch.setattr(
        module,
        "pb_utils",
        SimpleNamespace(
            Tensor=Tensor,
            InferenceResponse=response,
            TritonError=str,
            triton_string_to_numpy=lambda kind: np.float32,
        ),
    )
    text = """<ir_version: 10, opset_import: ["" : 21]>
        words (int32[batch,2] ids) => (float[batch,2] states)
        <float[4] table = {0, 10, 20, 30}> { states = Gather (table, ids) }"""
    (tmp_path / "1").mkdir()
    onnx.save(onnx.parser.parse_model(text), tmp_path / "1" / "model.onnx")
    output = {"name": "states", "data_type": "TYPE_FP32"}
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps({"parameters": {}, "output": [output]}),
            "model_repository": str(tmp_path),
            "model_version": "1",
        }
    )
    batch = [[[0, 1]], [[2, 99]], [[3, 3], [1, 0]]]
    requests = [
        SimpleNamespace(inputs=lambda ids=ids: [Tensor("ids", np.asarray(ids, np.int32))])
        for ids in batch
    ]
    first, bad, last = model.execute(requests)
    assert first.outputs[0].tolist() == [[0, 10]]
    assert last.outputs[0].tolist() == [[30, 30], [10, 0]]
    assert (bad.outputs, bool(bad.error)) == ([], True)
    assert not first.error
    assert not last.error
