"""Which quantizers a record of the reference holds, where it cannot hold them all.

At Stable Diffusion's size the activations of all quantizers, their layers' outputs and the probes
are gigabytes in every bucket. So a record has a size that it must not exceed, and the records take
turns: each holds as many as fit of those quantizers on which the records before it spent least.
    What a
quantizer costs includes what the float part in front of it reads: the outputs of the layers
upstream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quest_deploy.artifacts.checkpoint import ActivationQuantizerData
from quest_deploy.artifacts.reference import OUTPUT
from quest_deploy.quantization.layers import QuantizedSplit

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.artifacts.checkpoint import Checkpoint
    from quest_deploy.quantization.model import QuantizedModel

ROWS, REAL_ROWS = 4, 2
"""Of a record: all, and those that are the real activations of two samples."""


@dataclass(frozen=True)
class Structure:
    """What one pass of the model shows of its float parts.

    Attributes:
        sites, outputs, operands: the numbers that one sample has, of each quantizer's tensor, of
        each
            layer's and product's output, and of each product's float operands together.
        upstream: for each quantizer, each product with a float operand, and the output: the layers
            and products whose outputs the float part in front of it reads.
    """

    sites: dict[str, int]
    outputs: dict[str, int]
    operands: dict[str, int]
    upstream: dict[str, frozenset[str]]


def structure(model: QuantizedModel, inputs: dict[str, Tensor]) -> Structure:
    """Run one sample and read the autograd graph, which goes back from each quantizer to the layers
    in front of it.

    Nothing is saved for a backward pass, so that it costs no more memory than inference.
    """
    quantizers: dict[str, int] = {}
    outputs: dict[str, int] = {}
    operands: dict[str, int] = {}
    upstream: dict[str, set[str]] = {}
    sources: dict[Any, tuple[str, ...]] = {}
    layers = {layer: name for name, layer in model.quantized_layers().items()}

    def reads(name: str, x: Tensor) -> None:
        upstream.setdefault(name, set()).update(_sources_of(x, sources))

    def quantizer_read(name: str, x: Tensor) -> None:
        quantizers[name] = x[0].numel()
        reads(name, x)

    def operands_read(name: str, args: tuple[Tensor, ...]) -> None:
        floats = [
            x
            for x, quantizer in zip(args, model.checkpoint.matmuls[name].sites, strict=True)
            if quantizer is None
        ]
        operands[name] = sum(x[0].numel() for x in floats)
        for x in floats:
            reads(name, x)

    def computed(names: tuple[str, ...], y: Tensor) -> None:
        outputs.update(dict.fromkeys(names, y[0].numel()))
        sources[y.grad_fn] = names

    handles: list[Any] = []
    for name, quantizer in model.activation_quantizers().items():
        handles.append(
            quantizer.register_forward_pre_hook(
                lambda module, args, name=name: quantizer_read(name, args[0])
            )
        )
    for name, product in model.quantized_matmuls().items():
        handles.append(
            product.register_forward_pre_hook(
                lambda module, args, name=name: operands_read(name, args)
            )
        )
        handles.append(
            product.register_forward_hook(lambda module, args, y, name=name: computed((name,), y))
        )
    for layer, name in layers.items():
        handles.append(
            layer.register_forward_hook(lambda module, args, y, name=name: computed((name,), y))
        )
    for split in (module for module in model.modules() if isinstance(module, QuantizedSplit)):
        names = (layers[split.first], layers[split.second])
        handles.append(
            split.register_forward_hook(lambda module, args, y, names=names: computed(names, y))
        )
    first = {
        name: value[:1].clone().requires_grad_(value.is_floating_point())
        for name, value in inputs.items()
    }
    try:
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(lambda x: None, _nothing_saved),
        ):
            reads(OUTPUT, model(**first))
    finally:
        for handle in handles:
            handle.remove()
    return Structure(
        quantizers, outputs, operands, {name: frozenset(found) for name, found in upstream.items()}
    )


def _nothing_saved(saved: None) -> Tensor:
    raise RuntimeError("this graph is read, not run backward")


def _sources_of(x: Tensor, sources: dict[Any, tuple[str, ...]]) -> set[str]:
    """The names of those ``sources`` from which x was computed without another of them between."""
    found: set[str] = set()
    left, seen = [x.grad_fn], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in sources:
            found.update(sources[node])
        else:
            left += [following for following, _ in node.next_functions]
    return found


@dataclass(frozen=True)
class Sample:
    """What one record holds.

    Attributes:
        sites: whose activations, probes and codes it holds, in the checkpoint's order; and all
            outputs of their readers.
        products: those of which it holds all quantized operands.
        outputs: the layers and products whose real outputs it holds: those readers, and what is
            upstream of quantizers and products.
    """

    sites: tuple[str, ...]
    products: tuple[str, ...]
    outputs: frozenset[str]


def sample_of(checkpoint: Checkpoint, found: Structure, quantizers: Iterable[str]) -> Sample:
    """The sample that holds ``quantizers``."""
    chosen = set(quantizers)
    products = [
        p.name for p in checkpoint.matmuls.values() if chosen.issuperset(filter(None, p.sites))
    ]
    outputs = {
        reader
        for quantizer in chosen
        for reader in checkpoint.quantizers[quantizer].layers
        if reader in checkpoint.layers
    } | set(products)
    outputs.update(*(found.upstream.get(name, ()) for name in (*chosen, *products, OUTPUT)))
    return Sample(
        tuple(name for name in checkpoint.quantizers if name in chosen),
        tuple(products),
        frozenset(outputs),
    )


def choose(checkpoint: Checkpoint, found: Structure, records: int, limit: int) -> list[Sample]:
    """Return what each of ``records`` records holds: at most ``limit`` bytes, or what the output
    alone needs.

    A product's operands are chosen together. Those on which the records before spent the fewest
    bytes go first, so those that none has, and of these the checkpoint's order, in which neighbours
    share what is upstream. A quantizer larger than the limit is never chosen.
    """
    paired = {quantizer for product in checkpoint.matmuls.values() for quantizer in product.sites}
    units = [
        tuple(quantizer for quantizer in product.sites if quantizer is not None)
        for product in checkpoint.matmuls.values()
    ]
    units += [(quantizer,) for quantizer in checkpoint.quantizers if quantizer not in paired]
    order = {name: i for i, name in enumerate(checkpoint.quantizers)}
    units.sort(key=lambda unit: order[unit[0]])
    cost = {
        unit: record_bytes(checkpoint, found, sample_of(checkpoint, found, unit)) for unit in units
    }
    spent = dict.fromkeys(units, 0)
    samples = []
    for _ in range(records):
        chosen: set[str] = set()
        for unit in sorted(units, key=lambda unit: spent[unit]):
            if (
                record_bytes(checkpoint, found, sample_of(checkpoint, found, chosen | set(unit)))
                <= limit
            ):
                chosen |= set(unit)
                spent[unit] += cost[unit]
        samples.append(sample_of(checkpoint, found, chosen))
    return samples


def record_bytes(checkpoint: Checkpoint, found: Structure, sample: Sample) -> int:
    """About what a record of ``sample`` takes: in float32, its codes as they are."""
    checked = {
        reader
        for quantizer in sample.sites
        for reader in checkpoint.quantizers[quantizer].layers
        if reader in checkpoint.layers
    }
    checked |= set(sample.products)
    of_codes = {
        quantizer: 1 if isinstance(checkpoint.quantizers[quantizer], ActivationQuantizerData) else 4
        for quantizer in sample.sites
    }
    size = sum(
        ROWS * (4 + of_codes[quantizer]) * found.sites[quantizer] for quantizer in sample.sites
    )
    size += sum(ROWS * 4 * found.operands[product] for product in sample.products)
    return size + sum(
        (ROWS if name in checked else REAL_ROWS) * 4 * found.outputs[name]
        for name in sample.outputs
    )
