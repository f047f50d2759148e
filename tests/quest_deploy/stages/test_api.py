"""The Python API mirrors the commands, and is light to import."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import quest_deploy as qd
from quest_deploy.cli.main import app
from tests.helpers import refused
from tests.quest_deploy.support import fail_verification

COMMANDS = {
    command.name or command.callback.__name__: command.callback
    for command in app.registered_commands
    if command.callback is not None
}
FUNCTIONS = {"import": "import_checkpoint"}
WITHOUT_FUNCTION = {"compare", "doctor"}
"""They measure methods, and describe the machine."""
ENGINE = ["build-engine onnxruntime", "verify onnxruntime"]
OF_PYTHON = {"progress", "on_result"}
"""Parameters that have no option."""


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - WITHOUT_FUNCTION))
def test_every_option_of_a_command_is_a_parameter_of_its_function_with_the_same_default(
    command: str,
) -> None:
    options = parameters(COMMANDS[command])
    taken = parameters(getattr(qd, FUNCTIONS.get(command, command.replace("-", "_"))))
    shown = {"as_json"} | ({"layers"} if command == "inspect" else set())
    assert options.keys() - shown == taken.keys() - OF_PYTHON
    for name in options.keys() - shown:
        absent, default = options[name].default, taken[name].default
        # A list of options is None where none is given; a required one has no default in Python.
        if absent is not None:
            assert absent == default, name
        else:
            assert default is inspect.Parameter.empty or isinstance(default, tuple | None), name


def test_importing_the_package_and_looking_at_it_imports_nothing_heavy() -> None:
    script = (
        "import sys, quest_deploy as qd\n"
        "dir(qd), qd.calibrate, qd.run, qd.Scheme, qd.Workspace\n"
        "print([name for name in ('torch', 'diffusers', 'onnx', 'openvino') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", qd.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert name in dir(qd)
    assert getattr(qd, name) is not None


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        qd.nothing  # noqa: B018


def test_the_package_says_that_it_is_typed() -> None:
    assert (resources.files("quest_deploy") / "py.typed").is_file()


def test_functions_take_an_open_workspace_or_its_folder(workspace: Path) -> None:
    opened = qd.Workspace.open(workspace)
    for place in (opened, workspace, str(workspace)):
        assert qd.verify(place, backend="onnxruntime")["passed"]
    with refused("w8a8"):
        qd.verify(opened, bits="w8a8", backend="onnxruntime")


def test_run_returns_each_stages_result_and_tells_of_it(workspace: Path) -> None:
    fail_verification(workspace, "onnxruntime")
    told: list[str] = []
    ended = qd.run(
        workspace=workspace,
        backend=["onnxruntime"],
        on_result=lambda opened, stage, result: told.append(stage),
    )
    of_model = ["calibrate", "finetune", "export", "reference"]
    assert told == list(ended.results) == [*of_model, *ENGINE, "report"]
    assert ended.failed.keys() == {"onnxruntime"}
    assert ended.backends.left_out == {}
    assert ended.results["verify onnxruntime"]["problems"]
