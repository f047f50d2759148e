"""From an official checkpoint to ours: the same codes, the same scales, the same order of
operations.

Whatever fits the integer form becomes that; the rest computes in float, as the official code does,
and says why.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
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
    ScoreScale,
)
from quest_deploy.artifacts.model_source import IMPORTED
from quest_deploy.artifacts.scheme import Granularity, Scheme, Symmetry, activation_levels
from quest_deploy.calibration.ptq import CalibrationOptions, calibrate
from quest_deploy.errors import InputError
from quest_deploy.importers.architecture import Layout
from quest_deploy.importers.read import parts_of
from quest_deploy.importers.settings import Source
from quest_deploy.progress import no_progress
from quest_deploy.quantization.model import build_float_model, conv_geometry, float_state
from quest_deploy.quantization.planner import plan_quantization
from quest_deploy.quantization.prepare import prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quest_deploy.calibration.trajectories import Trajectories
    from quest_deploy.importers.architecture import OfficialLayer
    from quest_deploy.importers.read import OfficialCheckpoint
    from quest_deploy.progress import Progress
    from quest_deploy.quantization.planner import QuantizerPlan


@dataclass(frozen=True)
class Imported:
    """What came of an official checkpoint.

    Attributes:
        in_float: by quantizer, why it and its readers compute in float.
    """

    checkpoint: Checkpoint
    in_float: dict[str, str]


@dataclass(frozen=True)
class _Weight:
    """A layer's weight in diffusers' shape, with its AdaRound quantizer: delta and zero_point [O],
    alpha in the weight's shape.
    """

    weight: Tensor
    bias: Tensor | None
    delta: Tensor
    zero_point: Tensor
    alpha: Tensor

    def unclamped_codes(self) -> Tensor:
        """The codes with the zero-point: floor, plus one where alpha is not negative."""
        delta, zero = (
            values.view(-1, *[1] * (self.weight.dim() - 1))
            for values in (self.delta, self.zero_point)
        )
        return torch.floor(self.weight / delta) + (self.alpha >= 0).float() + zero

    def codes(self, bits: int) -> tuple[Tensor, Tensor]:
        """The rounded and clamped codes, zero-point included and subtracted."""
        codes = torch.clamp(self.unclamped_codes(), 0, 2**bits - 1)
        return codes, codes - self.zero_point.view(-1, *[1] * (self.weight.dim() - 1))

    def rounded(self, bits: int) -> Tensor:
        """The weight that the quantized model multiplies by."""
        return self.codes(bits)[1] * self.delta.view(-1, *[1] * (self.weight.dim() - 1))

    def projections(self, heads: int) -> tuple[_Weight, _Weight, _Weight]:
        """q, k and v of an attention block's qkv, whose rows lie as (heads, 3, d)."""
        assert self.bias is not None
        tensors = (self.weight, self.bias, self.delta, self.zero_point, self.alpha)
        q, k, v = (
            _Weight(*(x.unflatten(0, (heads, 3, -1))[:, i].flatten(0, 1) for x in tensors))
            for i in range(3)
        )
        return q, k, v


@dataclass(frozen=True)
class _Tables:
    """An activation quantizer: scale and zero_point [K, C], lowest timesteps first.

    Attributes:
        axis: where they vary, in diffusers' tensor; None: the channels of the layers that read it.
        summed: whether that axis is summed over by the layers or the product that read it.
    """

    bits: int
    scale: Tensor
    zero_point: Tensor
    code_range: tuple[int, int]
    axis: int | None
    summed: bool

    @property
    def per_tensor(self) -> bool:
        """Whether the tables do not vary along their axis."""
        return bool(
            (self.scale == self.scale[:, :1]).all()
            and (self.zero_point == self.zero_point[:, :1]).all()
        )

    @property
    def has_offset(self) -> bool:
        """Whether the codes less their zero-point reach beyond int8: a deployed quantizer then pads
        with its offset, not with zero.
        """
        low, high = (bound - self.zero_point for bound in self.code_range)
        return bool((low < -128).any() or (high > 127).any())

    def same(self, other: _Tables) -> bool:
        """Whether both quantize alike."""
        plain = (self.bits, self.code_range, self.axis) == (
            other.bits,
            other.code_range,
            other.axis,
        )
        return (
            plain
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
        )


