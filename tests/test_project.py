"""What the project says of itself: one version, and packages for every Python that it names."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import quest_deploy
from tests.test_installation import GLIBCS, PARTS, needed, pins

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
X86 = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
PYTHONS = [
    found[1]
    for classifier in PROJECT["classifiers"]
    if (found := re.fullmatch(r"Programming Language :: Python :: (\d+\.\d+)", classifier))
]


@pytest.mark.parametrize("folder", ["trt_plugins", "trt_plugins/runtime"])
def test_the_cmake_projects_have_the_packages_version(folder: str) -> None:
    text = (ROOT / folder / "CMakeLists.txt").read_text()
    assert re.findall(r"^project\(\w+ VERSION (\S+)", text, re.MULTILINE) == [
        quest_deploy.__version__
    ]


def test_the_workflow_tests_every_python_that_the_project_names() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert f"python: {PYTHONS}".replace("'", '"') in workflow
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_the_tests_that_pages_and_sources_name_are_there() -> None:
    named = {
        name
        for folder, suffix in (("docs", "md"), ("trt_plugins", "cpp"), ("quest_deploy", "py"))
        for path in (ROOT / folder).rglob(f"*.{suffix}")
        for name in re.findall(r"\btests/\w[\w/]*\.py\b", path.read_text())
    }
    assert len(named) > 3
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_wheel_carries_every_file_of_the_package() -> None:
    carried = {
        path
        for package, patterns in SETTINGS["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = {
        path
        for path in (ROOT / "quest_deploy").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert files - carried == set()
    assert ROOT / "quest_deploy/models/emoji/unet/config.json" in files


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_everything_has_wheels_for_every_python(python: str, tmp_path: Path) -> None:
    machine = X86 | {"python_version": python, "python_full_version": f"{python}.0"}
    extras = tuple(extra for extra in PROJECT["optional-dependencies"] if extra != "gpu")
    names = [
        part
        for name in needed(extras, machine)
        if name != PROJECT["name"]  # an extra that is made of others
        for part in PARTS.get(name, (name,))
    ]
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"),
            *("--ignore-installed", "--only-binary=:all:", "--retries=1", "--timeout=20"),
            *(f"--target={tmp_path}", f"--python-version={python}"),
            *(f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBCS),
            "--platform=manylinux2014_x86_64",
            *(pins()[name.lower().replace("_", "-")] for name in names),
        ],
        capture_output=True,
        text=True,
    )
    if ended.returncode != 0 and "Retrying (" in ended.stderr:
        pytest.skip("no package index answers")
    assert ended.returncode == 0, ended.stderr
