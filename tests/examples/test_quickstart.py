"""The examples run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from quest_deploy.artifacts.workspace import Workspace
from tests.quest_deploy.conftest import mini_emoji  # noqa: F401 - a fixture

EXAMPLES = Path(__file__).parents[2] / "examples"
STAGES = ["calibrate", "finetune", "export", "reference"]
OF_ENGINE = ["build-engine", "verify", "benchmark", "generate"]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("mini_emoji")
def test_quickstart_goes_from_the_model_to_a_picture(tmp_path: Path) -> None:
    picture = example("quickstart").quickstart(
        tmp_path / "w", samples=8, temporal_steps=1, sensitive_steps=1, runs=2
    )
    workspace = Workspace.open(tmp_path / "w")
    assert list(workspace.stages) == [*STAGES, *(f"{stage}/openvino" for stage in OF_ENGINE)]
    for stage in workspace.stages:
        workspace.require(stage)
    assert Image.open(picture).size == (64, 64)