def float_model(official: OfficialCheckpoint) -> nn.Module:
    """The diffusers model with the checkpoint's float weights."""
    return _diffusers_model(official, lambda part: part.weight)


def rounded_layers(official: OfficialCheckpoint) -> dict[str, LayerData]:
    """Every layer with its rounded weight, its geometry and its MACs still to be filled in.

    Raises:
        InputError: the weights were not quantized to the settings' bits, or a weight's codes fit no
            checkpoint of ours.
    """
    parts, bits = _all_parts(official), official.settings.weight_bits
    try:
        _check_bits(parts, bits)
        return {name: _layer_data(name, part, bits) for name, part in parts.items()}
    except InputError as e:
        raise InputError(f"{official.path}: {e}") from e


def import_checkpoint(
    official: OfficialCheckpoint, rounded: dict[str, LayerData], probe: dict[str, Tensor]
) -> Imported:
    """Convert ``official``.

    Args:
        rounded: its :func:`rounded_layers`.
        probe: random inputs of the diffusers model, to see which layers read the same tensor.

    Raises:
        InputError: timesteps beyond the training's.
    """
    scheme, config = import_scheme(official), official.config
    splits = _split_shortcuts(official)
    attention = ScoreScale.PRODUCT if config.use_spatial_transformer else ScoreScale.OPERANDS
    model = prepare(float_model(official), splits, attention)
    # A softmax of 16 bits is a quantizer too, though the scheme calls it float.
    plan = plan_quantization(
        model, probe, dataclasses.replace(scheme, softmax_bits=scheme.softmax_bits or 8)
    )
    tables = dict(_layer_tables(official)) | dict(_operand_tables(official))
    quantizers: dict[str, QuantizerData] = {}
    in_float = {}
    for group in plan.quantizers:
        for readers in _agreeing(group, tables, model):
            name = group.name if group.operand is not None else readers[0]
            found, channels = tables[name], _channels(official, model, group)
            why = _why_float(found)
            if why is None:
                quantizers[name] = _integer_quantizer(name, group, readers, found, channels)
            else:
                quantizers[name], in_float[name] = (
                    _per_channel_quantizer(name, group, readers, found, channels),
                    why,
                )
    layers = {x.name: _placed(rounded[x.name], model, x.macs) for x in plan.layers}
    if any(
        isinstance(quantizers[quantizer], PerChannelQuantizerData)
        for quantizer in quantizers
        if quantizers[quantizer].layers[0] in layers
    ):
        scheme = dataclasses.replace(scheme, granularity=Granularity.PER_CHANNEL)
    checkpoint = Checkpoint(
        model=IMPORTED,
        architecture=Architecture(
            config.class_name,
            config.diffusers_config,
            splits,
            attention,
            config.fixed_heads,
            official_sums=True,
        ),
        scheme=scheme,
        layers=layers,
        quantizers=quantizers,
        floats=float_state(model, layers),
        provenance=_provenance(official),
        matmuls={x.name: AttentionMatmulData(x.name, x.sites, x.macs) for x in plan.matmuls},
    )
    return Imported(checkpoint, in_float)


def recalibrate(
    official: OfficialCheckpoint,
    rounded: dict[str, LayerData],
    trajectories: Trajectories,
    options: CalibrationOptions,
    progress: Progress = no_progress,
) -> Imported:
    """Keep the rounded weights and choose new activation scales at the deployable granularity: one
    a tensor and bucket.

    Args:
        rounded: its :func:`rounded_layers`.
        trajectories: recorded on :func:`float_model`; every bucket must occur in them.
    """
    bits = official.settings.weight_bits
    scheme = dataclasses.replace(import_scheme(official), granularity=Granularity.PER_TENSOR)
    checkpoint = calibrate(
        IMPORTED,
        _diffusers_model(official, lambda part: part.rounded(bits)),
        trajectories,
        scheme,
        options,
        progress,
    )
    architecture = dataclasses.replace(
        checkpoint.architecture, heads=official.config.fixed_heads, official_sums=True
    )
    model = build_float_model(architecture)
    layers = {
        name: _placed(rounded[name], model, layer.macs) for name, layer in checkpoint.layers.items()
    }
    provenance = {
        **_provenance(official),
        "recalibrated": {"range": options.method.value, "seed": options.seed},
    }
    return Imported(
        dataclasses.replace(
            checkpoint, architecture=architecture, layers=layers, provenance=provenance
        ),
        {},
    )


