from __future__ import annotations

import dataclasses
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from quest_deploy.models.registry import EMBEDDED, KNOWN_MODELS, KnownModel
from scripts.bench.methods.cells import TRANSFORMER, Cell, all_cells
from scripts.bench.methods.model import ComparedModel
from scripts.bench.methods.recipes import definition_of
from scripts.bench.methods.results import Result
from tests.pipelines import pixart_of_flow
from tests.quest_deploy.conftest import emoji, mini_emoji, mini_trajectories, mini_unet

if TYPE_CHECKING:
    from collections.abc import Callable

    from quest_deploy.models.pipeline_model import PipelineModel

    MakeResult = Callable[..., Result]

__all__ = ["emoji", "mini_emoji", "mini_trajectories", "mini_unet"]  # fixtures


@pytest.fixture(scope="session")
def compared() -> ComparedModel:
    """The model that the comparison is about; not to be changed."""
    return ComparedModel.load()


@pytest.fixture
def small_dit(
    tmp_path_factory: pytest.TempPathFactory,
    emoji: PipelineModel,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """The compared transformer's name, which stands for a small one with random weights; it draws
    64x64 pixels, as the embedded model's judge takes them.
    """
    assert emoji.judge_folder is not None
    folder = pixart_of_flow(tmp_path_factory.mktemp("dit"), sample_size=32, patch_size=4)
    shutil.copytree(emoji.judge_folder, folder / "judge")
    (folder / "prompts.txt").write_text("\n".join(emoji.prompts[:40]))
    defaults = KNOWN_MODELS[EMBEDDED].defaults
    steps = {"temporal_steps": 1, "sensitive_steps": 2, "batch": 4}
    own = {
        "finetuning": {**defaults["finetuning"], **steps},
        "guidance": 4.0,
        "eight_bit_layers": ("*.ff.net.2",),
    }
    monkeypatch.setitem(KNOWN_MODELS, TRANSFORMER, KnownModel(folder=folder, defaults=own))
    return TRANSFORMER


@pytest.fixture
def few(compared: ComparedModel, monkeypatch: pytest.MonkeyPatch) -> ComparedModel:
    """The model with few samples, steps of finetuning and images."""
    from scripts.bench.methods import worker

    monkeypatch.setattr(worker, "HELD_OUT_SAMPLES", 2)
    model = compared.on(compared.schedule)
    model.calibration_samples, model.evaluation_images = 2, 6
    model.eight_bit_layers = ("*.conv_shortcut*",)  # which mini_emoji's UNet has too
    steps = {"temporal_steps": 1, "sensitive_steps": 2, "batch": 4}
    model.finetuning = {**model.finetuning, **steps}
    return model


@pytest.fixture(scope="session")
def definitions(compared: ComparedModel) -> dict[Cell, dict[str, Any]]:
    """What every cell is measured under."""
    return {cell: definition_of(cell, compared) for cell in all_cells()}


def measurement(distance: float = 1.0, **changed: Any) -> dict[str, Any]:
    """What a worker sends at the end; ``distance`` is the Fréchet distance."""
    quality = {
        "psnr": 20.0,
        "ssim": 0.75,
        "pixel_mse": 0.04,
        "epsilon_mse": [0.5, *[0.03] * 9, *[0.001] * 10],
        "frechet_distance": distance,
        "top1": 0.5,
        "top5": 0.9,
        "feature_distance": distance / 10,
    }
    measured = {
        "quality": quality,
        "payload_bytes": 2_000_000,
        "cpu_seconds": {"trajectories": 10.0, "calibration": 5.0},
        "wall_seconds": 40.0,
        "process_seconds": 30.0,
        "notes": {},
        "environment": {"threads": 1, "processor": "a CPU", "python": "3.11.7", "torch": "2.13.0"},
    }
    return {**measured, **changed}


@pytest.fixture
def result(definitions: dict[Cell, dict[str, Any]]) -> MakeResult:
    """Make the result of a cell; see :func:`measurement`."""

    def make(cell: Cell, distance: float = 1.0, **changed: Any) -> Result:
        made = Result.from_json(definitions[cell], measurement(distance))
        return dataclasses.replace(made, **changed)

    return make
