"""An imported model beside the official one, quantizer by quantizer and layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quest_deploy.importers.read import OfficialCheckpoint
from quest_deploy.quantization.model import QuantizedModel
from tests.quest_deploy.importers.official import Quantized


@dataclass
class Comparison:
    """What differed.

    Attributes:
        codes: quantizers that gave other codes for the official quantizer's own input.
        layers: the largest relative error of each layer, given the official layer's own input.
        inputs: quantizers that saw other values end to end, be it in the last bit, where every code
            before them was the official one.
        flips: for every code that differed end to end, how far the official value lay from a
            rounding tie, in ulp.
        output: the relative error end to end, each flipped code set to the official one.
    """

    codes: list[str] = field(default_factory=list)
    layers: dict[str, float] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    flips: list[float] = field(default_factory=list)
    output: float = math.nan


@torch.no_grad()
def compare(
    model: QuantizedModel,
    official: OfficialCheckpoint,
    run: Quantized,
    inputs: dict[str, Tensor],
    output: Tensor,
) -> Comparison:
    """Compare ``model`` with ``run``, the official quantizers after a forward pass on the same
    inputs that gave ``output``.
    """
    found, quantizers = Comparison(), _official_quantizers(official)
    batch = len(inputs["sample"])

    def hook(name: str) -> Any:
        quantizer, kind = quantizers[name]

        def ours(values: Tensor) -> Tensor:
            return _in_diffusers_layout(values, name, batch, kind)

        x, codes, ratio = (
            ours(values[quantizer]) for values in (run.inputs, run.codes, run.ratios)
        )

        def compare_quantizer(site: Any, args: tuple[Tensor], result: Tensor) -> Tensor:
            # Calling forward itself passes by this hook.
            if not torch.equal(
                site.forward(x), value := codes * site.step(x, site.current_bucket())
            ):
                found.codes.append(name)
            if not torch.equal(args[0], x):
                found.inputs.append(name)
            flipped = result != value
            found.flips.extend(_ulps_from_tie(ratio[flipped]).tolist())
            return torch.where(flipped, value, result)

        return compare_quantizer

    handles = [
        site.register_forward_hook(hook(name))
        for name, site in model.activation_quantizers().items()
    ]
    try:
        result = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    found.output = relative(result, output)
    _compare_layers(found, model, official, run, inputs["timestep"], quantizers)
    return found


def relative(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


def _compare_layers(
    found: Comparison,
    model: QuantizedModel,
    official: OfficialCheckpoint,
    run: Quantized,
    timestep: Tensor,
    quantizers: dict[str, tuple[str, str]],
) -> None:
    layers = model.quantized_layers()
    with model.at_timesteps(timestep):
        for layer in official.names.layers:
            y = run.outputs[layer.name]
            parts = [
                name
                for name in layers
                if name in layer.targets or name.rpartition(".")[0] in layer.targets
            ]
            results = []
            for name in parts:
                quantizer, kind = quantizers[name]
                results.append(
                    layers[name](_in_diffusers_layout(run.inputs[quantizer], name, len(y), kind))
                )
            if len(parts) == 3:
                heads = official.names.heads[layer.name]
                whole = torch.cat(
                    [r.unflatten(-1, (heads, 1, -1)) for r in results], dim=-2
                ).flatten(-3)
            else:
                whole = sum(results[1:], results[0])
            if whole.dim() == 3 and layer.name.endswith(("qkv", "proj_out")):
                whole = whole.transpose(1, 2)
            found.layers[layer.name] = relative(whole, y)


def _official_quantizers(official: OfficialCheckpoint) -> dict[str, tuple[str, str]]:
    """By our layer's or operand's name: the official quantizer, and what kind of tensor it sees."""
    found = {}
    for layer in official.names.layers:
        if official.split and layer.halves:
            found[f"{layer.targets[0]}.first"] = (f"model.{layer.name}.act_quantizer", "layer")
            found[f"{layer.targets[0]}.second"] = (f"model.{layer.name}.act_quantizer_0", "layer")
        else:
            kind = "tokens" if layer.tokens else "layer"
            found |= dict.fromkeys(layer.targets, (f"model.{layer.name}.act_quantizer", kind))
    for operand in official.names.operands:
        kind = "channels first" if "matmul" in operand.name else "operand"
        found[f"{operand.attention}.{operand.operand}"] = (f"model.{operand.name}", kind)
    return found


def _in_diffusers_layout(values: Tensor, name: str, batch: int, kind: str) -> Tensor:
    if kind == "layer":
        return values
    if kind == "tokens":
        return values.transpose(1, 2)
    values = values.unflatten(0, (batch, -1))
    operand = name.rpartition(".")[2]
    if kind == "channels first":  # q, k and v are [.., d, tokens]
        return values.transpose(2, 3) if operand in ("q", "v") else values
    return values.transpose(2, 3) if operand == "k" else values


def _ulps_from_tie(ratio: Tensor) -> Tensor:
    ulp = torch.nextafter(ratio.abs(), torch.tensor(math.inf)) - ratio.abs()
    return (ratio - (torch.floor(ratio) + 0.5)).abs() / ulp
