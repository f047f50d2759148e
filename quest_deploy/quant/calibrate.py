"""Calibration: choose every scale from the float model's own activations, bucket by bucket.

Post-training quantization in three passes over recorded trajectories: the largest activation of each channel (for the static
channel vector), a sample of each site's values in each bucket (for the activation scales), the folded weights (for theirs).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from quest_deploy.checkpoint import Architecture, Checkpoint, LayerData, SiteData
from quest_deploy.errors import InputError
from quest_deploy.quant.affine import bucket_of, per_channel, weight_codes
from quest_deploy.quant.model import conv_geometry, float_state, fold_channel
from quest_deploy.quant.sites import LayerPlan, QuantizationPlan, SitePlan, plan_quantization
from quest_deploy.scheme import Granularity, Scheme, activation_levels, is_symmetric, weight_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quest_deploy.trajectories import Trajectories

VALUES_PER_SITE = 4096 * 20
"""Shared by the buckets, of which each keeps at least FEWEST_VALUES and at most MOST_VALUES."""
FEWEST_VALUES, MOST_VALUES = 512, 4096
CHANNEL_ALPHA = 0.5
SHRINK_FACTORS = torch.linspace(1.0, 0.2, 81)


class RangeMethod(StrEnum):
    """How a clip range is chosen from a sample of values."""

    MSE = "mse"
    """The shrink factor of the min-max range with the least mean squared error."""
    MINMAX = "minmax"
    """The smallest and the largest value."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        method: chooses the ranges.
        samples: how many of the recorded samplings are run, the first ones; finetuning profits from more than calibration does.
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
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Checkpoint:
    """Quantize ``unet`` by calibration alone.

    Args:
        trajectories: recorded on ``unet``; every bucket of ``scheme`` must occur in them.
        on_progress: called with a pass's name, the steps done and their number.

    Raises:
        InputError: a bucket without samples, or a layer that cannot be quantized.
    """
    batches = list(_batches(trajectories.first(options.samples), scheme, options.batch))
    empty = set(range(scheme.buckets)) - {int(b) for _, buckets in batches for b in buckets.unique()}
    if empty:
        raise InputError(f"the calibration trajectories never visit the timestep buckets {sorted(empty)}; record more steps")
    first, _ = batches[0]
    plan = plan_quantization(unet, {k: v[:2] for k, v in first.items()}, scheme)
    recorder = _Recorder(unet, plan, scheme.buckets, options.seed)
    for name, visit in (("channel ranges", recorder.visit_ranges), ("activation values", recorder.visit_values)):
        for i, (inputs, buckets) in enumerate(batches):
            recorder.run(inputs, buckets, visit)
            on_progress(name, i + 1, len(batches))
        if name == "channel ranges" and scheme.granularity is Granularity.FOLDED_CHANNEL:
            recorder.choose_channels()
    sites, layers = {}, {}
    for i, site in enumerate(plan.sites):
        sites[site.name] = recorder.site_data(site, options.method)
        on_progress("activation scales", i + 1, len(plan.sites))
    for i, layer in enumerate(plan.layers):
        site = next(s for s in plan.sites if layer.name in s.layers)
        layers[layer.name] = _layer_data(unet.get_submodule(layer.name), layer, recorder.channel[site.name], options.method)
        on_progress("weight scales", i + 1, len(plan.layers))
    return Checkpoint(
        model=model_name,
        architecture=Architecture(type(unet).__name__, _plain_config(unet)),
        scheme=scheme,
        layers=layers,
        sites=sites,
        floats=float_state(unet, layers),
        provenance={"method": "ptq", "range": options.method.value, "seed": options.seed},
    )


def _plain_config(unet: nn.Module) -> dict[str, Any]:
    config = {k: v for k, v in dict(unet.config).items() if not k.startswith("_")}  # type: ignore[arg-type]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


