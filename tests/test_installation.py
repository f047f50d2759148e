"""What the set-up installs: on which machines, and no more for the demo than it needs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from quest_deploy.cli.main import TORCH_EXTRA

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BACKENDS = ("onnxruntime", "openvino", "tensorrt-rtx")
"""What the extra `cpu` is made of."""
ALL = ("torch", *BACKENDS)
"""And `all`."""
AARCH64 = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"}
MACOS = {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"}
GLIBCS = range(17, 36)
"""Up to 2.35, which came in 2022: what wheels for Linux are built for."""
PARTS = {"tensorrt-rtx": ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu13_libs")}
"""The wheels of packages that have nothing but requirements."""


def needed(extras: tuple[str, ...], machine: Mapping[str, str]) -> list[str]:
    """The packages that the project with ``extras`` requires of ``machine``."""
    lines = [
        *PROJECT["dependencies"],
        *(line for extra in extras for line in PROJECT["optional-dependencies"][extra]),
    ]
    environment = {name: str(value) for name, value in default_environment().items()} | dict(
        machine
    )
    requirements = map(Requirement, lines)
    return list(
        dict.fromkeys(
            r.name for r in requirements if r.marker is None or r.marker.evaluate(environment)
        )
    )


def torch_extra() -> set[str]:
    """The packages that the extra `torch` adds."""
    return {canonicalize_name(name) for name in {*needed(("torch",), {})} - {*needed((), {})}}


def pins() -> dict[str, str]:
    """The constraint of each package, by its name as an index writes it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        line.partition("==")[0].lower().replace("_", "-"): line for line in lines if "==" in line
    }


def test_cpu_is_all_backends() -> None:
    assert PROJECT["optional-dependencies"]["cpu"] == [f"quest-deploy[{','.join(BACKENDS)}]"]
    assert PROJECT["optional-dependencies"]["all"] == ["quest-deploy[torch,cpu]"]


def test_a_backend_brings_nothing_of_torch() -> None:
    engines = {*needed(BACKENDS, {}), *needed(("gpu", "serving"), {})}
    assert engines.isdisjoint(torch_extra())


def test_the_program_knows_what_the_extra_for_torch_installs() -> None:
    distributions = packages_distributions()
    known = {canonicalize_name(name) for module in TORCH_EXTRA for name in distributions[module]}
    assert known == torch_extra()


@pytest.mark.slow
@pytest.mark.parametrize("extras", [ALL, ("dev", "bench")], ids=["demo", "tests"])
def test_everything_has_wheels_on_aarch64(extras: tuple[str, ...], tmp_path: Path) -> None:
    """Resolves alone, package by package, since pip takes the markers of requirements for those of
    the machine that it runs on.
    """
    names = [part for name in needed(extras, AARCH64) for part in PARTS.get(name, (name,))]
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in GLIBCS]
    options = [
        *("--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--only-binary=:all:"),
        *("--retries=1", "--timeout=20"),
    ]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *options,
        f"--target={tmp_path}",
        "--python-version=3.11",
    ]
    wanted = [pins()[name.replace("_", "-")] for name in names]
    ended = subprocess.run(
        [*pip, *platforms, "--platform=manylinux2014_aarch64", *wanted],
        capture_output=True,
        text=True,
    )
    if ended.returncode != 0 and "Retrying (" in ended.stderr:
        pytest.skip("no package index answers")
    assert ended.returncode == 0, ended.stderr


def test_a_machine_without_tensorrt_rtx_installs_the_other_backends() -> None:
    assert "tensorrt-rtx" in needed(BACKENDS, AARCH64)
    assert "tensorrt-rtx" not in needed(BACKENDS, MACOS)
    assert {"onnxruntime", "openvino"} <= set(needed(BACKENDS, MACOS))


def test_the_demo_sets_up_no_more_than_it_needs() -> None:
    planned = subprocess.run(
        ["make", "--dry-run", "--always-make", "demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "'.[all]'" in planned
    assert not [
        extra
        for extra in ("dev", "bench", "serving")
        if f"{extra}]'" in planned or f"[{extra}" in planned
    ]
