"""Workspaces whose files are links or hard links, as DVC, `cp -al` and caches make them."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import onnx
import pytest

from exporters.graph_info import load_graph
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.errors import InputError
from quest_deploy.files import read_json
from tests.quest_deploy.support import LINKS, Chain, cli, linked, snapshot, store_of

CPU = ("onnxruntime", "openvino")
COMMANDS = (
    *(["verify", "--backend", backend] for backend in CPU),
    *(
        ["benchmark", "--backend", backend, "--runs", "1", "--warmup", "0", "--batch", "2"]
        for backend in CPU
    ),
    *(["generate", "--backend", backend, "--steps", "1", "--rows", "1"] for backend in CPU),
    ["build-engine", "--backend", "onnxruntime"],
    ["build-engine", "--backend", "openvino"],
    ["build-engine", "--backend", "tensorrt-rtx", "--compute-capability", "89"],
    ["reference"],
    ["export"],
)
"""Those that make files anew last, so that the others read what the workspace came with."""
OTHER_EACH_TIME = (
    *(f"engines/{name}/engine.json" for name in ("openvino", "tensorrt-rtx")),
    "engines/openvino/*.blob",
    "engines/tensorrt-rtx/*.engine",
)
"""Files whose names alone are compared, and the records of their hashes: TensorRT builds another
engine each time, and openvino writes the numbers that it gave the nodes, counted on within a
process.
"""


def results(root: Path) -> dict[str, Any]:
    """What the commands make of a workspace, but for times."""
    found: dict[str, Any] = {}
    for name in ("", "unet.onnx", "checkpoint.safetensors", *(f"engines/{name}" for name in CPU)):
        ended = cli("inspect", root / name, "--json")
        assert ended.code == 0, ended.err
        found[f"inspect {name}"] = ended.out.replace(str(root), "")
    package = root.with_name(f"{root.name}-package")
    ended = cli("package", "-w", root, "--triton", package)
    assert ended.code == 0, ended.err
    found["package"] = read_json(package / "package.json")["files"]
    for command, *options in COMMANDS:
        ended = cli(command, "-w", root, *options, "--json")
        assert ended.code == 0, ended.err
        stage = f"{command}/{options[1]}" if options else command
        if command == "benchmark":
            found[stage] = [ended.json[key] for key in ("precision", "size_ratio_to_fp32")]
            continue
        files = Workspace.open(root).stages[stage].files
        found[stage] = {
            name: None if any(fnmatch(name, each) for each in OTHER_EACH_TIME) else files[name]
            for name in files
        }
    return found


@pytest.fixture(scope="module")
def expected(mini_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes of the files themselves."""
    root = tmp_path_factory.mktemp("real") / "workspace"
    shutil.copytree(mini_chain.root, root)
    return results(root)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LINKS)
def test_a_workspace_of_links_gives_what_the_files_give_which_are_never_changed(
    mini_chain: Chain, expected: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    root = linked(mini_chain.root, tmp_path / "workspace", kind)
    store = store_of(root)
    before = snapshot(store)
    assert results(root) == expected
    assert snapshot(store) == before


@pytest.mark.parametrize(
    ("name", "inspected", "command"),
    [
        ("manifest.json", "", "verify onnxruntime"),
        ("checkpoint.safetensors", "checkpoint.safetensors", "export"),
        ("trajectories.safetensors", None, "reference"),
        ("unet.onnx", "unet.onnx", "build-engine openvino"),
        ("unet.onnx.data", "unet.onnx", "build-engine onnxruntime"),
        ("reference/tables.safetensors", None, "verify onnxruntime"),
        ("engines/openvino/engine.json", "engines/openvino", "generate openvino"),
        ("engines/openvino/lowered.onnx", "engines/openvino", "generate openvino"),
        ("engines/onnxruntime/lowered.onnx.data", "engines/onnxruntime", "benchmark onnxruntime"),
    ],
)
def test_a_link_to_nowhere_is_refused_by_its_name(
    mini_chain: Chain, tmp_path: Path, name: str, inspected: str | None, command: str
) -> None:
    root = linked(mini_chain.root, tmp_path / "workspace", "to other names")
    (root / name).resolve().unlink()
    stage, _, backend = command.partition(" ")
    where = ["--backend", backend] if backend else []
    cli(stage, "-w", root, *where).assert_refused(root / name)
    if inspected is not None:
        cli("inspect", root / inspected).assert_refused(root / name)


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
