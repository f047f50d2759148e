"""One engine that several threads call at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from quest_deploy.backends.base import LOWERED
from quest_deploy.backends.options import CPUS, EngineOptions
from quest_deploy.backends.registry import get_backend

ROWS = WIDTH = 256
CALLS = 60


@pytest.mark.parametrize("backend", CPUS)
def test_each_thread_gets_the_answer_to_its_own_input(backend: str, tmp_path: Path) -> None:
    weight = numpy_helper.from_array(2 * np.eye(WIDTH, dtype=np.float32), "w")
    nodes = [helper.make_node("MatMul", [x, "w"], [y]) for x, y in ("xh", "hy")]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", WIDTH]) for n in "xy")
    graph = helper.make_graph(nodes, "doubled twice", [x], [y], [weight])
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / LOWERED)
    with get_backend(backend).open(tmp_path, EngineOptions(threads=1)) as runner:

        def wrong(value: float) -> int:
            feeds = {"x": np.full((ROWS, WIDTH), value, np.float32)}
            return sum((runner.infer(feeds)["y"] != 4 * value).any() for _ in range(CALLS))

        with ThreadPoolExecutor() as threads:
            assert sum(threads.map(wrong, (1.0, 2.0, 3.0))) == 0