def _batches(trajectories: Trajectories, scheme: Scheme, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    edges = torch.tensor(scheme.bucket_edges)
    for inputs in trajectories.batches(size):
        yield inputs, bucket_of(inputs["timestep"], edges)


class _Recorder:
    """Sees each site's tensor while the float model runs."""

    def __init__(self, unet: nn.Module, plan: QuantizationPlan, buckets: int, seed: int) -> None:
        self.unet, self.plan, self.buckets = unet, plan, buckets
        self.kept = min(max(VALUES_PER_SITE // buckets, FEWEST_VALUES), MOST_VALUES)
        self.generator = torch.Generator().manual_seed(seed)
        self.amax: dict[str, Tensor] = {}
        self.channel: dict[str, Tensor] = {}
        self.values: dict[tuple[str, int], Tensor] = {}

    def run(self, inputs: dict[str, Tensor], buckets: Tensor, visit: Callable[[SitePlan, Tensor, Tensor], None]) -> None:
        def hook(site: SitePlan) -> Any:
            return lambda module, args: visit(site, args[0], buckets)

        handles = [self.unet.get_submodule(s.name).register_forward_pre_hook(hook(s)) for s in self.plan.sites]
        try:
            self.unet(**inputs)
        finally:
            for handle in handles:
                handle.remove()

    def visit_ranges(self, site: SitePlan, x: Tensor, buckets: Tensor) -> None:
        amax = x.abs().transpose(site.axis, -1).flatten(0, -2).amax(0)
        self.amax[site.name] = torch.maximum(self.amax.get(site.name, amax), amax)
        self.channel[site.name] = torch.ones_like(amax)

    def choose_channels(self) -> None:
        """g = sqrt(amax_x / amax_w) (SmoothQuant, alpha 0.5), scaled to a geometric mean of one."""
        for site in self.plan.sites:
            amaxes = [_input_amax(self.unet.get_submodule(name), self.amax[site.name]) for name in site.layers]
            weight_amax = torch.stack(amaxes).amax(0)
            x, w = self.amax[site.name].clamp(min=1e-5), weight_amax.clamp(min=1e-5)
            channel = x.pow(CHANNEL_ALPHA) / w.pow(1 - CHANNEL_ALPHA)
            self.channel[site.name] = channel / channel.log().mean().exp()

    def visit_values(self, site: SitePlan, x: Tensor, buckets: Tensor) -> None:
        x = x / per_channel(self.channel[site.name], x, site.axis)
        for bucket in buckets.unique().tolist():
            values = x[buckets == bucket].flatten()
            if (old := self.values.get((site.name, bucket))) is not None:
                values = torch.cat([old, values])
            if values.numel() > self.kept:
                # The extremes always stay: they are the min-max range.
                keep = torch.randint(values.numel(), (self.kept - 2,), generator=self.generator)
                values = torch.cat([values[keep], values.amin()[None], values.amax()[None]])
            self.values[site.name, bucket] = values

    def site_data(self, site: SitePlan, method: RangeMethod) -> SiteData:
        ranges = [_activation_range(self.values[site.name, b], site.bits, method) for b in range(self.buckets)]
        scale = torch.stack([s for s, _ in ranges])
        zero_point = torch.stack([z for _, z in ranges])
        low, high = (-127 * torch.ones_like(scale), 127 * torch.ones_like(scale)) if is_symmetric(site.bits) else (
            -zero_point, activation_levels(site.bits) - zero_point
        )  # fmt: skip
        tables = {"scale": scale, "low": low, "high": high, "channel": self.channel[site.name]}
        return SiteData(site.name, site.bits, site.axis, site.layers, **{k: v.numpy().astype(np.float32) for k, v in tables.items()})


def _input_amax(layer: nn.Module, like: Tensor) -> Tensor:
    weight = layer.get_parameter("weight").abs()
    amax = weight.transpose(0, 1).flatten(1).amax(1)
    return amax.repeat(like.numel() // amax.numel())


def _activation_range(values: Tensor, bits: int, method: RangeMethod) -> tuple[Tensor, Tensor]:
    """Scale and zero-point, scalars, for ``values`` [V]."""
    factors = SHRINK_FACTORS if method is RangeMethod.MSE else SHRINK_FACTORS[:1]
    if is_symmetric(bits):
        scale = (values.abs().amax() * factors / 127).clamp(min=1e-8)
        zero_point = torch.zeros_like(scale)
        low, high = -127.0 * torch.ones_like(scale), 127.0 * torch.ones_like(scale)
    else:
        levels = activation_levels(bits)
        smallest, largest = values.amin().clamp(max=0) * factors, values.amax().clamp(min=0) * factors
        scale = ((largest - smallest) / levels).clamp(min=1e-8)
        zero_point = torch.round(-smallest / scale).clamp(0, levels)
        low, high = -zero_point, levels - zero_point
    codes = torch.clamp(torch.round(values[None] / scale[:, None]), low[:, None], high[:, None])
    best = (codes * scale[:, None] - values[None]).square().mean(1).argmin()
    return scale[best], zero_point[best]


def _layer_data(layer: nn.Module, plan: LayerPlan, channel: Tensor, method: RangeMethod) -> LayerData:
    weight = fold_channel(layer.get_parameter("weight"), channel)
    scale = _weight_scale(weight, plan.weight_bits, method)
    bias = getattr(layer, "bias", None)
    return LayerData(
        name=plan.name,
        weight_bits=plan.weight_bits,
        weight_codes=weight_codes(weight, scale, plan.weight_bits).numpy(),
        weight_scale=scale.numpy(),
        bias=None if bias is None else bias.detach().numpy().copy(),
        conv=conv_geometry(layer),
        macs=plan.macs,
    )


def _weight_scale(weight: Tensor, bits: int, method: RangeMethod) -> Tensor:
    low, high = weight_range(bits)
    flat = weight.flatten(1)
    full = torch.maximum(flat.amax(1) / high, flat.amin(1) / low).clamp(min=1e-8)
    best, best_error = full, torch.full_like(full, torch.inf)
    for factor in SHRINK_FACTORS if method is RangeMethod.MSE else SHRINK_FACTORS[:1]:
        scale = full * factor
        codes = torch.clamp(torch.round(flat / scale[:, None]), low, high)
        error = (codes * scale[:, None] - flat).square().mean(1)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return best
