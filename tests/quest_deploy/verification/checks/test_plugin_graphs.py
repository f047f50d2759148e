"""Verification of a graph that is lowered for TensorRT's plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from exporters.graph_info import load_graph
from quest_deploy.backends.base import LOWERED, EngineOptions, build_engine
from quest_deploy.verification.checks import verify_engine
from tests.quest_deploy.plugin_backend import PluginOnTheCpu, kept
from tests.quest_deploy.support import change

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx


def verify(
    proto: onnx.ModelProto,
    reference: Path,
    folder: Path,
    edit: Callable[[ir.Model], None] = lambda model: None,
) -> list[str]:
    """What verification finds wrong with the graph, ``edit`` applied."""
    options, model = EngineOptions(threads=1, quantize="plugin"), ir.from_proto(proto)
    edit(model)
    build_engine(PluginOnTheCpu(), model, folder, options, "cd" * 32)
    assert len(kept(load_graph(folder / LOWERED))) >= 10
    return verify_engine(PluginOnTheCpu(), options, folder, reference).problems


def test_a_graph_for_the_plugin_is_verified_layer_by_layer(
    mini_proto: onnx.ModelProto, mini_reference: Path, tmp_path: Path
) -> None:
    assert verify(mini_proto, mini_reference, tmp_path) == []


def test_one_scale_off_by_a_thousandth_is_found_in_a_graph_for_the_plugin(
    mini_proto: onnx.ModelProto, mini_reference: Path, tmp_path: Path
) -> None:
    problems = verify(
        mini_proto,
        mini_reference,
        tmp_path,
        lambda model: change(model, "conv_out.scale", 1, factor=1.001),
    )
    assert any("conv_out" in problem for problem in problems)
