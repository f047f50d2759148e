"""Engines on a processor without VNNI: this one, if it has none; else this one with its VNNI hidden
from the runtime.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from exporters.exactness import ATTENTION, EXACT_ANYWHERE, LEVELS, SAFE
from exporters.graph_info import load_graph, save_graph
from exporters.torch_to_qdq import portable_graph
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.backends import exactness
from quest_deploy.backends.base import integer_instructions
from quest_deploy.calibration.ptq import CalibrationOptions, calibrate
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.verification.reference import save_reference
from tests.helpers import WITH_VNNI
from tests.quest_deploy.serving.test_processors_of_packages import lowered

HERE = Path(__file__).parent
ARCH_SET_CPUID, SYS_ARCH_PRCTL = 0x1012, 158
PROCESSORS = ("this", "without VNNI")
each_backend = pytest.mark.parametrize(
    "backend", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)]
)
"""OpenVINO compiles each cut of a verification."""


@pytest.fixture(scope="module")
def model(
    mini_unet: nn.Module, mini_trajectories: Trajectories, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The graph and the reference of a small model with weights, activations and attention of 8
    bits.
    """

    folder = tmp_path_factory.mktemp("w8a8")
    scheme = Scheme.parse("w8a8", buckets=2, attention_bits=8, softmax_bits=8)
    checkpoint = calibrate("mini", mini_unet, mini_trajectories, scheme, CalibrationOptions())
    save_graph(
        portable_graph(checkpoint, next(mini_trajectories.batches(2)), "ab" * 32),
        folder / "unet.onnx",
    )
    save_reference(
        QuantizedModel.from_checkpoint(checkpoint).eval(), mini_trajectories, folder / "reference"
    )
    return folder / "unet.onnx", folder / "reference"


@pytest.fixture(scope="module")
def found(model: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What ``engines.py`` prints, by processor and backend."""
    known: dict[tuple[str, str], dict[str, Any]] = {}

    def run(processor: str, backend: str) -> dict[str, Any]:
        if (processor, backend) not in known:
            seen = _seen(processor, tmp_path_factory)
            known[processor, backend] = _run("engines.py", seen, *model, backend)
        return known[processor, backend]

    return run


@dataclass(frozen=True)
class Seen:
    """How a script sees a processor: what stands before its command, and more environment."""

    before: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def _seen(processor: str, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """How ``processor`` is seen; skips the test where this one's VNNI cannot be hidden."""
    if processor == "this" or not integer_instructions():
        return Seen()
    if _faults_on_cpuid() and (compiler := shutil.which("cc")) is not None:
        library = tmp_path_factory.mktemp("hide") / "libhide_vnni.so"
        subprocess.run(
            [compiler, "-O1", "-shared", "-fPIC", "-o", library, HERE / "hide_vnni.c", "-ldl"],
            check=True,
        )
        return Seen(environment={"LD_PRELOAD": str(library)})
    if (emulator := shutil.which("qemu-x86_64")) is not None:
        return Seen(before=(emulator, "-cpu", "Haswell"))
    pytest.skip(
        "this processor has VNNI and cannot hide it: Linux does not let CPUID fault here, and "
        "there is no qemu-x86_64 (Debian's qemu-user)"
    )


def _faults_on_cpuid() -> bool:
    """Whether Linux can make CPUID fault here: asked by the call that switches that off, which it
    is.
    """
    return (
        os.uname().machine == "x86_64"
        and ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_SET_CPUID, 1) == 0
    )


@each_backend
@pytest.mark.parametrize("processor", PROCESSORS)
def test_what_was_asked_for_is_exact_and_so_is_what_holds_anywhere(
    found: Any, processor: str, backend: str
) -> None:
    problems = found(processor, backend)["problems"]
    assert problems["asked"] == []
    assert problems["any"] == []


@each_backend
@pytest.mark.parametrize("processor", PROCESSORS)
def test_what_holds_anywhere_holds_here(found: Any, processor: str, backend: str) -> None:
    levels = found(processor, backend)["levels"]
    assert levels
    assert all(level >= EXACT_ANYWHERE.levels.get(name, 0) for name, level in levels.items())


@each_backend
def test_without_vnni_a_runtime_saturates_and_verification_catches_an_answer_that_lies(
    found: Any, backend: str
) -> None:
    result = found("without VNNI", backend)
    assert {
        level for name, level in result["levels"].items() if name == f"{ATTENTION} uint8 x int8"
    } == {SAFE}
    assert any(problem.startswith("layer ") for problem in result["problems"]["lie"])


def test_a_package_made_with_vnni_is_refused_without_it_and_one_for_any_processor_is_not(
    model: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exactness, "measured", lambda _: WITH_VNNI)
    folders = [tmp_path_factory.mktemp("packages") / processor for processor in ("native", "any")]
    for folder in folders:
        lowered(load_graph(model[0]), folder, folder.name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders[0].parent))
    here, without = (
        _run("packages.py", _seen(processor, tmp_path_factory), *folders)
        for processor in PROCESSORS
    )
    assert without["refused"] == ["native"]
    assert set(without["levels"].values()) != {LEVELS[0]}
    if integer_instructions():
        assert here["refused"] == []
        # The first process kept its answers where the second one looks.
        assert set(here["levels"].values()) == {LEVELS[0]}


@each_backend
def test_signed_weights_of_any_size_are_exact_with_vnni_and_not_without(
    found: Any, backend: str
) -> None:
    levels = found("this", backend)["levels"]
    assert (set(levels.values()) == {LEVELS[0]}) == bool(integer_instructions())


@pytest.mark.parametrize("processor", PROCESSORS)
def test_stock_sessions_compute_every_kind_of_portable_graph_right(
    processor: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    errors = _run("stock_sessions.py", _seen(processor, tmp_path_factory))
    assert len(errors) == 4
    assert all(error < 1e-4 for error in errors.values()), errors


def _run(script: str, seen: Seen, *arguments: object) -> dict[str, Any]:
    """What a script beside this prints where it sees a processor so."""
    everything = {**os.environ, "PYTHONPATH": str(HERE.parents[2]), **seen.environment}
    command = [*seen.before, sys.executable, HERE / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=everything, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
