"""Verification of a graph that is lowered for TensorRT's plugin, on onnxruntime, which computes the plugin's op by its definition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest

from exporters.graph_info import load_graph, save_graph
from exporters.lower import tensorrt
from exporters.timestep_quantize import OP_TYPE, function_body
from quest_deploy.engine.base import LOWERED, EngineOptions, Runner, build_engine
from quest_deploy.engine.onnxruntime import OnnxRuntimeBackend
from quest_deploy.verify.verify import verify_engine
from tests.quest_deploy.support import change

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx

DEFINED = "defined"


class _PluginOnTheCpu(OnnxRuntimeBackend):
    """Lowers for the plugin, and gives onnxruntime the op's function in its place."""

    def lower(self, model: ir.Model, options: EngineOptions, *, frozen_bucket: int | None = None) -> ir.Model:
        return tensorrt.lower(model, frozen_bucket=frozen_bucket, quantize="plugin")

    def compile(self, lowered: Path, folder: Path, options: EngineOptions, on_progress: Callable[[str, int, int], None]) -> None:
        model, function = load_graph(lowered), function_body()
        for node in model.graph:
            if node.op_type == OP_TYPE:
                del node.attributes["plugin_namespace"], node.attributes["plugin_version"]
                model.functions[function.identifier()] = function
        (folder / DEFINED).mkdir()
        save_graph(model, folder / DEFINED / LOWERED)

    def open(self, folder: Path, options: EngineOptions) -> Runner:
        return super().open(folder / DEFINED, options)


def verify(proto: onnx.ModelProto, reference: Path, folder: Path, edit: Callable[[ir.Model], None] = lambda model: None) -> list[str]:
    """What verification finds wrong with the graph, ``edit`` applied."""
    backend, options, model = _PluginOnTheCpu(), EngineOptions(threads=1), ir.from_proto(proto)
    edit(model)
    build_engine(backend, model, folder, options, "cd" * 32)
    lowered = load_graph(folder / LOWERED)
    assert sum(node.op_type == OP_TYPE for node in lowered.graph) >= 10
    return verify_engine(backend, options, folder, reference).problems


@pytest.fixture(autouse=True)
def _files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's record holds files; the folder beside them is this test's own."""
    monkeypatch.setattr("quest_deploy.engine.base.sha256_of", lambda path: "ef" * 32)
    monkeypatch.setattr("quest_deploy.engine.base.changed_files", lambda folder, content: [])


def test_a_graph_for_the_plugin_is_verified_layer_by_layer(mini_proto: onnx.ModelProto, mini_reference: Path, tmp_path: Path) -> None:
    assert verify(mini_proto, mini_reference, tmp_path) == []


def test_one_scale_off_by_a_thousandth_is_found_in_a_graph_for_the_plugin(
    mini_proto: onnx.ModelProto, mini_reference: Path, tmp_path: Path
) -> None:
    problems = verify(mini_proto, mini_reference, tmp_path, lambda model: change(model, "conv_out.scale", 1, factor=1.001))
    assert any("conv_out" in problem for problem in problems)
