"""Which layers are quantized, and which of them read the same tensor.

Nothing here knows what a UNet is: the layers are the model's Conv2d and Linear modules, in execution order, and layers share a
site where a probe batch shows that their inputs are equal, bit for bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quest_deploy.scheme import Scheme

QUANTIZABLE = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class LayerPlan:
    """A layer to quantize.

    Attributes:
        name: its module path.
        weight_bits: 4 or 8.
        macs: multiply-adds for one sample of the probe's size.
    """

    name: str
    weight_bits: int
    macs: int


@dataclass(frozen=True)
class SitePlan:
    """A tensor to quantize.

    Attributes:
        name: the module path of the first layer that reads it.
        bits: 4 or 8.
        axis: the channel axis of the tensor, never negative.
        layers: the module paths of all layers that read it, in execution order.
    """

    name: str
    bits: int
    axis: int
    layers: tuple[str, ...]


@dataclass(frozen=True)
class QuantizationPlan:
    """All layers, and all sites, in execution order."""

    layers: tuple[LayerPlan, ...]
    sites: tuple[SitePlan, ...]


@dataclass(frozen=True)
class _Seen:
    name: str
    input_hash: bytes
    axis: int
    macs: int


@torch.no_grad()
def plan_quantization(model: nn.Module, probe: Mapping[str, Tensor], scheme: Scheme) -> QuantizationPlan:
    """Run ``model(**probe)`` once and plan the quantization of every Conv2d and Linear it executes.

    Args:
        probe: the model's inputs, ``sample`` among them; random and different for each sample, so that equal layer inputs mean
            the same tensor.

    Raises:
        InputError: the model executes no Conv2d or Linear.
    """
    seen = _execute(model, probe)
    if not seen:
        raise InputError("the model executes no Conv2d and no Linear layer: there is nothing to quantize")
    # The first layer is the one that reads the sample; embeddings of the timestep may run before it.
    sample = _content_hash(probe["sample"])
    ends = {next((layer for layer in seen if layer.input_hash == sample), seen[0]).name, seen[-1].name}

    def bits_of(name: str, bits: int) -> int:
        return scheme.first_last_bits if name in ends else bits

    readers: dict[tuple[bytes, int], list[_Seen]] = {}
    for layer in seen:
        readers.setdefault((layer.input_hash, layer.axis), []).append(layer)
    sites = tuple(
        SitePlan(
            name=group[0].name,
            bits=max(bits_of(layer.name, scheme.activation_bits) for layer in group),
            axis=group[0].axis,
            layers=tuple(layer.name for layer in group),
        )
        for group in readers.values()
    )
    layers = tuple(LayerPlan(layer.name, bits_of(layer.name, scheme.weight_bits), layer.macs) for layer in seen)
    return QuantizationPlan(layers, sites)


def _execute(model: nn.Module, probe: Mapping[str, Tensor]) -> list[_Seen]:
    seen: dict[str, _Seen] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name in seen:
                raise InputError(f"layer {name} runs twice in one forward pass; its activations would need two quantizers")
            seen[name] = _Seen(name, _content_hash(args[0]), _channel_axis(module, args[0]), _macs(module, output))

        return hook

    handles = [m.register_forward_hook(record(n)) for n, m in model.named_modules() if isinstance(m, QUANTIZABLE)]
    try:
        model(**probe)
    finally:
        for handle in handles:
            handle.remove()
    return list(seen.values())


def _channel_axis(module: nn.Module, x: Tensor) -> int:
    return 1 if isinstance(module, nn.Conv2d) else x.dim() - 1


def _macs(module: nn.Module, output: Tensor) -> int:
    weight = module.get_parameter("weight")
    per_output = weight.numel() // weight.shape[0]
    return output.numel() // output.shape[0] * per_output


def _content_hash(x: Tensor) -> bytes:
    digest = hashlib.sha256(str(tuple(x.shape)).encode())
    digest.update(x.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.digest()
