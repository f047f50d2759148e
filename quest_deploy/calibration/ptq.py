"""Calibration: choose every scale from the float model's own activations, bucket by bucket.

Post-training quantization in one pass over recorded trajectories, which keeps each channel's
extremes (for the static smoothing scale) and a sample of each quantizer's values in each bucket
(for the activation scales), then one over the folded weights (for theirs).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from quest_deploy.artifacts.checkpoint import (
    ActivationQuantizerData,
    Architecture,
    AttentionMatmulData,
    Checkpoint,
    LayerData,
    PerChannelQuantizerData,
    QuantizerData,
    compact,
)
from quest_deploy.artifacts.scheme import (
    Granularity,
    Scheme,
    Symmetry,
    activation_levels,
    weight_range,
)
from quest_deploy.calibration.low_rank import add_branches
from quest_deploy.errors import InputError
from quest_deploy.models.attention import has_image_attentions
from quest_deploy.models.unets import fixed_heads, recorded_class
from quest_deploy.progress import no_progress
from quest_deploy.quantization.affine import (
    WeightGrid,
    activation_codes,
    bucket_of,
    fake_quantize_weight,
    weight_codes,
)
from quest_deploy.quantization.model import conv_geometry, float_state, fold_smoothing_scale
from quest_deploy.quantization.planner import (
    LayerPlan,
    QuantizationPlan,
    QuantizerPlan,
    plan_quantization,
)
from quest_deploy.quantization.prepare import prepared_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from quest_deploy.calibration.trajectories import Trajectories
    from quest_deploy.progress import Progress

VALUES_PER_QUANTIZER = 4096 * 20
"""Shared by the buckets, of which each keeps at least FEWEST_VALUES; a free channel keeps these for
each bucket.
"""
FEWEST_VALUES = 512
VALUES_TOGETHER = 2**18
"""How many values the searches for ranges and scales round at a time."""
SMOOTHING_ALPHA = 0.5
SHRINK_FACTORS = torch.linspace(1.0, 0.2, 81)
SMALLEST_SCALE = 1e-8


class RangeMethod(StrEnum):
    """How a clip range is chosen from a sample of values."""

    MSE = "mse"
    """The shrink factor of the min-max range with the least mean squared error."""
    L24 = "l2.4"
    """The shrink factor with the least mean |x - x^|^2.4: Q-Diffusion's and QuEST's search."""
    MINMAX = "minmax"
    """The smallest and the largest value."""

    @property
    def factors(self) -> Tensor:
        """The shrink factors that are tried, float [F], the first of them 1."""
        return SHRINK_FACTORS[:1] if self is RangeMethod.MINMAX else SHRINK_FACTORS

    def error(self, difference: Tensor, dim: int) -> Tensor:
        """The mean error over ``dim`` of x^ - x."""
        return (
            difference.abs().pow(2.4).mean(dim)
            if self is RangeMethod.L24
            else difference.square().mean(dim)
        )


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        method: chooses the ranges.
        samples: how many of the recorded samplings are run, the first ones; finetuning profits from
            more than calibration does.
        batch: samples that run at once.
        seed: picks which values are kept for the search.
    """

    method: RangeMethod = RangeMethod.MSE
    samples: int = 256
    batch: int = 64
    seed: int = 0


