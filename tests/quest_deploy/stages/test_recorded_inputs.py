"""What a graph takes of what was recorded, and what stands for it where nothing was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from quest_deploy.artifacts.checkpoint import Checkpoint
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import TRAJECTORIES, Workspace
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.models.residuals import adapter_residuals, controlnet_residuals
from quest_deploy.stages.added_inputs import recorded_inputs
from quest_deploy.stages.calibrate import _kept
from tests.helpers import refused

CONFIG = {
    "block_out_channels": (2, 3),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 5,
}
"""Twelve skip connections."""
UNET: Any = SimpleNamespace(class_name="UNet2DConditionModel", config=CONFIG, official_sums=False)
CONTROLNET, ADAPTER = controlnet_residuals(CONFIG), adapter_residuals(CONFIG)


def recorded(root: Path, kinds: Any, **scheme: Any) -> Workspace:
    """A workspace with six rows at two steps, of which two have the residuals of ``kinds``."""
    workspace = Workspace.create(root, "emoji", Scheme.parse("w4a4", **scheme))
    sample = torch.zeros(2, 6, 4, 8, 8)
    residuals = {name: torch.ones(2, 2, *x.shape(8, 8)) for name, x in kinds.items()}
    timestep = torch.tensor([900.0, 300.0])
    Trajectories(sample, timestep, sample.clone(), {}, residuals=residuals).save(
        workspace.path(TRAJECTORIES)
    )
    return workspace


def taken(workspace: Workspace, **wanted: bool | None) -> dict[str, Any]:
    both = {"controlnet": None, "t2i_adapter": None, **wanted}
    return recorded_inputs(workspace, UNET, both).residuals


def test_recorded_inputs_are_in_the_models_order_not_in_the_files(tmp_path: Path) -> None:
    found = taken(recorded(tmp_path / "ws", {**ADAPTER, **CONTROLNET}))
    assert list(found) == [*CONTROLNET, *ADAPTER]
    assert "down_block_additional_residual_11" in found


def test_those_that_are_not_wanted_are_left_away_and_others_kept(tmp_path: Path) -> None:
    workspace = recorded(tmp_path / "ws", {**ADAPTER, **CONTROLNET})
    assert list(taken(workspace, controlnet=False)) == list(ADAPTER)
    assert list(taken(workspace, t2i_adapter=False)) == list(CONTROLNET)


def test_where_nothing_was_recorded_numbers_stand_for_it_in_half_of_the_rows(
    tmp_path: Path,
) -> None:
    found = taken(recorded(tmp_path / "ws", {}), controlnet=True)
    assert list(found) == list(CONTROLNET)
    assert all(x.shape[:2] == (2, 3) and x.flatten(2).any(2).all() for x in found.values())
    beside = taken(recorded(tmp_path / "other", ADAPTER), controlnet=True)
    assert {x.shape[1] for x in beside.values()} == {2}


def test_split_shortcuts_refuse_a_controlnet_that_was_not_recorded(tmp_path: Path) -> None:
    split = recorded(tmp_path / "ws", {}, split_shortcuts=True)
    with refused("--controlnet-inputs", "--controlnet", "--whole-shortcuts"):
        taken(split, controlnet=True)
    assert list(taken(split, t2i_adapter=True)) == list(ADAPTER)
    assert list(taken(recorded(tmp_path / "other", CONTROLNET, split_shortcuts=True)))


def test_an_interrupted_reconstruction_goes_on_with_the_recorded_residuals(
    tmp_path: Path, small_checkpoint: Checkpoint
) -> None:
    sample, timestep = torch.zeros(2, 6, 4, 8, 8), torch.tensor([900.0, 300.0])
    residuals = {name: torch.rand(2, 2, *x.shape(8, 8)) for name, x in CONTROLNET.items()}
    made = Trajectories(sample, timestep, sample.clone(), {}, residuals=residuals)

    def fails() -> Any:
        raise AssertionError

    for make in (lambda: (made, small_checkpoint), fails):
        found, _ = _kept(tmp_path, {}, make)
        assert found.residuals.keys() == residuals.keys()
        assert all(torch.equal(found.residuals[name], x) for name, x in residuals.items())
