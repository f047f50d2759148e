"""Rotations change how a model is quantized, not what it computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from quest_deploy.calibration.trajectories import Trajectories
from scripts.bench.methods.rotation import hadamard, rotate_attention
from tests.helpers import refused


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