def import_scheme(official: OfficialCheckpoint) -> Scheme:
    """The scheme that the settings describe: a bucket for each calibrated timestep, its edges
    midway between them.
    """
    settings = official.settings
    midway = (np.float32((a + b) / 2) for a, b in itertools.pairwise(reversed(settings.timesteps)))
    return Scheme(
        weight_bits=settings.weight_bits,
        activation_bits=settings.activation_bits,
        bucket_edges=tuple(float(edge) for edge in midway),
        first_last_bits=settings.first_last_bits,
        granularity=Granularity.PER_TENSOR,
        train_timesteps=official.config.train_timesteps,
        attention_bits=settings.activation_bits,
        softmax_bits=settings.softmax_bits if settings.softmax_bits in (4, 8) else None,
        split_shortcuts=official.split,
    )


def _provenance(official: OfficialCheckpoint) -> dict[str, Any]:
    settings = {**dataclasses.asdict(official.settings), "source": official.settings.source.value}
    return {
        "method": "import",
        "settings": {**settings, "timesteps": list(official.settings.timesteps)},
    }


def _split_shortcuts(official: OfficialCheckpoint) -> dict[str, int]:
    if not official.split:
        return {}
    return {
        layer.targets[0]: layer.halves[0]
        for layer in official.names.layers
        if layer.halves is not None
    }


def _diffusers_model(
    official: OfficialCheckpoint, weight_of: Callable[[_Weight], Tensor]
) -> nn.Module:
    state = {}
    for layer in official.names.layers:
        parts = list(_parts(official, layer))
        if len(parts) == 2:  # the halves of a split shortcut
            parts = [(layer.targets[0], parts[0][1])]
            state[f"{layer.targets[0]}.weight"] = torch.cat(
                [weight_of(part) for _, part in _parts(official, layer)], dim=1
            )
        for target, part in parts:
            state.setdefault(f"{target}.weight", weight_of(part))
            if part.bias is not None:
                state[f"{target}.bias"] = part.bias
    for name, (target, _) in official.names.floats.items():
        state |= {
            f"{target}.{part}": official.tensors[f"{name}.{part}"] for part in ("weight", "bias")
        }
    config = official.config
    model = build_float_model(
        Architecture(config.class_name, config.diffusers_config, {}, None, config.fixed_heads)
    )
    model.load_state_dict(state, strict=True)
    return model


def _all_parts(official: OfficialCheckpoint) -> dict[str, _Weight]:
    return {
        target: part for layer in official.names.layers for target, part in _parts(official, layer)
    }


def _parts(official: OfficialCheckpoint, layer: OfficialLayer) -> Iterator[tuple[str, _Weight]]:
    """A layer as the prepared diffusers model has it: one, an attention block's three projections,
    or a split shortcut's halves.
    """
    tensors, start = official.tensors, 0
    weight, bias = (
        tensors[f"{layer.name}.weight"],
        tensors[f"{layer.name}.bias"] if layer.bias else None,
    )
    halves = parts_of(layer, official.split)
    for (suffix, channels), child in zip(
        halves, ("",) if len(halves) == 1 else (".first", ".second"), strict=True
    ):
        quantizer = f"{layer.name}.weight_quantizer{suffix}"
        delta, zero = (
            tensors[f"{quantizer}.{table}"].flatten() for table in ("delta", "zero_point")
        )
        alpha = tensors[f"{quantizer}.alpha"]
        part = _Weight(
            weight[:, start : start + channels], None if start else bias, delta, zero, alpha
        )
        if layer.layout is Layout.TOKENS:  # a Conv1d of size 1, a Linear in diffusers
            part = dataclasses.replace(part, weight=part.weight[..., 0], alpha=part.alpha[..., 0])
        if len(layer.targets) == 1:
            yield layer.targets[0] + child, part
        else:
            yield from zip(
                layer.targets, part.projections(official.names.heads[layer.name]), strict=True
            )
        start += channels


