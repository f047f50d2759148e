from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from scripts.bench.methods.cells import Cell, all_cells
from scripts.bench.methods.digits.model import DigitsModel
from scripts.bench.methods.recipes import definition_of
from scripts.bench.methods.results import Result
from tests.quest_deploy.conftest import mini_trajectories, mini_unet
from tests.quest_deploy.support import MINI_EMOJI_UNET

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    MakeResult = Callable[..., Result]

__all__ = ["mini_trajectories", "mini_unet"]  # fixtures


@pytest.fixture(scope="session")
def digits() -> DigitsModel:
    """The model that the comparison is about."""
    return DigitsModel()


@pytest.fixture
def mini_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its UNet is one of 27 layers with random weights during the test."""
    import torch
    from diffusers import UNet2DConditionModel

    channels = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 32}

    def load_unet(model: DigitsModel) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet: nn.Module = UNet2DConditionModel(**{**MINI_EMOJI_UNET, **channels})
        return unet.eval()

    monkeypatch.setattr(DigitsModel, "load_unet", load_unet)


@pytest.fixture(scope="session")
def definitions(digits: DigitsModel) -> dict[Cell, dict[str, Any]]:
    """What every cell is measured under."""
    return {cell: definition_of(cell, digits) for cell in all_cells()}


def measurement(distance: float = 1.0, **changed: Any) -> dict[str, Any]:
    """What a worker sends at the end; ``distance`` is the Fréchet distance."""
    quality = {
        "frechet_distance": distance,
        "accuracy": 0.9,
        "pixel_mse": 0.01,
        "epsilon_mse": [0.5, *[0.03] * 9, *[0.001] * 10],
    }
    measured = {
        "quality": quality,
        "seconds": {"trajectories": 10.0, "calibration": 5.0},
        "peak_memory_bytes": {"trajectories": 900_000_000, "calibration": 700_000_000},
        "wall_seconds": 40.0,
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
