"""An option is declared once: its command, its function, its refusals and its row follow."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from quest_deploy.backends.options import EngineOption, EngineOptions
from quest_deploy.cli.console import Console
from quest_deploy.cli.options import command
from quest_deploy.errors import InputError
from quest_deploy.options import Option, Options, takes
from scripts.docs.options import table
from tests.helpers import refused


@dataclass(frozen=True, kw_only=True)
class Declared(EngineOptions):
    """The engine's options and another one of TensorRT's."""

    streams: int = EngineOption(
        "tensorrt: auxiliary streams.",
        minimum=0,
        backends=("tensorrt",),
        reasons={"tensorrt-rtx": "it chooses them itself"},
    ).field(1)


class Ink(StrEnum):
    """An enumeration."""

    BLACK = "black"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True)
class Drawing(Options):
    """Options of most kinds."""

    place: Path = field(kw_only=False, metadata=Option("Where.", argument=True).metadata)
    size: Sequence[int] = Option("Sizes.", minimum=1, recorded="sizes").field((4,))
    mode: str = Option("How.", choices=("pen", "ink")).field("pen")
    digits: Sequence[int] | None = Option(
        text=str,
        parse=lambda text: tuple(map(int, text)),
    ).field(None)
    ink: Ink = Option("Which.").field(Ink.BLACK)
    share: float | None = Option("How much.").field(None)
    on_done: Any = None


def run(options: type, *words: str) -> tuple[int, str, dict[str, Any]]:
    """The exit code, the output and what a command of the options was given."""
    app, given = typer.Typer(), {}

    @app.command()
    @command(options)
    def draw(chosen: dict[str, Any], console: Console) -> None:
        given.update(chosen)

    done = CliRunner().invoke(app, words, env={"COLUMNS": "200", "NO_COLOR": "1"})
    return done.exit_code, done.output, given


def test_an_engines_option_that_is_declared_is_a_flag_a_parameter_a_refusal_and_a_row() -> None:
    assert "--streams" in run(Declared, "--help")[1]
    assert run(Declared, "--streams", "2")[2]["streams"] == 2
    assert run(Declared, "--streams", "-1")[0] == 2

    @takes(Declared)
    def build(chosen: Declared) -> int:
        return chosen.streams

    assert build(streams=3) == 3
    assert inspect.signature(build).parameters["streams"].default == 1

    Declared(streams=2).check_taken("tensorrt")
    for backend, why in (("tensorrt-rtx", "it chooses them itself"), ("openvino", "tensorrt")):
        with pytest.raises(InputError, match=f"--streams: {backend} .*{why}"):
            Declared(streams=2).check_taken(backend)
    (row,) = (line for line in table(Declared).splitlines() if line.startswith("| `--streams` "))
    assert row.split(" | ")[2:] == ["no", "no", "no: it chooses them itself", "yes |"]


def test_a_command_gives_what_was_chosen_as_python_has_it() -> None:
    code, _, given = run(Drawing, "here", "--size", "2", "--size", "3", "--digits", "12")
    assert code == 0
    assert given == {
        "place": Path("here"),
        "size": [2, 3],
        "mode": "pen",
        "digits": (1, 2),
        "ink": Ink.BLACK,
    }
    assert run(Drawing)[0] == 2


def test_a_field_without_an_option_is_pythons_alone_and_not_recorded() -> None:
    assert "on-done" not in run(Drawing, "--help")[1]
    assert "on_done" not in Drawing(Path(), on_done=print).to_json()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", [3, 0]),
        ("mode", "oil"),
        # Of another type, as Python's callers can give it.
        ("size", 2),
        ("size", ["2"]),
        ("size", [True]),
        ("size", "22"),
        ("mode", 1),
        ("mode", None),
        ("digits", "12"),
        ("ink", "red"),
        ("share", "half"),
    ],
)
def test_a_value_of_another_type_or_range_is_refused_by_its_flag(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"--{name}: "):
        Drawing(Path(), **{name: value})


def test_an_enumeration_is_taken_by_its_value_and_a_whole_number_for_a_float() -> None:
    assert Drawing(Path(), ink="blue", share=1).ink is Ink.BLUE  # type: ignore[arg-type]


def test_numbers_of_numpy_are_taken_and_recorded_as_pythons() -> None:
    found = Drawing(Path(), size=[np.int64(3)], share=np.float32(0.5)).to_json()  # type: ignore[arg-type]
    assert json.loads(json.dumps(found)) == found | {"sizes": [3], "share": 0.5}


def test_a_functions_help_tells_of_each_option() -> None:
    @takes(Drawing)
    def draw(chosen: Drawing) -> None:
        """Draw."""

    described = inspect.getdoc(draw) or ""
    assert described.startswith("Draw.")
    assert all(
        f"{name}: {text}" in described for name, text in (("mode", "How."), ("ink", "Which."))
    )


def test_files_have_recorded_names_and_sequences_are_tuples() -> None:
    assert Drawing(Path("here"), size=[2]).to_json() == {
        "place": "here",
        "sizes": (2,),
        "mode": "pen",
        "digits": None,
        "ink": Ink.BLACK,
        "share": None,
    }


@pytest.mark.slow
def test_a_type_checker_knows_a_functions_parameters(tmp_path: Path) -> None:
    lines = {
        'qd.build_engine("ws", backend="openvino", threads=2, sample_size=[(64, 64)])': True,
        'qd.build_engine("ws", thread=2)': False,
        'qd.build_engine("ws", threads="2")': False,
        'qd.calibrate("emoji", bits="w4a4").root': True,
        'qd.calibrate("emoji").width': False,
    }
    (tmp_path / "script.py").write_text("\n".join(["import quest_deploy as qd", *lines]))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", tmp_path / "script.py"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    wrong = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert wrong == {i for i, right in enumerate(lines.values(), 2) if not right}, done.stdout


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_numbers_that_are_not_finite_are_refused_by_the_option(value: str) -> None:
    with refused("--share", value):
        Drawing(Path("a"), share=float(value))
    assert Drawing(Path("a"), share=1e300).share == 1e300