def _layer_tables(official: OfficialCheckpoint) -> Iterator[tuple[str, _Tables]]:
    for layer in official.names.layers:
        halves = parts_of(layer, official.split)
        tokens = layer.layout is Layout.TOKENS
        for (suffix, _), child in zip(
            halves, ("",) if len(halves) == 1 else (".first", ".second"), strict=True
        ):
            found = _tables(
                official,
                f"{layer.name}.act_quantizer{suffix}",
                1 if tokens else None,
                summed=not tokens,
            )
            for target in layer.targets:
                yield target + child, found


def _operand_tables(official: OfficialCheckpoint) -> Iterator[tuple[str, _Tables]]:
    for operand in official.names.operands:
        # What is summed over is the last axis of the first operand (q, softmax) and the one before
        # it of the second (k, v).
        summed = operand.axis == (3 if operand.operand in ("q", "softmax") else 2)
        yield (
            f"{operand.attention}.{operand.operand}",
            _tables(official, operand.name, operand.axis, summed=summed),
        )


def _tables(
    official: OfficialCheckpoint, quantizer: str, axis: int | None, *, summed: bool
) -> _Tables:
    settings, tensors = official.settings, official.tensors
    if settings.source is Source.QDIFF:
        scale, zero = (
            tensors[f"{quantizer}.{table}"].view(1, 1) for table in ("delta", "zero_point")
        )
    else:
        scale, zero = (
            tensors[f"{quantizer}.{table}"].flatten(1).flip(0)
            for table in ("delta_list", "zero_point_list")
        )
    return _Tables(
        settings.bits(quantizer), scale, zero, settings.code_range(quantizer), axis, summed
    )


def _agreeing(
    group: QuantizerPlan, tables: dict[str, _Tables], model: nn.Module
) -> list[tuple[str, ...]]:
    """The readers of one tensor, divided into those whose tables are the same, and their padding
    too where there is an offset.
    """
    if group.operand is not None:
        return [group.layers]
    parts: list[list[str]] = []

    def agree(a: str, b: str) -> bool:
        paddings = {getattr(model.get_submodule(name), "padding", None) for name in (a, b)}
        return tables[a].same(tables[b]) and (len(paddings) == 1 or not tables[a].has_offset)

    for reader in group.layers:
        part = next((part for part in parts if agree(part[0], reader)), None)
        if part is None:
            parts.append([reader])
        else:
            part.append(reader)
    return [tuple(part) for part in parts]


def _why_float(tables: _Tables) -> str | None:
    """Why these tables fit no integer codes with one scale a tensor; None where they do."""
    low, high = tables.code_range
    if not tables.per_tensor:
        if tables.summed:
            return (
                "a scale for each channel, on the axis that is summed over: it cannot leave an "
                "integer product"
            )
        return "a scale for each channel or token, where an integer product has one for the tensor"
    if tables.bits not in (4, 8):
        return f"codes of {tables.bits} bits, more than int8 holds"
    if high - low != activation_levels(tables.bits):
        return (
            f"codes {low}..{high}, more than int8 holds: the official override of the first "
            "and the last layer"
        )
    if bool((tables.scale < 0).any()):
        return "a negative scale"
    if bool((tables.zero_point < low).any() or (tables.zero_point > high).any()):
        return "a zero-point outside of the codes"
    return None


def _integer_quantizer(
    name: str, group: QuantizerPlan, readers: tuple[str, ...], tables: _Tables, channels: int
) -> ActivationQuantizerData:
    low, high = (_array(bound - tables.zero_point[:, 0]) for bound in tables.code_range)
    unsigned = group.operand is not None and not low.any()
    symmetry = Symmetry.UNSIGNED if unsigned else Symmetry.ASYMMETRIC
    ones = np.ones(channels, np.float32)
    return ActivationQuantizerData(
        name,
        tables.bits,
        symmetry,
        _channel_axis(group, tables),
        readers,
        _array(tables.scale[:, 0]),
        low,
        high,
        ones,
    )