@torch.no_grad()
def calibrate(
    model_name: str,
    unet: nn.Module,
    trajectories: Trajectories,
    scheme: Scheme,
    options: CalibrationOptions,
    progress: Progress = no_progress,
) -> Checkpoint:
    """Quantize ``unet`` by calibration alone.

    Args:
        unet: stays as it is. What of it is not quantized is in the checkpoint as it is, not copied.
        trajectories: recorded on ``unet``; every bucket of ``scheme`` must occur in them.
        progress: called with a pass's name, the steps done and their number.

    Raises:
        InputError: a bucket without samples, or a layer that cannot be quantized.
    """
    batches = list(_batches(trajectories.first(options.samples), scheme, options.batch))
    empty = set(range(scheme.buckets)) - {bucket for _, bucket in batches}
    if empty:
        raise InputError(
            f"the calibration trajectories never visit the timestep buckets {sorted(empty)}; "
            "record more steps"
        )
    probe = {k: v[:2] for k, v in batches[0][0].items()}
    unet, split_shortcuts, attention = prepared_for(_shared(unet), scheme, probe)

    def recorded(phase: str) -> _Recorder:
        recorder = _Recorder(unet, plan_quantization(unet, probe, scheme), scheme, options)
        for i, (inputs, bucket) in enumerate(batches):
            recorder.run(inputs, bucket)
            progress(phase, i + 1, len(batches))
        recorder.choose_smoothing_scales(scheme.granularity)
        return recorder

    # A branch is taken out of the smoothed weight, and what is left is smoothed again.
    low_rank = (
        add_branches(unet, recorded("smoothing scales").smoothing, scheme)
        if scheme.low_rank
        else {}
    )
    recorder = recorded("activation values")
    plan = recorder.plan
    quantizers: dict[str, QuantizerData] = {}
    layers = {}
    for i, quantizer in enumerate(plan.quantizers):
        quantizers[quantizer.name] = recorder.quantizer_data(quantizer)
        progress("activation scales", i + 1, len(plan.quantizers))
    for i, layer in enumerate(plan.layers):
        quantizer = next(s for s in plan.quantizers if layer.name in s.layers)
        layers[layer.name] = _layer_data(
            unet.get_submodule(layer.name), layer, recorder.channel[quantizer.name], options.method
        )
        progress("weight scales", i + 1, len(plan.layers))
    return Checkpoint(
        model=model_name,
        architecture=Architecture(
            recorded_class(unet),
            _plain_config(unet),
            split_shortcuts,
            attention,
            fixed_heads(unet),
            low_rank=low_rank,
            ip_adapter=has_image_attentions(unet),
        ),
        scheme=scheme,
        layers=layers,
        quantizers=quantizers,
        floats=float_state(unet, layers),
        provenance={"method": "ptq", "range": options.method.value, "seed": options.seed},
        matmuls={
            product.name: AttentionMatmulData(product.name, product.sites, product.macs)
            for product in plan.matmuls
        },
    )


def _shared(unet: nn.Module) -> nn.Module:
    """A copy whose modules are its own and whose weights are ``unet``'s: they may be gigabytes."""
    weights = (*unet.parameters(), *unet.buffers())
    return copy.deepcopy(unet, {id(weight): weight for weight in weights})


def _plain_config(unet: nn.Module) -> dict[str, Any]:
    config = {k: v for k, v in dict(unet.config).items() if not k.startswith("_")}  # type: ignore[arg-type]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


