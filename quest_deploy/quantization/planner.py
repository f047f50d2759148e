"""Which layers and products are quantized, and which layers read the same tensor.

Nothing here knows what a UNet is: the layers are the model's Conv2d and Linear modules, in
execution order, and layers share a quantizer where a probe batch shows that their inputs are equal,
bit for bit. Products of two activations have a quantizer for each operand.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from quest_deploy.artifacts.scheme import Symmetry, usual_symmetry
from quest_deploy.errors import InputError
from quest_deploy.quantization.layer_kinds import layers_matching
from quest_deploy.quantization.prepare import Product

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quest_deploy.artifacts.scheme import Scheme

QUANTIZABLE = (nn.Conv2d, nn.Linear)
_COUNT, _NUMBERS = itertools.count(), WeakTensorKeyDictionary()
"""Of tensors without values: an object's id is given to another once it is gone."""


@dataclass(frozen=True)
class LayerPlan:
    """A layer to quantize.

    Attributes:
        name: its module path.
        weight_bits: 4, 7 or 8.
        macs: multiply-adds for one sample of the probe's size.
    """

    name: str
    weight_bits: int
    macs: int


@dataclass(frozen=True)
class QuantizerPlan:
    """A tensor to quantize.

    Attributes:
        name: the module path of the first layer that reads it, or for an operand
            ``<attention>.<operand>``.
        bits: 4 or 8.
        axis: the channel axis of the tensor, never negative.
        layers: the module paths of all layers that read it, in execution order, or of the one
            product.
        operand: 0 or 1, which operand of the product it is; None for the input of layers.
    """

    name: str
    bits: int
    symmetry: Symmetry
    axis: int
    layers: tuple[str, ...]
    operand: int | None = None


@dataclass(frozen=True)
class AttentionMatmulPlan:
    """A product of two activations; see
    :class:`quest_deploy.artifacts.checkpoint.AttentionMatmulData`."""

    name: str
    sites: tuple[str | None, str | None]
    macs: int


@dataclass(frozen=True)
class QuantizationPlan:
    """All layers, all products, and all quantizers, in execution order."""

    layers: tuple[LayerPlan, ...]
    matmuls: tuple[AttentionMatmulPlan, ...]
    quantizers: tuple[QuantizerPlan, ...]


@dataclass(frozen=True)
class _Seen:
    name: str
    input_hash: bytes
    axis: int
    macs: int
    batched: bool = True
    operands: tuple[str, str] | None = None


@torch.no_grad()
def plan_quantization(
    model: nn.Module, probe: Mapping[str, Tensor], scheme: Scheme
) -> QuantizationPlan:
    """Run ``model(**probe)`` once and plan the quantization of every Conv2d, Linear and Product it
    executes, but for the layers that the scheme leaves in float.

    Args:
        probe: the model's inputs, ``sample`` among them; random and different for each sample, so
            that equal layer inputs mean the same tensor. The model may be one of fake tensors.

    Raises:
        InputError: the model executes no Conv2d or Linear, or none that is to have eight bits or to
            stay in float, or one that is to be quantized twice on different inputs, or whose
            input's first axis is not the batch, so that its rows have no timestep.
    """
    executed, twice = _execute(model, probe)
    layers = [entry for entry in executed if entry.operands is None]
    left = layers_matching((x.name for x in layers), scheme.float_layers, "no quantizers")
    seen = [layer for layer in layers if layer.name not in left]
    if again := [name for name in twice if name not in left]:
        raise InputError(
            f"layer {again[0]} runs twice in one forward pass on different inputs; its activations "
            "would need two quantizers"
        )
    if flattened := [layer.name for layer in seen if not layer.batched]:
        raise InputError(
            f"layer {flattened[0]}: expected an input [batch, ...], one row for each timestep, and "
            "its first axis is not the batch; leave it in float, with --float-layers"
        )
    if not seen:
        raise InputError(
            "the model executes no Conv2d and no Linear layer that does not stay in float: there "
            "is nothing to quantize"
        )
    # The first layer is the one that reads the sample, or else, where the model changes it before
    # (center_input_sample), the first convolution; embeddings of the timestep may run before it.
    sample = _content_hash(probe["sample"])
    reading = [layer for layer in layers if layer.input_hash == sample]
    convolutions = [x for x in layers if isinstance(model.get_submodule(x.name), nn.Conv2d)]
    first = (reading or convolutions or layers)[0]
    ends = {first.name, layers[-1].name}

    eight = layers_matching((x.name for x in seen), scheme.eight_bit_layers, "eight bits")

    def bits_of(name: str, bits: int) -> int:
        if name in ends:
            return scheme.first_last_bits
        return 8 if name in eight else bits

    readers: dict[tuple[bytes, int], list[_Seen]] = {}
    for layer in seen:
        readers.setdefault((layer.input_hash, layer.axis), []).append(layer)
    quantizers: list[QuantizerPlan] = []
    products: list[AttentionMatmulPlan] = []
    for entry in executed:
        if entry.name in left:
            continue
        if entry.operands is not None:
            operands = _operand_quantizers(entry, scheme)
            quantizers += [quantizer for quantizer in operands if quantizer is not None]
            names = tuple(None if quantizer is None else quantizer.name for quantizer in operands)
            if any(names):
                products.append(AttentionMatmulPlan(entry.name, (names[0], names[1]), entry.macs))
            continue
        group = readers[entry.input_hash, entry.axis]
        if group[0] is entry:
            bits = max(bits_of(layer.name, scheme.activation_bits) for layer in group)
            quantizers.append(
                QuantizerPlan(
                    entry.name,
                    bits,
                    usual_symmetry(bits),
                    entry.axis,
                    tuple(layer.name for layer in group),
                )
            )
    planned = tuple(
        LayerPlan(layer.name, bits_of(layer.name, scheme.weight_bits), layer.macs) for layer in seen
    )
    return QuantizationPlan(planned, tuple(products), tuple(quantizers))


