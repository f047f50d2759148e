"""What only a GPU can show: an engine of TensorRT for RTX, and one of TensorRT where its SDK is,
that run there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from quest_deploy.backends.cuda import gpu_count
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.errors import InputError
from tests.quest_deploy.support import Chain, cli

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu_count() == 0, reason="no NVIDIA GPU is here")]


@pytest.fixture(scope="module", params=["tensorrt-rtx", "tensorrt"])
def backend(request: pytest.FixtureRequest) -> str:
    """One that this machine's GPU runs."""
    name: str = request.param
    try:
        get_backend(name).check_run(EngineOptions())
    except InputError as e:
        pytest.skip(str(e))
    return name


@pytest.fixture(scope="module")
def built(chain: Chain, backend: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with an engine for this GPU."""
    root = tmp_path_factory.mktemp(backend) / "workspace"
    shutil.copytree(chain.root, root)
    ended = cli("build-engine", "-w", root, "--backend", backend)
    assert ended.code == 0, ended.err
    return root


def test_the_engine_computes_what_the_fake_quantized_model_does(built: Path, backend: str) -> None:
    ended = cli("verify", "-w", built, "--backend", backend, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["passed"]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("benchmark", ("--runs", "2", "--warmup", "1", "--batch", "2")),
        ("generate", ("--steps", "3", "--prompt", "cat")),
        ("evaluate", ("--images", "4", "--steps", "3")),
        ("inspect", ()),
    ],
)
def test_it_is_timed_drawn_with_evaluated_and_inspected(
    built: Path, backend: str, command: str, options: tuple[str, ...]
) -> None:
    where = (
        [built / "engines" / backend]
        if command == "inspect"
        else ["-w", built, "--backend", backend]
    )
    ended = cli(command, *where, *options, "--json")
    assert ended.code == 0, ended.err
