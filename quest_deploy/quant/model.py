"""The fake-quantized model: a float model whose layers are quantized, and that picks each sample's bucket from its timestep."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from quest_deploy.checkpoint import Architecture, Checkpoint, ConvGeometry, LayerData, SiteData
from quest_deploy.errors import InputError
from quest_deploy.quant.affine import bucket_of, weight_codes
from quest_deploy.quant.layers import ActivationQuantizer, BucketState, QuantizedConv2d, QuantizedLayer, QuantizedLinear

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class QuantizedModel(nn.Module):
    """A model with the call signature of its float original, ``(sample, timestep, **conditions) -> Tensor``.

    The bucket is chosen for each sample from its own timestep, so one batch may hold samples of different buckets.

    Attributes:
        model: the float model with its layers swapped.
        sites: one ActivationQuantizer per site, in the checkpoint's order.
    """

    edges: Tensor

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, float_weights: Mapping[str, Tensor] | None = None) -> None:
        """Swap the layers of ``model`` in place.

        Args:
            float_weights: unrounded weights by layer name, without the channel vector; None takes the checkpoint's rounded ones.
        """
        super().__init__()
        self.model = model
        self.checkpoint = checkpoint
        self.bucket_state = BucketState()
        self.site_names = tuple(checkpoint.sites)
        self.sites = nn.ModuleList(_quantizer(site, self.bucket_state) for site in checkpoint.sites.values())
        self.register_buffer("edges", torch.tensor(checkpoint.scheme.bucket_edges, dtype=torch.float32))
        for site, quantizer in zip(checkpoint.sites.values(), self.sites, strict=True):
            assert isinstance(quantizer, ActivationQuantizer)
            for name in site.layers:
                self._swap(checkpoint.layers[name], quantizer, None if float_weights is None else float_weights[name])

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, teacher: nn.Module | None = None) -> QuantizedModel:
        """The deployed model, or, with the float ``teacher``, the one to finetune: the same scales over unrounded weights."""
        if teacher is not None:
            weights = {name: teacher.get_parameter(f"{name}.weight").detach() for name in checkpoint.layers}
            return cls(copy.deepcopy(teacher), checkpoint, weights)
        model = build_float_model(checkpoint.architecture)
        floats = {key: torch.from_numpy(np.array(value)) for key, value in checkpoint.floats.items()}
        try:
            result = model.load_state_dict(floats, strict=False)
        except RuntimeError as e:
            raise InputError(f"the checkpoint does not fit its architecture: {e}") from e
        of_layers = {f"{name}.{part}" for name in checkpoint.layers for part in ("weight", "bias")}
        missing = [key for key in result.missing_keys if key not in of_layers]
        if missing or result.unexpected_keys:
            raise InputError(f"the checkpoint does not fit its architecture: {missing[:3]} {result.unexpected_keys[:3]}")
        return cls(model, checkpoint)

    def _swap(self, data: LayerData, site: ActivationQuantizer, float_weight: Tensor | None) -> None:
        parent_name, _, child = data.name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        layer = self.model.get_submodule(data.name)
        weight = torch.from_numpy(data.dequantized_weight) if float_weight is None else fold_channel(float_weight, site.channel)
        if data.bias is not None and layer.bias is not None:
            layer.bias = nn.Parameter(torch.from_numpy(data.bias.copy()))
        scale = torch.from_numpy(data.weight_scale.copy())
        if isinstance(layer, nn.Conv2d):
            setattr(parent, child, QuantizedConv2d(layer, weight, scale, data.weight_bits, site))
        elif isinstance(layer, nn.Linear):
            setattr(parent, child, QuantizedLinear(layer, weight, scale, data.weight_bits, site))
        else:
            raise InputError(f"layer {data.name}: expected Conv2d or Linear, found {type(layer).__name__}")

    def bucket_of(self, timestep: Tensor) -> Tensor:
        """The bucket of each timestep [B], int64 [B]: the number of edges <= t."""
        return bucket_of(timestep, self.edges)

    def forward(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """Predict for sample [B, ...] at timestep [B] (or a scalar, for the whole batch)."""
        timestep = torch.as_tensor(timestep).expand(sample.shape[0])
        self.bucket_state.current = self.bucket_of(timestep)
        try:
            output: Tensor = self.model(sample, timestep, **conditions, return_dict=False)[0]
            return output
        finally:
            self.bucket_state.current = None

    def quantized_layers(self) -> dict[str, QuantizedLayer]:
        """The quantized layers by their module path in the float model, in the checkpoint's order."""
        layers: dict[str, QuantizedLayer] = {}
        for name in self.checkpoint.layers:
            layer = self.model.get_submodule(name)
            assert isinstance(layer, QuantizedLayer)
            layers[name] = layer
        return layers

    @torch.no_grad()
    def to_checkpoint(self, provenance: dict[str, Any]) -> Checkpoint:
        """The model as it is now, its weights rounded."""
        layers = {}
        for name, layer in self.quantized_layers().items():
            layers[name] = dataclasses.replace(
                self.checkpoint.layers[name],
                weight_codes=weight_codes(layer.weight, layer.weight_scale, layer.weight_bits).numpy().copy(),
                bias=None if layer.bias is None else layer.bias.numpy().copy(),
            )
        sites = {}
        for name, site in zip(self.site_names, self.sites, strict=True):
            assert isinstance(site, ActivationQuantizer)
            scale, low, high = (table.numpy().copy() for table in site.tables())
            sites[name] = dataclasses.replace(self.checkpoint.sites[name], scale=scale, low=low, high=high)
        return dataclasses.replace(
            self.checkpoint, layers=layers, sites=sites, floats=float_state(self.model, layers), provenance=provenance
        )


