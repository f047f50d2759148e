"""Attention in rotated coordinates (QuaRot, arXiv 2404.00456): q, k and v of every head times a
Hadamard matrix H, which spreads outliers over a head's channels before they are quantized.

Nothing is computed online. (q H)(k H)^T = q k^T, so H folds into the weights of q and k, and what v
is rotated by, the projection behind it undoes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers.models.attention_processor import Attention

from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn


@torch.no_grad()
def rotate_attention(unet: nn.Module) -> None:
    """Fold the rotations into the weights of ``unet``, which computes the same as before."""
    for module in unet.modules():
        if not isinstance(module, Attention):
            continue
        heads = module.heads
        rotation = hadamard(module.to_q.weight.shape[0] // heads)
        for layer in (module.to_q, module.to_k, module.to_v):
            for parameter in (layer.weight, layer.bias):
                if parameter is not None:
                    split: Tensor = parameter.unflatten(0, (heads, -1))
                    parameter.copy_(torch.einsum("hd...,de->he...", split, rotation).flatten(0, 1))
        weight = module.to_out[0].get_parameter("weight")
        split = weight.unflatten(1, (heads, -1))
        weight.copy_(torch.einsum("ohd,de->ohe", split, rotation).flatten(1))


def hadamard(order: int) -> Tensor:
    """An orthonormal matrix of entries +-1 / sqrt(order), float32 [order, order]: Sylvester's and
    Paley's constructions, which give all orders that heads have (16, 24, 40, 64, 80, 160, ...).
    """
    base = order
    while base > 1 and not (base % 4 == 0 and _is_prime(base - 1)):
        if base % 2:
            raise InputError(f"expected a size of heads with a known Hadamard matrix, not {order}")
        base //= 2
    signs: Tensor = _paley(base) if base > 1 else torch.ones(1, 1)
    while len(signs) < order:
        signs = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), signs)
    rotation: Tensor = signs / order**0.5
    return rotation


def _paley(order: int) -> Tensor:
    """Paley's first construction, of a prime ``order`` - 1 that is 3 modulo 4."""
    prime = order - 1
    residues = torch.zeros(prime) - 1
    residues[[i * i % prime for i in range(1, prime)]] = 1
    residues[0] = 0
    index = torch.arange(prime)
    skew = torch.zeros(order, order)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = residues[(index[:, None] - index[None]) % prime]
    return torch.eye(order) + skew


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))
