"""The program itself: what it imports, what it prints, how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from quest_deploy import __version__
from quest_deploy.backends.openvino.backend import OpenVinoBackend
from quest_deploy.cli.console import table
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import size
from tests.quest_deploy.support import cli

HEAVY = (
    "numpy",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "polygraphy",
    "matplotlib",
)
COMMANDS = (
    "run",
    "calibrate",
    "finetune",
    "export",
    "reference",
    "build-engine",
    "verify",
    "benchmark",
    "generate",
    "evaluate",
    "inspect",
    "lora",
    "doctor",
    "sensitivity",
    "schedule",
)


@pytest.mark.parametrize(
    "arguments", [None, ["--help"], ["--version"], ["finetune", "--help"], ["evaluate", "--help"]]
)
def test_neither_importing_the_program_nor_its_help_imports_heavy_packages(
    arguments: list[str] | None,
) -> None:
    script = (
        "import sys\nfrom quest_deploy.cli.main import main\n"
        f"sys.argv = ['quest-deploy', *{arguments or []}]\n"
        "try:\n    main() if len(sys.argv) > 1 else None\nexcept SystemExit as e:\n    assert not "
        "e.code\n"
        f"print('imported:', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_help_lists_every_command() -> None:
    shown = cli("--help")
    assert shown.code == 0
    assert [command for command in COMMANDS if f" {command} " not in shown.out] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_takes_json(command: str) -> None:
    shown = cli(command, "--help")
    assert shown.code == 0
    assert "--json" in shown.out


@pytest.mark.parametrize(
    ("typed", "completed"), [("quest-deploy ver", "verify"), ("quest-deploy export --j", "--json")]
)
def test_the_shell_completes_commands_and_options(typed: str, completed: str) -> None:
    asked = {
        "_QUEST_DEPLOY_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(typed.count(" ")),
    }
    program = Path(sys.executable).with_name("quest-deploy")
    done = subprocess.run([program], capture_output=True, text=True, env=os.environ | asked)
    assert done.stdout.split() == [completed]


def test_version_prints_the_version() -> None:
    assert cli("--version").out.strip() == __version__


@pytest.mark.parametrize(
    ("error", "code", "fact"),
    [
        (InputError("a mistake"), 2, "a mistake"),
        (QuestDeployError("a failure"), 1, "a failure"),
        (OSError(28, "No space left on device", "/full/file"), 1, "/full/file"),
        (
            PermissionError(13, "Permission denied", "/locked/file"),
            1,
            "/locked/file",
        ),
        (MemoryError(), 1, "memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_every_bad_end_is_one_message_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, fact: str, as_json: bool
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("quest_deploy.backends.machine.versions", fail)
    ended = cli("doctor", *(["--json"] if as_json else []))
    ended.assert_refused(fact, code=code)
    if as_json:
        assert ended.json == {"error": ended.message, "exit_code": code}
    else:
        assert ended.out == ""


def test_doctor_names_a_runtime_that_refuses_this_processor_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise QuestDeployError("no kernel for this processor")

    monkeypatch.setattr(OpenVinoBackend, "exactness", refuse)
    found = cli("doctor", "--json").json
    assert "no kernel for this processor" in found["backends"]["openvino"]["run"]
    assert found["exact_integers"]["openvino"] is None
    assert found["backends"]["onnxruntime"]["run"] is None
    assert found["exact_integers"]["onnxruntime"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate", "--samples", "0"],
        ["calibrate", "--buckets", "many"],
        ["generate", "--unknown"],
        ["inspect"],
        ["tune"],
    ],
)
def test_a_wrong_option_is_one_json_value_too(arguments: list[str]) -> None:
    ended = cli(*arguments, "--json")
    assert ended.code == 2
    assert ended.json["exit_code"] == 2
    assert ended.json["error"]


def test_a_defect_is_no_error_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("quest_deploy.backends.machine.versions", fail)
    with pytest.raises(ZeroDivisionError):
        cli("doctor")


def test_output_into_a_closed_pipe_ends_without_a_traceback() -> None:
    entry = "from quest_deploy.cli.main import main; main()"
    done = subprocess.run(
        f'"{sys.executable}" -c "{entry}" doctor --json | true',
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr


def test_progress_goes_to_standard_error_alone(workspace: Path) -> None:
    ended = cli(
        *("generate", "-w", workspace, "--backend", "onnxruntime", "--steps", "1", "--rows", "1"),
        *("--prompt", "cat"),
    )
    assert ended.code == 0
    assert str(workspace / "images" / "onnxruntime-0.png") in ended.out
    assert "generate/onnxruntime" not in ended.out
    assert "generate/onnxruntime" in ended.err


def test_tables_align_names_left_and_numbers_right() -> None:
    assert table(["name", "n"], [["a", "10"], ["long", "7"]]).splitlines() == [
        "name   n",
        "----  --",
        "a     10",
        "long   7",
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.50 kB"),
        (2_345_678, "2.35 MB"),
        (5e9, "5.00 GB"),
        (5e12, "5000.00 GB"),
    ],
)
def test_sizes_are_decimal(count: float, text: str) -> None:
    assert size(count) == text
