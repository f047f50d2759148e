"""The floors: which room imports from which, as pyproject.toml's contracts have it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = Path(sys.executable).with_name("lint-imports")
INSIDE = "def used() -> None:\n    import {}\n"
"""An import in a function."""


def broken(folder: Path) -> list[str]:
    """The contracts that the packages in ``folder`` break."""
    done = subprocess.run(
        [LINT, "--no-cache", "--no-logo"], cwd=folder, capture_output=True, text=True
    )
    found = [line.partition(" BROKEN")[0] for line in done.stdout.splitlines() if " BROKEN" in line]
    assert done.returncode == int(bool(found)), done.stdout + done.stderr
    return found


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the packages, to be changed."""
    for package in ("exporters", "quest_deploy"):
        shutil.copytree(
            ROOT / package,
            tmp_path / package,
            ignore=lambda folder, names: [
                name for name in names if (Path(folder) / name).is_file() and name[-3:] != ".py"
            ],
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def append(path: Path, code: str) -> None:
    """Write ``code`` at the end of a module, which may be a new one."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as stream:
        stream.write(code)


def test_every_import_keeps_to_the_floors() -> None:
    assert broken(ROOT) == []


@pytest.mark.parametrize(
    ("module", "code", "contract"),
    [
        ("quest_deploy/artifacts/scheme.py", INSIDE.format("quest_deploy.models.hub"), "Floors"),
        (
            "quest_deploy/verification/checks/codes.py",
            "import quest_deploy.serving.client\n",
            "Floors",
        ),
        ("quest_deploy/attic/__init__.py", "", "Floors"),
        (
            "exporters/editor.py",
            "import quest_deploy.models.hub\n",
            "exporters reads artifacts and quantization alone",
        ),
        (
            "quest_deploy/calibration/ptq.py",
            INSIDE.format("exporters.editor"),
            "exporters is used from backends up",
        ),
        (
            "quest_deploy/models/registry.py",
            INSIDE.format("quest_deploy.models.loading"),
            "No cycle between rooms, nor between a room's modules",
        ),
        (
            "quest_deploy/verification/tolerances.py",
            INSIDE.format("torch"),
            "An engine runs without torch",
        ),
    ],
)
def test_an_import_against_a_contract_breaks_it(
    copy: Path, module: str, code: str, contract: str
) -> None:
    append(copy / module, code)
    assert contract in broken(copy)


def test_an_import_for_types_alone_is_free(copy: Path) -> None:
    code = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import quest_deploy.cli.main\n"
    append(copy / "quest_deploy/artifacts/scheme.py", code)
    assert broken(copy) == []
