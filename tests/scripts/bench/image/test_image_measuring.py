"""A worker's figures, and how its process is run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from quest_deploy.errors import QuestDeployError
from scripts.bench.image.prepare import bytes_of, whole
from scripts.bench.image.runner import OPTIMUM, OURS, Environments, MissingError, run_worker
from scripts.bench.image.workers import measuring
from tests.helpers import refused

if TYPE_CHECKING:
    from scripts.bench.image.workers.measuring import Calls


class Slow:
    """A program whose first step takes long; it predicts 1.5 where the float model does 1."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.first = request["first"]

    def draw(self, steps: int) -> Calls:
        calls = {
            "text_encoder": [0.25, 0.25],
            "unet": [self.first, *[1.0] * (steps - 1)],
            "vae": [2.0],
        }
        self.first = 1.0
        return calls

    def predict(self, **inputs: Any) -> Any:
        assert inputs.keys() == {"sample", "timestep", "encoder_hidden_states"}
        return np.full_like(inputs["sample"], 1.5)


class Silent(Slow):
    """A program that does not give its predictions."""

    def predict(self, **inputs: Any) -> Any:
        return None


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    shape = (3, 2, 4, 8, 8)
    arrays = {
        "sample": np.zeros(shape, np.float32),
        "timestep": np.zeros(shape[:2], np.float32),
        "encoder_hidden_states": np.zeros((*shape[:2], 7, 16), np.float32),
        "prediction": np.ones(shape, np.float32),
    }
    for name, values in arrays.items():
        np.save(tmp_path / f"{name}.npy", values)
    return tmp_path


def asked(inputs: Path, warm_steps: int, cold_steps: int = 20) -> dict[str, Any]:
    return {
        "spawned": time.time() - 100,
        "steps": 20,
        "cold_steps": cold_steps,
        "warm_steps": warm_steps,
        "inputs": str(inputs),
        "first": 9.0,
    }


def test_all_steps_count_as_the_median_of_the_warm_ones(inputs: Path) -> None:
    found = measuring.measure(asked(inputs, warm_steps=5), Slow)
    assert found["unet_step_s"] == 1
    assert found["unet_s"] == 20
    assert found["image_s"] == pytest.approx(15, abs=0.5)  # the drawing itself takes no time here
    assert (found["text_encoder_s"], found["vae_s"]) == (0.5, 2)
    assert 100 <= found["open_s"] <= found["first_image_s"] < 150


def test_a_program_that_is_drawn_with_once_has_the_first_drawing_s_figures(inputs: Path) -> None:
    found = measuring.measure(asked(inputs, warm_steps=0), Slow)
    assert found["unet_s"] == 20
    assert found["unet_steps_s"] == [9, *[1] * 19]


def test_a_slow_program_s_first_step_counts_once(inputs: Path) -> None:
    found = measuring.measure(asked(inputs, warm_steps=0, cold_steps=4), Slow)
    assert found["unet_step_s"] == 1
    assert found["unet_s"] == 20
    assert found["first_image_s"] == pytest.approx(found["open_s"] + 16, abs=0.5)


def test_the_error_is_relative_to_the_float_model_s_predictions(inputs: Path) -> None:
    assert measuring.measure(asked(inputs, 1), Slow)["error"] == pytest.approx(0.5)
    assert measuring.measure(asked(inputs, 1), Silent)["error"] is None


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    """A worker of the test's own."""
    (folder / "worker_of_test.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return "worker_of_test"


def test_a_worker_is_told_when_it_was_started_and_how_many_threads_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "import json, os, sys\n"
        "told = json.load(sys.stdin)\n"
        "print('loading')\n"
        "print(json.dumps({**told, 'threads': os.environ['OMP_NUM_THREADS']}))\n"
    )
    worker, before = module(tmp_path, monkeypatch, text), time.time()
    found = run_worker(Path(sys.executable), worker, {"prompt": "a cat"}, 3)
    assert found["prompt"] == "a cat"
    assert found["threads"] == "3"
    assert before <= found["spawned"] <= time.time()


def test_what_a_program_prints_is_no_part_of_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "import os\n"
        "from scripts.bench.image.workers.measuring import quiet\n"
        "with quiet() as send:\n"
        "    os.system('echo native chatter')\n"
        "    print('chatter')\n"
        "    send({'answer': 1})\n"
        "print('later chatter')\n"
    )
    worker = module(tmp_path, monkeypatch, text)
    assert run_worker(Path(sys.executable), worker, {}, 1) == {"answer": 1}


def test_a_worker_that_fails_is_reported_with_the_last_that_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = module(tmp_path, monkeypatch, "raise RuntimeError('no such kernel')")
    with refused("worker_of_test", "exit code 1", "no such kernel", error=QuestDeployError):
        run_worker(Path(sys.executable), worker, {}, 1)


def test_a_program_that_is_not_installed_is_missing_for_pip_s_reason(tmp_path: Path) -> None:
    environments = Environments(tmp_path)
    assert environments.python(OURS) == Path(sys.executable)
    with refused("optimum-intel", "make bench-image", error=MissingError):
        environments.python(OPTIMUM)
    (tmp_path / "optimum.log").write_text(
        "Collecting\nERROR: No matching distribution found\nbye\n"
    )
    with refused("ERROR: No matching distribution found", error=MissingError):
        environments.python(OPTIMUM)
    (tmp_path / OPTIMUM).mkdir()
    (tmp_path / OPTIMUM / ".ready").touch()
    assert environments.python(OPTIMUM) == tmp_path / "optimum" / "bin" / "python"


def test_what_is_interrupted_while_it_is_made_is_not_there(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt), whole(target) as partial:
        partial.mkdir()
        (partial / "half").write_text("x")
        raise KeyboardInterrupt
    assert not target.exists()
    with whole(target) as partial:
        partial.mkdir()
        (partial / "all").write_text("xyz")
    assert [path.name for path in target.iterdir()] == ["all"]
    assert bytes_of([target, target / "all"]) == 6
