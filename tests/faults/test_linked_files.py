"""Workspaces whose files are links or hard links, as DVC, `cp -al` and caches make them."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import onnx
import pytest

from exporters.graph_info import load_graph
from quest_deploy.errors import InputError
from tests.quest_deploy.support import cli

if TYPE_CHECKING:
    from pathlib import Path

    from tests.quest_deploy.conftest import Chain


def link(source: Path, target: Path, kind: str) -> None:
    """Copy a folder: each file is a link to, or has a further name of, the one in ``source``."""
    make = os.link if kind == "hard" else os.symlink
    shutil.copytree(source, target, copy_function=lambda a, b: make(a, b))
    (target / ".lock").unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hard", "symbolic"])
def test_a_workspace_of_links_is_read_and_what_they_name_is_never_changed(
    mini_chain: Chain, tmp_path: Path, kind: str
) -> None:
    linked = tmp_path / "linked"
    link(mini_chain.root, linked, kind)
    before = {path: path.read_bytes() for path in mini_chain.root.rglob("*") if path.is_file()}
    for command in (
        ["build-engine", "--backend", "onnxruntime"],
        ["build-engine", "--backend", "openvino"],
        ["build-engine", "--backend", "tensorrt-rtx"],
        ["generate", "--backend", "openvino", "--steps", "1", "--rows", "1"],
        ["generate", "--backend", "onnxruntime", "--steps", "1", "--rows", "1"],
        ["export"],
        ["inspect", linked / "unet.onnx"],
    ):
        workspace = [] if command[0] == "inspect" else ["-w", linked]
        ended = cli(*command, *workspace)
        assert ended.code == 0, ended.err
    assert {
        path: path.read_bytes() for path in mini_chain.root.rglob("*") if path.is_file()
    } == before


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_engine_of_links_runs(mini_chain: Chain, tmp_path: Path, backend: str) -> None:
    linked = tmp_path / "linked"
    link(mini_chain.root, linked, "symbolic")
    ended = cli("generate", "-w", linked, "--backend", backend, "--steps", "1", "--rows", "1")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "folder/data"])
def test_a_graph_whose_weights_lie_elsewhere_is_refused(
    mini_chain: Chain, tmp_path: Path, location: str
) -> None:
    graph = tmp_path / "unet.onnx"
    model = onnx.load(mini_chain.root / "unet.onnx", load_external_data=False)
    locations = [
        entry
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    ]
    assert locations
    for entry in locations:
        entry.value = location
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=location):
        load_graph(graph)


@pytest.mark.parametrize("linked", [False, True], ids=["a folder", "a link to it"])
def test_a_workspace_of_any_name_is_worked_in(
    workspace: Path, tmp_path: Path, linked: bool
) -> None:
    place = tmp_path / "рабочая ws & co (v1.5) 模型"
    if linked:
        place.symlink_to(workspace, target_is_directory=True)
    else:
        workspace.rename(place)
    for command in ("build-engine", "verify"):
        ended = cli(command, "-w", place, "--backend", "onnxruntime")
        assert ended.code == 0, ended.err
    assert place.is_symlink() == linked
