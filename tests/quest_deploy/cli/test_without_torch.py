"""Where engines only run: what works without the extra `torch`, and what names it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.cli.main import TORCH_EXTRA
from tests.quest_deploy.support import strict_json

ROOT = Path(__file__).parents[3]
BLOCKED = f"import sys\nsys.modules.update(dict.fromkeys({sorted(TORCH_EXTRA)}))\n"
"""Makes an import of one of the extra's packages fail as where it is not installed."""
PREDICT = """
import sys
import numpy as np
from pathlib import Path
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.backends.engine_unet import EngineUNet
root, backend, inputs, output = sys.argv[1:]
with EngineUNet.load(Workspace.open(Path(root)), backend) as unet:
    np.save(output, unet.predict(**np.load(inputs)))
"""
RUNS_ENGINES: dict[str, tuple[str, ...]] = {
    "build-engine": ("--threads", "1"),
    "verify": (),
    "benchmark": ("--runs", "1", "--warmup", "0", "--batch", "2"),
}
NEEDS_TORCH: dict[str, tuple[str, ...]] = {
    "calibrate": (),
    "sensitivity": (),
    "finetune": (),
    "lora": ("--lora", "style.safetensors"),
    "export": (),
    "reference": (),
    "generate": ("--backend", "onnxruntime"),
    "evaluate": ("--backend", "onnxruntime"),
    "schedule": (),
}


def without_torch(
    commands: Sequence[Sequence[str]], stream: str = "stderr"
) -> list[tuple[int, str]]:
    """Run the commands one after the other in a process that has no torch: each one's exit code and
    its last line on ``stream``.
    """
    script = f"""{BLOCKED}
import contextlib, io, json
from quest_deploy.cli.main import main
for command in json.loads(sys.argv[1]):
    sys.argv[1:], code, said = command, 0, {{"stdout": io.StringIO(), "stderr": io.StringIO()}}
    with contextlib.redirect_stdout(said["stdout"]), contextlib.redirect_stderr(said["stderr"]):
        try:
            main()
        except SystemExit as e:
            code = e.code or 0
    print(json.dumps([code, (said[{stream!r}].getvalue().splitlines() or [""])[-1]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [(code, line) for code, line in map(json.loads, done.stdout.splitlines())]


def test_engines_are_built_verified_timed_and_looked_at_without_torch(workspace: Path) -> None:
    here = ("-w", str(workspace), "--backend", "onnxruntime")
    commands = [
        ("--help",),
        ("doctor",),
        *((command, *here, *options) for command, options in RUNS_ENGINES.items()),
        ("report", "-w", str(workspace)),
        ("inspect", str(workspace)),
        ("inspect", str(workspace / "engines" / "onnxruntime")),
        ("inspect", str(workspace / "unet.onnx")),
        ("inspect", str(workspace / "checkpoint.safetensors")),
    ]
    ended = without_torch(commands)
    assert [(command, *end) for command, end in zip(commands, ended, strict=True) if end[0]] == []


def test_an_engine_predicts_the_same_without_torch(workspace: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    inputs = {
        "sample": generator.standard_normal((2, 8, 8, 8), np.float32),
        "timestep": np.array([900.0, 10.0], np.float32),
        "encoder_hidden_states": generator.standard_normal((2, 24, 128), np.float32),
    }
    np.savez(tmp_path / "inputs.npz", **inputs)
    output = tmp_path / "output.npy"
    arguments = [str(workspace), "onnxruntime", str(tmp_path / "inputs.npz"), str(output)]
    subprocess.run([sys.executable, "-c", BLOCKED + PREDICT, *arguments], check=True)
    with EngineUNet.load(Workspace.open(workspace), "onnxruntime") as unet:
        np.testing.assert_array_equal(np.load(output), unet.predict(**inputs))


def test_a_client_needs_no_torch() -> None:
    """It gets as far as the server that does not answer."""
    ((code, line),) = without_torch([("client", "127.0.0.1:1", "--timeout", "1")])
    assert (code, "127.0.0.1:1" in line) == (1, True)


def test_a_command_that_needs_torch_names_the_extra(workspace: Path, tmp_path: Path) -> None:
    commands = [
        ("run", "-w", str(tmp_path / "new"), "--if-available"),
        ("calibrate", "-w", str(tmp_path / "new")),
        *((command, "-w", str(workspace), *rest) for command, rest in NEEDS_TORCH.items()),
    ]
    for command, (code, line) in zip(commands, without_torch(commands), strict=True):
        assert (code, "quest-deploy[torch]" in line) == (2, True), (command, code, line)
    assert not (tmp_path / "new").exists()


def test_doctor_names_the_extra_that_is_missing_without_torch() -> None:
    ((code, line),) = without_torch([("doctor",)], stream="stdout")
    assert (code, "quest-deploy[torch]" in line) == (0, True)


@pytest.mark.slow
def test_the_wheel_with_one_backend_alone_verifies_and_benchmarks(
    workspace: Path, tmp_path: Path
) -> None:
    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean)
        if done.returncode and "Retrying (" in done.stderr:
            pytest.skip("no package index answers")
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = (sys.executable, "-m", "pip", "--retries=1", "--timeout=20")
    source = tmp_path / "source"  # setuptools builds beside it, and takes up what lies there
    for package in ("exporters", "quest_deploy"):
        shutil.copytree(ROOT / package, source / package)
    for file in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / file, source)
    run(*pip, "wheel", "--no-deps", f"--wheel-dir={tmp_path}", source)
    (wheel,) = tmp_path.glob("quest_deploy-*.whl")
    programs = tmp_path / "environment" / "bin"
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "environment")
    environment = ("--python", str(programs / "python"))
    constraints = ROOT / "constraints.txt"
    run(*pip, *environment, "install", "--constraint", constraints, f"{wheel}[openvino]")
    installed = strict_json(run(*pip, *environment, "list", "--format=json").stdout)
    names = {package["name"].lower() for package in installed}
    assert "openvino" in names
    assert names.isdisjoint({"torch", "diffusers", "transformers", "peft", "matplotlib"})
    here = ("-w", workspace, "--backend", "openvino", "--json")
    for command, options in RUNS_ENGINES.items():
        report = strict_json(run(programs / "quest-deploy", command, *here, *options).stdout)
        assert report["backend"] == "openvino"