def _operand_quantizers(
    product: _Seen, scheme: Scheme
) -> tuple[QuantizerPlan | None, QuantizerPlan | None]:
    assert product.operands is not None
    attention = product.name.rpartition(".")[0]

    def quantizer(index: int, operand: str) -> QuantizerPlan | None:
        softmax = operand == "softmax"
        bits = scheme.softmax_bits if softmax else scheme.attention_bits
        if bits is None:
            return None
        symmetry = Symmetry.UNSIGNED if softmax else usual_symmetry(bits)
        return QuantizerPlan(
            f"{attention}.{operand}", bits, symmetry, product.axis, (product.name,), index
        )

    return quantizer(0, product.operands[0]), quantizer(1, product.operands[1])


def _execute(model: nn.Module, probe: Mapping[str, Tensor]) -> tuple[list[_Seen], list[str]]:
    """What the model executes, in order, and the names of those of it that run again on another
    input; one that runs again on an equal one, as an embedder that two places ask, counts once.
    """
    seen: dict[str, _Seen] = {}
    twice: list[str] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, Product):
                macs = output[0].numel() * args[0].shape[-1]
                entry = _Seen(name, b"", args[0].dim() - 1, macs, operands=module.operands)
            else:
                found, axis = _content_hash(args[0]), _channel_axis(module, args[0])
                batched = len(args[0]) == len(probe["sample"])
                entry = _Seen(name, found, axis, _macs(module, output), batched)
            before = seen.setdefault(name, entry)
            if before is not entry and (entry.operands or before != entry):
                twice.append(name)

        return hook

    quantizable = (*QUANTIZABLE, Product)
    handles = [
        m.register_forward_hook(record(n))
        for n, m in model.named_modules()
        if isinstance(m, quantizable)
    ]
    try:
        model(**probe)
    finally:
        for handle in handles:
            handle.remove()
    return list(seen.values()), twice


def _channel_axis(module: nn.Module, x: Tensor) -> int:
    return 1 if isinstance(module, nn.Conv2d) else x.dim() - 1


def _macs(module: nn.Module, output: Tensor) -> int:
    weight = module.get_parameter("weight")
    per_output = weight.numel() // weight.shape[0]
    return output.numel() // output.shape[0] * per_output


def _content_hash(x: Tensor) -> bytes:
    """What equal tensors have in common: their content, or of those without one, which are traced
    by their shape alone, that they are the same object.
    """
    if isinstance(x, FakeTensor):
        number: int = _NUMBERS.setdefault(x, next(_COUNT))
        return number.to_bytes(8, "little")
    digest = hashlib.sha256(str(tuple(x.shape)).encode())
    digest.update(x.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.digest()
