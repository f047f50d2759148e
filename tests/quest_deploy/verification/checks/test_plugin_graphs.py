"""Verification of a graph that is lowered for TensorRT's plugin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from exporters.graph_info import load_graph
from quest_deploy.backends.base import LOWERED, build_engine
from quest_deploy.backends.options import EngineOptions
from quest_deploy.verification.checks import verify_engine
from tests.quest_deploy.plugin_backend import PluginOnTheCpu, kept
from tests.quest_deploy.support import change

each_way = pytest.mark.parametrize("quantize", ["plugin", "gathered"])


def verify(
    quantize: str,
    proto: onnx.ModelProto,
    reference: Path,
    folder: Path,
    edit: Callable[[ir.Model], None] = lambda model: None,
) -> list[str]:
    """What verification finds wrong with the graph, ``edit`` applied."""
    options, model = EngineOptions(threads=1, quantize=quantize), ir.from_proto(proto)
    edit(model)
    build_engine(PluginOnTheCpu(), model, folder, options, "cd" * 32)
    lowered = load_graph(folder / LOWERED)
    gathered = [
        node
        for node in lowered.graph
        if node.op_type == "QuantizeLinear" and node.inputs[1].const_value is None
    ]
    assert len(kept(lowered) if quantize == "plugin" else gathered) >= 10
    return verify_engine(PluginOnTheCpu(), options, folder, reference).problems


@each_way
def test_a_graph_that_another_than_the_native_lowering_made_is_verified_layer_by_layer(
    quantize: str, mini_proto: onnx.ModelProto, mini_reference: Path, tmp_path: Path
) -> None:
    assert verify(quantize, mini_proto, mini_reference, tmp_path) == []


@each_way
def test_one_scale_off_by_a_thousandth_is_found_in_such_a_graph(
    quantize: str, mini_proto: onnx.ModelProto, mini_reference: Path, tmp_path: Path
) -> None:
    problems = verify(
        quantize,
        mini_proto,
        mini_reference,
        tmp_path,
        lambda model: change(model, "conv_out.scale", 1, factor=1.001),
    )
    assert any("conv_out" in problem for problem in problems)
