"""Reference inputs and outputs of the fake-quantized torch modules: what every engine is verified
against.

Saved in files, so that verifying needs neither torch nor the model. A record covers one pair of
timestep buckets with one batch, so each record also tests that every sample gets its own bucket's
scales. It holds

- end to end: the inputs of two samples (one at the lowest timestep of its bucket, one at the
  highest) and the model's outputs;
- per layer: those two samples' real activations, and two probes of values close to rounding ties,
  up to and beyond the clip bounds, which any wrong scale or bound sends to another code; with the
  codes and each layer's output.

A large model's records hold, in turn, as many quantizers as a record's largest size admits
(``reference_sample``). One record is made, and in memory, at a time.

An activation within 4 ulp of a rounding tie may legitimately get another code in another runtime.
Codes are saved for the real values; layer outputs are computed from values whose ties were moved to
the middle of their code, so that they are unambiguous. All of a record's real activations and layer
outputs are those of one pass of the model, so that the float part between them can be checked too.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quest_deploy.artifacts.reference import (
    INDEX,
    LOW_PRECISION_TYPES,
    MOST_SENSITIVITY,
    OUTPUT,
    IntegerTables,
    Key,
    PerChannelTables,
    RecordEntry,
    ReferenceIndex,
    write_tables,
    write_tensors,
)
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import sha256_of
from quest_deploy.progress import no_progress
from quest_deploy.quantization.affine_numpy import TIE_ULPS, tie_distance
from quest_deploy.quantization.layers import (
    ActivationQuantizer,
    AnyActivationQuantizer,
    PerChannelActivationQuantizer,
    QuantizedLayer,
    QuantizedMatmul,
    QuantizedSplit,
)
from quest_deploy.quantization.model import downsampling
from quest_deploy.verification.selection import choose, structure
from quest_deploy.verification.tolerances import segment_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from quest_deploy.artifacts.reference import Tables
    from quest_deploy.artifacts.scheme import Scheme
    from quest_deploy.calibration.trajectories import Trajectories
    from quest_deploy.progress import Progress
    from quest_deploy.quantization.model import QuantizedModel
    from quest_deploy.verification.selection import Sample

RECORD = "buckets-{}.safetensors"
TIE_MARGIN = 2e-4
JITTER_ULPS = 64
JITTERED_RUNS = 2
CROSSED_ULPS = 128
"""How near a tie a value lies that is moved across it; a sine of large arguments, as timesteps are,
was seen to move one so far.
"""
MEGABYTE = 10**6
MEASURED_RECORDS = 2
"""In how many records the sensitivity is measured, if nothing else is asked for, where a record
cannot hold all quantizers.
"""
FLOAT64_BYTES = 2**30
"""The largest float32 parameters of a model whose sensitivity is measured in float64 too, which
doubles them, and by several runs.
"""


@torch.no_grad()
def save_reference(
    model: QuantizedModel,
    trajectories: Trajectories,
    folder: Path,
    *,
    seed: int = 0,
    megabytes: int = 1000,
    measured: int | None = None,
    sample_size: tuple[int, int] | None = None,
    key: str = "",
    progress: Progress = no_progress,
) -> list[RecordEntry]:
    """Write the records for every bucket, and their index, into ``folder``; those that an
    interrupted call left there are kept.

    Args:
        key: identifies the model and all other arguments: records with another key are made anew.
        megabytes: the largest size of a record (1 MB = 10^6 bytes), which holds as many quantizers
            as fit.
        measured: in how many of the records the sensitivity is measured; None for all, or 2 where
            the records cannot hold all quantizers.
        sample_size: height and width that the samples are cut down to; None for those of the
            trajectories.

    Raises:
        InputError: a size that the model cannot take, or that the trajectories do not have.
    """
    if sample_size is not None:
        trajectories = _cut_down(trajectories, sample_size, downsampling(model.model))
    scheme = model.checkpoint.scheme
    pairs = [(first, (first + 1) % scheme.buckets) for first in range(0, scheme.buckets, 2)]
    timesteps = [
        (lowest_timestep(scheme, first), highest_timestep(scheme, second))
        for first, second in pairs
    ]
    found = structure(model, _inputs(trajectories, timesteps[0], seed))
    samples = choose(model.checkpoint, found, len(pairs), megabytes * MEGABYTE)
    if not all(sample.sites for sample in samples):
        raise InputError(
            f"no quantized tensor fits a record of {megabytes} MB; allow more (--megabytes)"
        )
    if measured is None:
        whole = all(len(sample.sites) == len(model.sites) for sample in samples)
        measured = len(pairs) if whole else MEASURED_RECORDS
    # The first and the last among them: from one end of the timesteps to the other it may grow
    # severalfold.
    measured = min(measured, len(pairs))
    with_sensitivity = {i * (len(pairs) - 1) // max(measured - 1, 1) for i in range(measured)}
    records, hashes = _kept_records(folder, key)
    if not records:  # what is there is of another key
        for left in (folder / INDEX, *folder.glob(RECORD.format("*"))):
            left.unlink(missing_ok=True)
    write_tables(_tables(model), folder)
    for i in range(len(records), len(pairs)):
        buckets, sample = pairs[i], samples[i]
        inputs = _inputs(trajectories, timesteps[i], seed + i)
        output = model(**inputs)
        if not torch.isfinite(output).all():
            raise QuestDeployError(
                f"the quantized model's output at timesteps {timesteps[i]} is not finite"
            )
        sensitivity = (
            _sensitivity(model, inputs, output, seed + i) if i in with_sensitivity else None
        )
        half_sensitivity = (
            _half_sensitivity(model, inputs, output) if i in with_sensitivity else None
        )
        tensors = {Key.input(name): value for name, value in inputs.items()} | {Key.OUTPUT: output}
        tensors |= _layer_tensors(model, inputs, sample, i)
        file = RECORD.format(f"{buckets[0]:04d}-{buckets[1]:04d}")
        write_tensors({name: x.numpy() for name, x in tensors.items()}, folder / file)
        records.append(
            RecordEntry(
                file,
                timesteps[i],
                buckets,
                sensitivity,
                half_sensitivity,
                sample.sites,
                sample.products,
            )
        )
        hashes[file] = sha256_of(folder / file)
        ReferenceIndex(key, hashes, tuple(records)).write(folder)
        progress("recording", i + 1, len(pairs))
    return records


def _kept_records(folder: Path, key: str) -> tuple[list[RecordEntry], dict[str, str]]:
    """The records that are whole in ``folder``, up to the first that is not, where they were made
    with ``key``; and their hashes.
    """
    try:
        index = ReferenceIndex.read(folder)
    except InputError:  # it is only a shortcut
        return [], {}
    kept: list[RecordEntry] = []
    for entry in index.records if index.key == key else ():
        path = folder / entry.file
        if not path.is_file() or sha256_of(path) != index.sha256.get(entry.file):
            break
        kept.append(entry)
    return kept, {entry.file: index.sha256[entry.file] for entry in kept}


def _cut_down(trajectories: Trajectories, size: tuple[int, int], factor: int) -> Trajectories:
    height, width = size
    recorded = trajectories.sample.shape[-2:]
    if (
        not (0 < height <= recorded[0] and 0 < width <= recorded[1])
        or height % factor
        or width % factor
    ):
        raise InputError(
            f"--sample-size: expected multiples of {factor} up to the recorded "
            f"{recorded[0]}x{recorded[1]}, not {height}x{width}"
        )
    sample, output = (x[..., :height, :width] for x in (trajectories.sample, trajectories.output))
    residuals = {}
    for name, value in trajectories.residuals.items():
        divisor = recorded[0] // value.shape[-2]
        residuals[name] = value[..., : height // divisor, : width // divisor]
    return dataclasses.replace(trajectories, sample=sample, output=output, residuals=residuals)


def lowest_timestep(scheme: Scheme, bucket: int) -> float:
    """The lowest timestep of ``bucket``: its lower edge itself."""
    return scheme.bucket_range(bucket)[0]


def highest_timestep(scheme: Scheme, bucket: int) -> float:
    """The highest float32 timestep of ``bucket`` that is a whole step below its upper edge, or just
    below it in a narrower one.
    """
    low, high = scheme.bucket_range(bucket)
    if high - 1 >= low:
        return high - 1
    return float(torch.nextafter(torch.tensor(high), torch.tensor(0.0)))


def is_tie(ratio: Tensor) -> Tensor:
    """Where x/step [any shape, float32] lies within 4 ulp of a value halfway between two
    integers.
    """
    return torch.from_numpy(tie_distance(ratio.detach().numpy()) <= TIE_ULPS)


def _inputs(
    trajectories: Trajectories, timesteps: tuple[float, float], seed: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.tensor(timesteps)
    steps = (trajectories.timestep[None] - wanted[:, None]).abs().argmin(1)
    rows = torch.randint(trajectories.sample.shape[1], (2,), generator=generator)
    if trajectories.controlled:  # the first sample's residuals are never zeros
        rows[0] %= trajectories.controlled
    return {**trajectories.inputs(steps, rows), "timestep": wanted}


def _layer_tensors(
    model: QuantizedModel, inputs: dict[str, Tensor], sample: Sample, record: int
) -> dict[str, Tensor]:
    quantizers, layers, products = (
        model.activation_quantizers(),
        model.quantized_layers(),
        model.quantized_matmuls(),
    )
    chosen = {name: quantizers[name] for name in sample.sites}
    chosen_products = {name: products[name] for name in sample.products}
    wanted: set[nn.Module] = {(layers | products)[name] for name in sample.outputs}
    wanted |= {
        x
        for x in _quantized(model)
        if isinstance(x, QuantizedSplit) and {x.first, x.second} & wanted
    }
    seen: dict[str, Tensor] = {}
    operands: dict[str, tuple[Tensor, ...]] = {}
    results: dict[nn.Module, Tensor] = {}
    shapes: dict[nn.Module, torch.Size] = {}

    def untie(name: str, quantizer: AnyActivationQuantizer, x: Tensor) -> Tensor:
        seen[name] = x
        return quantizer.untied(x, is_tie(quantizer.ratio(x)))

    def halves(split: QuantizedSplit, args: tuple[Tensor, ...], y: Tensor) -> None:
        for half, part in zip((split.first, split.second), split.parts(args[0]), strict=True):
            half(part)

    handles: list[Any] = []
    for name, quantizer in chosen.items():
        handles.append(
            quantizer.register_forward_pre_hook(
                lambda module, args, name=name: untie(name, module, args[0])
            )
        )
    for name, product in chosen_products.items():
        handles.append(
            product.register_forward_pre_hook(
                lambda module, args, name=name: operands.update({name: args})
            )
        )
    for module in _quantized(model):
        handles.append(
            module.register_forward_hook(lambda module, args, y: shapes.update({module: y.shape}))
        )
    for module in wanted:
        # Copies: models add to a layer's output in place, and a file holds no memory twice.
        handles.append(
            module.register_forward_hook(
                lambda module, args, y: results.update({module: y.clone()})
            )
        )
        if isinstance(module, QuantizedSplit):
            handles.append(module.register_forward_hook(halves))
    try:
        tensors = {Key.UNTIED_OUTPUT: model(**inputs)}
    finally:
        for handle in handles:
            handle.remove()
    tensors |= _rounding(
        model,
        inputs,
        {**seen, OUTPUT: tensors[Key.UNTIED_OUTPUT]},
        operands,
        results,
        shapes,
        record,
    )
    tensors |= {Key.y(name): results[(layers | products)[name]] for name in sample.outputs}

    bucket = model.bucket_of(inputs["timestep"])
    tensors[Key.BUCKET] = torch.cat([bucket, bucket])

    def add_probes(name: str, module: nn.Module, *probes: Tensor) -> None:
        """To what the pass itself gave, whose rows are not computed again."""
        tensors[Key.y(name)] = torch.cat([tensors[Key.y(name)], module(*probes)])

    probes: dict[str, Tensor] = {}
    for name, quantizer in chosen.items():
        x = torch.cat([seen[name], _probe(quantizer, seen[name], bucket, record)])
        tensors[Key.x(name)] = x
        with model.at_timesteps(inputs["timestep"].repeat(2)):
            tensors[Key.codes(name)] = quantizer.codes(x)
            ties = is_tie(quantizer.ratio(x))
            if ties.any():
                x = quantizer.untied(x, ties)
                tensors |= {
                    Key.ties(name): ties.flatten().nonzero()[:, 0],
                    Key.untied(name): x[ties],
                }
        probe = x[2:]
        readers = [
            reader for reader in model.checkpoint.quantizers[name].layers if reader in layers
        ]
        with model.at_timesteps(inputs["timestep"], sharing=True):
            for reader in readers:
                add_probes(reader, layers[reader], probe)
        if not readers:
            probes[name] = probe
    for name, product in chosen_products.items():
        sites = model.checkpoint.matmuls[name].sites
        for i, (site, x) in enumerate(zip(sites, operands[name], strict=True)):
            if site is None:
                tensors[Key.operand(name, i)] = torch.cat([x, x.flip(0)])
        pair = (
            x.flip(0) if site is None else probes[site]
            for site, x in zip(sites, operands[name], strict=True)
        )
        with model.at_timesteps(inputs["timestep"]):
            add_probes(name, product, *pair)
    return tensors


def _rounding(
    model: QuantizedModel,
    inputs: dict[str, Tensor],
    seen: dict[str, Tensor],
    operands: dict[str, tuple[Tensor, ...]],
    results: dict[nn.Module, Tensor],
    shapes: dict[nn.Module, torch.Size],
    seed: int,
) -> dict[str, Tensor]:
    """How well the float part before each quantizer, product and the output is determined: float32
    [2], relative.

    The change that float64 makes there when the model's inputs and the layers' outputs are moved to
    a float32 next to them. The sine of a large timestep is not determined to 1e-4, nor a norm of
    values far from zero. Layers and products themselves are not computed: what is not in
    ``results`` matters to none of those quantizers, and is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    rounding: dict[str, Tensor] = {}

    def moved(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        # 0 or 1, then as far down or up as a float goes: comparisons are slower than arithmetic.
        towards = (
            torch.rand(x.shape, generator=generator).mul_(2).floor_().sub_(0.5).mul_(torch.inf)
        )
        return torch.nextafter(x, towards).double()

    def compare(name: str, x: Tensor, expected: Tensor, axis: int) -> None:
        error = torch.from_numpy(segment_error(expected.numpy(), x.numpy(), axis))
        key = Key.rounding(name)
        rounding[key] = torch.maximum(error, rounding.get(key, error))

    names = {quantizer: name for name, quantizer in model.activation_quantizers().items()}
    products = {product: name for name, product in model.quantized_matmuls().items()}

    def quantized(quantizer: AnyActivationQuantizer | None, x: Tensor) -> None:
        if quantizer is not None and names[quantizer] in seen:
            compare(names[quantizer], x, seen[names[quantizer]], quantizer.axis)

    def replaced(module: nn.Module, *args: Tensor) -> Tensor:
        """Instead of what a layer or product computes: look at what it reads, and give what it
        gave.
        """
        match module:
            case QuantizedLayer():
                quantized(module.site, args[0])
            case QuantizedSplit():
                for half, part in zip(
                    (module.first, module.second), module.parts(args[0]), strict=True
                ):
                    quantized(half.site, part)
            case QuantizedMatmul():
                for quantizer, x in zip(module.quantizers, args, strict=True):
                    quantized(quantizer, x)
                for x, expected in (
                    zip(args, operands[products[module]], strict=True)
                    if products[module] in operands
                    else ()
                ):
                    compare(products[module], x, expected, -1)
        return (
            moved(results[module])
            if module in results
            else torch.zeros(shapes[module], dtype=torch.float64)
        )

    with _float_parts_in_float64(model), _forwards_replaced(_quantized(model), replaced):
        compare(
            OUTPUT, model(**{name: moved(value) for name, value in inputs.items()}), seen[OUTPUT], 1
        )
    return rounding


def _quantized(model: QuantizedModel) -> list[nn.Module]:
    """Return what float parts begin at: layers, products, and shortcuts whose halves are one
    convolution.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, (QuantizedLayer, QuantizedMatmul, QuantizedSplit))
    ]


@contextmanager
def _forwards_replaced(modules: list[nn.Module], replaced: Callable[..., Tensor]) -> Iterator[None]:
    """``modules`` compute ``replaced(module, *args)``."""
    for module in modules:
        object.__setattr__(module, "forward", partial(replaced, module))
    try:
        yield
    finally:
        for module in modules:
            object.__delattr__(module, "forward")


@contextmanager
def _float_parts_in_float64(model: QuantizedModel) -> Iterator[None]:
    """All parameters and buffers in float64 but for those of the layers and quantizers, which are
    nearly all.
    """
    parts = [
        module
        for module in model.modules()
        if not isinstance(module, (QuantizedLayer, AnyActivationQuantizer))
    ]

    def convert(dtype: torch.dtype) -> None:
        for part in parts:
            for value in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                if value.is_floating_point():
                    value.data = value.data.to(dtype)

    convert(torch.float64)
    try:
        yield
    finally:
        convert(torch.float32)


def _tables(model: QuantizedModel) -> dict[str, Tables]:
    return {
        name: _tables_of(quantizer) for name, quantizer in model.activation_quantizers().items()
    }


def _tables_of(quantizer: AnyActivationQuantizer) -> Tables:
    if isinstance(quantizer, ActivationQuantizer):
        _, low, high = quantizer.tables()
        return IntegerTables(
            *map(_copy, (quantizer.scale, quantizer.channel, low, high, quantizer.offset))
        )
    assert isinstance(quantizer, PerChannelActivationQuantizer)
    code_range = torch.tensor([quantizer.code_low, quantizer.code_high])
    return PerChannelTables(
        *map(_copy, (quantizer.scale, torch.round(quantizer.zero_point), code_range))
    )


def _copy(table: Tensor) -> NDArray[Any]:
    return table.detach().clone(memory_format=torch.contiguous_format).numpy()


def _probe(quantizer: AnyActivationQuantizer, like: Tensor, bucket: Tensor, record: int) -> Tensor:
    """Values of the shape of ``like`` [B, ...] that any wrong scale, channel entry or clip bound
    sends to another code.

    Each lies two parts in ten thousand beside a rounding tie, so a relative change of x/step by
    more flips it in one direction. The sides alternate along the channels and from row to row: all
    records together show every channel both. Each row holds the ties at its clip bounds, from both
    sides. A per-channel quantizer's zero-points may lie far outside its range; its ties are those
    next to zero then, where x/step has a fraction at all.
    """
    channels, rows = like.shape[quantizer.axis], len(like)
    count = like[0].numel()
    if isinstance(quantizer, ActivationQuantizer):
        _, low, high = (table[bucket].long().tolist() for table in quantizer.tables())
    else:
        assert isinstance(quantizer, PerChannelActivationQuantizer)
        middle = (quantizer.code_low + quantizer.code_high) // 2
        low, high = [quantizer.code_low - middle] * rows, [quantizer.code_high - middle] * rows
    ratios = []
    for row in range(rows):
        generator = torch.Generator().manual_seed(2 * record + row)
        ties = torch.randint(low[row], high[row], (count,), generator=generator)
        bounds = torch.tensor([high[row], low[row] - 1]).repeat_interleave(2)[:count]
        ties[: len(bounds)] = bounds
        # Channels vary fastest, so that each one sees many of these values, and others of them in
        # every row and record.
        ties = ties.roll(3 * record + 4 * row)
        side = 1 - 2 * ((torch.arange(count) + row) % 2)
        ratios.append(((ties + 0.5) * (1 + TIE_MARGIN * side)).view(count // channels, channels))
    moved = like.movedim(quantizer.axis, -1)
    ratio = torch.stack(ratios).view(moved.shape).movedim(-1, quantizer.axis).contiguous()
    return ratio * quantizer.step(like, bucket)


def _sensitivity(
    model: QuantizedModel, inputs: dict[str, Tensor], output: Tensor, seed: int
) -> tuple[float, float]:
    changes = []
    small = sum(parameter.nbytes for parameter in model.parameters()) <= FLOAT64_BYTES
    if small:
        model.double()
        try:
            changes.append(
                _change(model(**{name: value.double() for name, value in inputs.items()}), output)
            )
        finally:
            model.float()
    generator = torch.Generator().manual_seed(seed)

    def cross(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """All values near a tie to its other side: chance seldom meets the one code of a few that
        all others hang on.
        """
        x, ratio = args[0], module.ratio(args[0])
        step, crossed = CROSSED_ULPS * torch.finfo(x.dtype).eps, x
        for moved in (1 + step, 1 - step):
            other = torch.round(ratio * moved) != torch.round(ratio)
            crossed = torch.where(other, x * moved, crossed)
        return crossed, *args[1:]

    def jitter(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        # In place: a new tensor at each step takes longer than the step.
        noise = torch.rand(x.shape, generator=generator).mul_(2).sub_(1)
        noise.mul_(JITTER_ULPS).mul_(torch.finfo(x.dtype).eps).add_(1)
        return noise.mul_(x), *args[1:]

    for hook in [cross, *[jitter] * JITTERED_RUNS] if small else [jitter]:
        handles = [quantizer.register_forward_pre_hook(hook) for quantizer in model.sites]
        try:
            changes.append(_change(model(**inputs), output))
        finally:
            for handle in handles:
                handle.remove()
    first, second = torch.stack(changes).amax(0).tolist()
    return first, second


def _half_sensitivity(
    model: QuantizedModel, inputs: dict[str, Tensor], output: Tensor
) -> dict[str, tuple[float, float]]:
    """As :func:`_sensitivity`, when activations are of a low-precision type: what enters each
    quantizer and what leaves each layer and product.
    """
    found = {}
    for name, dtype in zip(LOW_PRECISION_TYPES, (torch.float16, torch.bfloat16), strict=True):

        def enters(
            module: nn.Module, args: tuple[Tensor, ...], dtype: torch.dtype = dtype
        ) -> tuple[Tensor, ...]:
            return (args[0].to(dtype).to(args[0].dtype), *args[1:])

        def leaves(
            module: nn.Module, args: tuple[Tensor, ...], y: Tensor, dtype: torch.dtype = dtype
        ) -> Tensor:
            return y.to(dtype).to(y.dtype)

        handles: list[Any] = [
            quantizer.register_forward_pre_hook(enters) for quantizer in model.sites
        ]
        handles += [module.register_forward_hook(leaves) for module in _quantized(model)]
        try:
            first, second = _change(model(**inputs), output).tolist()
        finally:
            for handle in handles:
                handle.remove()
        found[name] = (first, second)
    return found


def _change(other: Tensor, output: Tensor) -> Tensor:
    """The relative change of each sample's output, float32 [B], up to ``MOST_SENSITIVITY``."""
    change: Tensor = (other - output).flatten(1).norm(dim=1) / output.flatten(1).norm(dim=1)
    return change.float().clamp(max=MOST_SENSITIVITY)
