"""Rotations and branches change how a model is quantized, not what it computes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch

from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.calibration.ptq import CalibrationOptions, calibrate
from scripts.bench.methods.low_rank import Branched, add_branches
from scripts.bench.methods.rotation import hadamard, rotate_attention
from tests.helpers import refused

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quest_deploy.calibration.trajectories import Trajectories

CONV, LINEAR = (
    "up_blocks.0.resnets.0.conv_shortcut",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
)


def output(unet: nn.Module, trajectories: Trajectories) -> Tensor:
    with torch.no_grad():
        found: Tensor = unet(**next(trajectories.batches(4)), return_dict=False)[0]
    return found


@pytest.mark.parametrize("order", [1, 2, 4, 12, 16, 24, 40, 64, 80, 160])
def test_a_hadamard_matrix_is_orthonormal_and_of_equal_magnitudes(order: int) -> None:
    matrix = hadamard(order)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5))


def test_an_order_without_a_hadamard_matrix_is_refused() -> None:
    with refused(6):
        hadamard(6)


def test_a_rotated_model_computes_the_same_with_other_weights(
    mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    rotated = copy.deepcopy(mini_unet)
    rotate_attention(rotated)
    expected = output(mini_unet, mini_trajectories)
    torch.testing.assert_close(output(rotated, mini_trajectories), expected, atol=1e-5, rtol=1e-4)
    names = ("to_q", "to_k", "to_v", "to_out.0")
    for name, layer in mini_unet.named_modules():
        if name.endswith(names):
            other = rotated.get_submodule(name)
            assert not torch.allclose(other.get_parameter("weight"), layer.get_parameter("weight"))


def test_a_branch_computes_with_its_layer_what_the_layer_did_and_takes_its_largest_part(
    mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    scheme = Scheme.parse("w4a4", buckets=3)
    calibrated = calibrate("mini", mini_unet, mini_trajectories, scheme, CalibrationOptions())
    branched = copy.deepcopy(mini_unet)
    add_branches(branched, calibrated, (CONV, LINEAR), 2)
    expected = output(mini_unet, mini_trajectories)
    torch.testing.assert_close(output(branched, mini_trajectories), expected, atol=1e-4, rtol=1e-3)
    for name in (CONV, LINEAR):
        found = branched.get_submodule(name)
        assert isinstance(found, Branched)
        assert found.up.dtype == found.down.dtype == torch.float16
        channel = torch.from_numpy(calibrated.quantizer_of(name).channel)
        weight = mini_unet.get_submodule(name).get_parameter("weight").flatten(1) * channel
        left = found.residual.weight.flatten(1) * channel
        largest = torch.linalg.svdvals(weight)
        torch.testing.assert_close(
            torch.linalg.svdvals(left)[: len(largest) - 2], largest[2:], atol=2e-3, rtol=0
        )