def _per_channel_quantizer(
    name: str, group: QuantizerPlan, readers: tuple[str, ...], tables: _Tables, channels: int
) -> PerChannelQuantizerData:
    scale, zero_point, axis = tables.scale, tables.zero_point, tables.axis
    if tables.per_tensor:
        scale, zero_point = (table[:, :1].expand(-1, channels) for table in (scale, zero_point))
        axis = None
    low, high = tables.code_range
    return PerChannelQuantizerData(
        name,
        tables.bits,
        axis or _channel_axis(group, tables),
        readers,
        _array(scale),
        _array(zero_point),
        low,
        high,
    )


def _channel_axis(group: QuantizerPlan, tables: _Tables) -> int:
    """The axis that :func:`_channels` is the size of."""
    return group.axis if group.operand is None or tables.axis is None else tables.axis


def _check_bits(parts: dict[str, _Weight], bits: int) -> None:
    """Raise InputError where the weights contradict ``bits``. A few channels of one sign do not:
    their zero-points lie outside.
    """
    levels = activation_levels(bits)

    def mostly_outside(values: Tensor) -> bool:
        return bool(((values < 0) | (values > levels)).float().mean() > 0.5)

    asked = ": were the weights quantized to 8 bits?" if bits == 4 else ""
    for what, values_of in (
        ("zero-points", lambda part: part.zero_point),
        ("codes", _Weight.unclamped_codes),
    ):
        outside = sum(mostly_outside(values_of(part)) for part in parts.values())
        if 2 * outside > len(parts):
            raise InputError(
                f"the {what} of {outside} of {len(parts)} layers exceed {bits}-bit codes{asked}"
            )
    # Rounding up may lead one beyond the highest code.
    if bits == 8 and all(
        part.unclamped_codes().amax() <= activation_levels(4) + 1 for part in parts.values()
    ):
        raise InputError(
            "no weight has a code of more than 4 bits: were the weights quantized to 4 bits?"
        )


def _placed(layer: LayerData, model: nn.Module, macs: int) -> LayerData:
    return dataclasses.replace(
        layer, conv=conv_geometry(model.get_submodule(layer.name)), macs=macs
    )


def _layer_data(name: str, part: _Weight, bits: int) -> LayerData:
    codes, centered = part.codes(bits)
    zero_point = part.zero_point
    if bool((zero_point < 0).any() or (zero_point > activation_levels(bits)).any()):
        # A channel whose weights have all one sign: its codes less the zero-point fit eight bits
        # with another zero-point.
        bits, flat = 8, centered.flatten(1)
        zero_point = (-flat.amin(1)).clamp(min=0)
        codes = centered + zero_point.view(-1, *[1] * (centered.dim() - 1))
        if bool(
            (codes > activation_levels(bits)).any() or (zero_point > activation_levels(bits)).any()
        ):
            raise InputError(
                f"layer {name}: its weight's zero-points do not fit codes of {bits} bits"
            )
    return LayerData(
        name=name,
        weight_bits=bits,
        codes=codes.numpy().astype(np.uint8),
        weight_scale=_array(part.delta),
        bias=None if part.bias is None else _array(part.bias),
        conv=None,
        macs=0,
        weight_zero_point=zero_point.numpy().astype(np.uint8),
    )


def _channels(official: OfficialCheckpoint, model: nn.Module, group: QuantizerPlan) -> int:
    """The size of the tensor's axis that a smoothing scale lies along."""
    if group.operand is None:
        return int(model.get_submodule(group.layers[0]).get_parameter("weight").shape[1])
    operand = next(x for x in official.names.operands if f"{x.attention}.{x.operand}" == group.name)
    return operand.size or official.context_tokens or 1


def _array(values: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ascontiguousarray(values.numpy(), np.float32)