def _batches(
    trajectories: Trajectories, scheme: Scheme, size: int
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """The batches, each of one step, with its bucket."""
    edges = torch.tensor(scheme.bucket_edges)
    for inputs in trajectories.batches(size):
        yield inputs, int(bucket_of(inputs["timestep"][:1], edges))


class _Recorder:
    """Sees each quantizer's tensor while the float model runs."""

    def __init__(
        self, unet: nn.Module, plan: QuantizationPlan, scheme: Scheme, options: CalibrationOptions
    ) -> None:
        self.unet, self.plan, self.buckets, self.method = unet, plan, scheme.buckets, options.method
        self.free = scheme.granularity is Granularity.PER_CHANNEL
        self.kept = max(VALUES_PER_QUANTIZER // self.buckets, FEWEST_VALUES)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.channel: dict[str, Tensor] = {}
        self.samples: dict[tuple[str, int], _Reservoir] = {}
        self.extremes: dict[tuple[str, int], Tensor] = {}

    def run(self, inputs: dict[str, Tensor], bucket: int) -> None:
        """Run the model on one batch and visit each quantizer's tensor."""

        def hook(quantizer: QuantizerPlan) -> Any:
            return lambda module, args: self.visit(quantizer, args[quantizer.operand or 0], bucket)

        # Layers that share a quantizer read the same tensor: the first of them is enough.
        handles = [
            self.unet.get_submodule(s.layers[0]).register_forward_pre_hook(hook(s))
            for s in self.plan.quantizers
        ]
        try:
            self.unet(**inputs)
        finally:
            for handle in handles:
                handle.remove()

    def visit(self, quantizer: QuantizerPlan, x: Tensor, bucket: int) -> None:
        """Keep each channel's extremes of a quantizer's values x [B, ...] in ``bucket``, and some
        of the values where a range is searched for.
        """
        rows, key = x.transpose(quantizer.axis, -1), (quantizer.name, bucket)
        axes = tuple(range(rows.dim() - 1))
        found = torch.stack([rows.amin(axes), rows.amax(axes)])
        before = self.extremes.get(key, found)
        self.extremes[key] = torch.stack(
            [torch.minimum(before[0], found[0]), torch.maximum(before[1], found[1])]
        )
        if self.method is RangeMethod.MINMAX:
            return
        values, kept = (
            (rows, FEWEST_VALUES)
            if self.is_per_channel(quantizer)
            else (rows[..., None], self.kept)
        )
        self.samples.setdefault(key, _Reservoir(kept)).add(values, self.generator)

    def choose_smoothing_scales(self, granularity: Granularity) -> None:
        """g = sqrt(amax_x / amax_w) (SmoothQuant, alpha 0.5), scaled to a geometric mean of one,
        for layers of folded channels.

        All ones for other granularities, and for attention's operands.
        """
        for quantizer in self.plan.quantizers:
            amax = (
                torch.stack([self.extremes[quantizer.name, b] for b in range(self.buckets)])
                .abs()
                .amax((0, 1))
            )
            if quantizer.operand is not None or granularity is not Granularity.FOLDED_CHANNEL:
                self.channel[quantizer.name] = torch.ones_like(amax)
                continue
            weight_amax = torch.stack(
                [_input_amax(self.unet.get_submodule(name), amax) for name in quantizer.layers]
            ).amax(0)
            x, w = amax.clamp(min=1e-5), weight_amax.clamp(min=1e-5)
            channel = x.pow(SMOOTHING_ALPHA) / w.pow(1 - SMOOTHING_ALPHA)
            self.channel[quantizer.name] = channel / channel.log().mean().exp()

    @property
    def smoothing(self) -> dict[str, Tensor]:
        """The smoothing scale [I] of each layer, in execution order."""
        return {
            name: self.channel[quantizer.name]
            for quantizer in self.plan.quantizers
            if quantizer.operand is None
            for name in quantizer.layers
        }

    def is_per_channel(self, quantizer: QuantizerPlan) -> bool:
        """Whether each of the quantizer's channels has scales of its own."""
        return self.free and quantizer.operand is None

    def quantizer_data(self, quantizer: QuantizerPlan) -> QuantizerData:
        ranges = [
            _activation_ranges(
                *self._kept(quantizer, b), quantizer.bits, quantizer.symmetry, self.method
            )
            for b in range(self.buckets)
        ]
        scale, zero_point = (torch.stack(column) for column in zip(*ranges, strict=True))
        low, high = _code_range(quantizer.bits, quantizer.symmetry)
        if self.is_per_channel(quantizer):
            tables = (_float32(scale), _float32(zero_point))
            return PerChannelQuantizerData(
                quantizer.name,
                quantizer.bits,
                quantizer.axis,
                quantizer.layers,
                *tables,
                code_low=low,
                code_high=high,
            )
        integers = {
            "scale": scale[:, 0],
            "low": (low - zero_point)[:, 0],
            "high": (high - zero_point)[:, 0],
        }
        tables_by_name = {
            name: _float32(table)
            for name, table in (*integers.items(), ("channel", self.channel[quantizer.name]))
        }
        return ActivationQuantizerData(
            quantizer.name,
            quantizer.bits,
            quantizer.symmetry,
            quantizer.axis,
            quantizer.layers,
            **tables_by_name,
        )

    def _kept(self, quantizer: QuantizerPlan, bucket: int) -> tuple[Tensor, Tensor]:
        """The sample and the extremes of the quantizer's values, over their channels' factors: [V,
        C] and [2, C], C = 1 unless free. Without a sample the extremes stand for it.
        """
        reservoir = self.samples.get((quantizer.name, bucket))
        extremes = self.extremes[quantizer.name, bucket]
        if self.is_per_channel(quantizer):
            return extremes if reservoir is None else reservoir.rows, extremes
        channel = self.channel[quantizer.name]
        extremes = extremes / channel
        extremes = torch.stack([extremes[0].amin(), extremes[1].amax()])[:, None]
        if reservoir is None:
            return extremes, extremes
        return reservoir.rows / channel[reservoir.places % len(channel)][:, None], extremes


class _Reservoir:
    """A uniform sample, without replacement, of up to ``size`` rows of all that were added.

    Each row gets a random key when it arrives; the rows with the largest keys stay, so early and
    late batches count the same.

    Attributes:
        rows: the sample, [up to size, C].
        places: each row's index among those of the batch that it came with, int64.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows, self.places, self._keys = (
            torch.empty(0, 0),
            torch.empty(0, dtype=torch.int64),
            torch.empty(0),
        )

    def add(self, rows: Tensor, generator: torch.Generator) -> None:
        """Add rows [..., C]."""
        shape = rows.shape[:-1]
        keys = torch.rand(shape.numel(), generator=generator)
        # Of a large or late batch few rows have a chance: looking at those alone is what makes a
        # large sample cheap.
        full = len(self._keys) == self.size
        least = float(self._keys.min()) if full else 1 - 2 * self.size / len(keys)
        places = (keys > least).nonzero()[:, 0]
        if len(places) < self.size and not full:
            places = torch.arange(len(keys))
        rows, keys = rows[torch.unravel_index(places, shape)], keys[places]
        if len(self._keys):
            rows, keys, places = (
                torch.cat([self.rows, rows]),
                torch.cat([self._keys, keys]),
                torch.cat([self.places, places]),
            )
        if len(keys) > self.size:
            keys, chosen = keys.topk(self.size, sorted=False)
            rows, places = rows[chosen], places[chosen]
        self.rows, self.places, self._keys = rows, places, keys


def _input_amax(layer: nn.Module, like: Tensor) -> Tensor:
    weight = layer.get_parameter("weight").float().abs()
    amax = weight.transpose(0, 1).flatten(1).amax(1)
    return amax.repeat(like.numel() // amax.numel())


def _code_range(bits: int, symmetry: Symmetry) -> tuple[int, int]:
    """The codes' range, the zero-point included."""
    return (-127, 127) if symmetry is Symmetry.SYMMETRIC else (0, activation_levels(bits))


def _activation_ranges(
    values: Tensor, extremes: Tensor, bits: int, symmetry: Symmetry, method: RangeMethod
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point, each [C], for each column of ``values`` [V, C].

    The ``extremes`` [2, C] of all values are the range that is shrunk. They have no part in the
    error: beside a sample of thousands, the two of them would stand for millions.
    """
    factors, (low, high) = method.factors[:, None], _code_range(bits, symmetry)
    if symmetry is Symmetry.SYMMETRIC:
        scale = (extremes.abs().amax(0) * factors / 127).clamp(min=SMALLEST_SCALE)
        zero_point = torch.zeros_like(scale)
    else:
        smallest = extremes[0].clamp(max=0) * factors
        largest = extremes[1].clamp(min=0) * factors
        if symmetry is Symmetry.UNSIGNED:
            smallest = torch.zeros_like(smallest)
        scale = ((largest - smallest) / high).clamp(min=SMALLEST_SCALE)
        zero_point = torch.round(-smallest / scale).clamp(0, high)
    # Many factors at once: a sample is small, and each operation on it alone costs more to start
    # than to compute.
    together = max(1, VALUES_TOGETHER // values.numel())
    errors = [
        method.error(activation_codes(values, s, low - z, high - z) * s - values, 1)
        for s, z in zip(
            scale[:, None].split(together), zero_point[:, None].split(together), strict=True
        )
    ]
    best = torch.cat(errors).argmin(0, keepdim=True)
    return scale.gather(0, best)[0], zero_point.gather(0, best)[0]


def _layer_data(
    layer: nn.Module, plan: LayerPlan, channel: Tensor, method: RangeMethod
) -> LayerData:
    weight = fold_smoothing_scale(layer.get_parameter("weight").detach().float(), channel)
    codes, scale = rounded_weight(weight, plan.weight_bits, method)
    bias = layer.bias
    return LayerData(
        name=plan.name,
        weight_bits=plan.weight_bits,
        codes=compact(codes, plan.weight_bits),
        weight_scale=scale,
        bias=bias.detach().numpy().copy() if isinstance(bias, Tensor) else None,
        conv=conv_geometry(layer),
        macs=plan.macs,
    )


def rounded_weight(
    weight: Tensor, bits: int, method: RangeMethod
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The codes, int8 in the shape of ``weight`` [O, I, ...], and the scales, float32 [O], that
    ``method`` chooses for it.
    """
    scale = _weight_scale(weight, bits, method)
    codes = weight_codes(weight, WeightGrid.symmetric(scale, bits))
    return codes.numpy().astype(np.int8), scale.numpy()


def _weight_scale(weight: Tensor, bits: int, method: RangeMethod) -> Tensor:
    low, high = weight_range(bits)
    flat = weight.flatten(1)
    full = torch.maximum(flat.amax(1) / high, flat.amin(1) / low).clamp(min=SMALLEST_SCALE)
    if method is RangeMethod.MINMAX:
        return full
    # As many channels at once as stay in the processor's cache.
    together = max(1, VALUES_TOGETHER // flat.shape[1])
    scales = []
    for rows, largest in zip(flat.split(together), full.split(together), strict=True):
        best, best_error = largest, torch.full_like(largest, torch.inf)
        for factor in method.factors:
            scale = largest * factor
            rounded = fake_quantize_weight(rows, WeightGrid.symmetric(scale, bits))
            error = method.error(rounded.sub_(rows), 1)
            best = torch.where(error < best_error, scale, best)
            best_error = torch.minimum(error, best_error)
        scales.append(best)
    return torch.cat(scales)


def _float32(values: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return values.numpy().astype(np.float32)