def fold_channel(weight: Tensor, channel: Tensor) -> Tensor:
    """Multiply each input channel of ``weight`` [O, I/groups, ...] by its ``channel`` entry [I]."""
    outputs, inputs_per_group = weight.shape[:2]
    groups = channel.numel() // inputs_per_group
    factors = channel.view(groups, inputs_per_group).repeat_interleave(outputs // groups, dim=0)
    return weight * factors.view(outputs, inputs_per_group, *([1] * (weight.dim() - 2)))


def float_state(model: nn.Module, layers: Iterable[str]) -> dict[str, np.ndarray[Any, Any]]:
    """The parameters and persistent buffers that belong to none of the quantized ``layers``."""
    quantized = tuple(f"{name}." for name in layers)
    return {key: value.numpy().copy() for key, value in model.state_dict().items() if not key.startswith(quantized)}


def build_float_model(architecture: Architecture) -> nn.Module:
    """The float model with uninitialized meaning: its class from diffusers, its weights to be filled in."""
    import diffusers

    model_class = getattr(diffusers, architecture.class_name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, diffusers.ModelMixin)):
        raise InputError(f"architecture: expected the name of a diffusers model, found {architecture.class_name!r}")
    model: nn.Module = model_class.from_config(architecture.config)
    return model.eval()


def conv_geometry(layer: nn.Module) -> ConvGeometry | None:
    """A Conv2d's geometry, or None for a Linear; raise InputError for padding that ONNX Conv would not reproduce."""
    if not isinstance(layer, nn.Conv2d):
        return None
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise InputError(f"convolution with padding {layer.padding!r} ({layer.padding_mode}): expected explicit zero padding")

    def pair(values: tuple[int, ...]) -> tuple[int, int]:
        return int(values[0]), int(values[1])

    return ConvGeometry(pair(layer.stride), pair(layer.padding), pair(layer.dilation), layer.groups)


def _quantizer(site: SiteData, buckets: BucketState) -> ActivationQuantizer:
    return ActivationQuantizer(
        site.bits,
        torch.from_numpy(site.scale.copy()),
        torch.from_numpy(-site.low),
        torch.from_numpy(site.channel.copy()),
        site.axis,
        buckets,
    )
