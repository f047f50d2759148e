"""Runs a worker in a process of its own, in the environment of its program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quest_deploy.errors import QuestDeployError
from scripts.bench.image.prepare import ROOT

OURS, OPTIMUM, SDCPP = "", "optimum", "sdcpp"
"""The environments: this one, and those of ``scripts/bench/image/peers``."""
PACKAGES = {OPTIMUM: "optimum-intel and openvino-genai", SDCPP: "stable-diffusion-cpp-python"}


class MissingError(QuestDeployError):
    """A program is not installed; its row says so."""


@dataclass(frozen=True)
class Environments:
    """Where the peers' environments are: folders NAME, each with pip's NAME.log beside it."""

    folder: Path

    def python(self, name: str) -> Path:
        """The interpreter of an environment.

        Raises:
            MissingError: it is not set up.
        """
        if name == OURS:
            return Path(sys.executable)
        if (self.folder / name / ".ready").exists():
            return self.folder / name / "bin" / "python"
        log = self.folder / f"{name}.log"
        said = log.read_text().splitlines() if log.exists() else []
        errors = [line for line in said if line.startswith("ERROR")]
        why = errors[-1] if errors else "`make bench-image` sets it up"
        raise MissingError(f"{PACKAGES[name]}: not installed: {why}")


def run_worker(python: Path, module: str, request: dict[str, Any], threads: int) -> dict[str, Any]:
    """What the worker ``module`` answers to ``request``, told when it was started; torch's compiler
    keeps nothing.

    Raises:
        QuestDeployError: it failed; the message ends with the last line that it said.
    """
    name = module.rpartition(".")[2]
    with tempfile.TemporaryDirectory(prefix="quest-deploy-") as scratch:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/compiled",
        }
        log = Path(scratch) / "log"
        with log.open("wb") as errors:
            started = time.time()
            done = subprocess.run(
                [python, "-m", module],
                input=json.dumps({**request, "spawned": started}).encode(),
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=ROOT,
                check=False,
            )
        if done.returncode:
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            how = (
                f"was killed by signal {-done.returncode}"
                if done.returncode < 0
                else f"ended with exit code {done.returncode}"
            )
            raise QuestDeployError(f"{name}: its process {how}: {said[-1]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
