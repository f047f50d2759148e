"""The fake-quantized model: a float model whose layers are quantized, and that picks each sample's
bucket from its timestep.
"""

from __future__ import annotations

import copy
import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from quest_deploy.artifacts.checkpoint import (
    ActivationQuantizerData,
    Architecture,
    Checkpoint,
    ConvGeometry,
    LayerData,
    QuantizerData,
    ScoreScale,
)
from quest_deploy.artifacts.lazy_tensors import Array, LazyArray
from quest_deploy.artifacts.scheme import activation_levels
from quest_deploy.errors import InputError
from quest_deploy.models.attention import add_image_attentions
from quest_deploy.models.networks import kind_of
from quest_deploy.models.unets import set_heads
from quest_deploy.quantization.affine import WeightGrid, bucket_of, per_sample, weight_codes
from quest_deploy.quantization.architectures import bounded_network, without_weights
from quest_deploy.quantization.layers import (
    ActivationQuantizer,
    AnyActivationQuantizer,
    BucketState,
    PerChannelActivationQuantizer,
    QuantizedBlockMix,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedMatmul,
    QuantizedPointwise,
    QuantizedSplit,
    QuantizedTransformerQK,
)
from quest_deploy.quantization.prepare import LowRank, prepare

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class QuantizedModel(nn.Module):
    """A model with the call signature of its float original, ``(sample, timestep, **conditions) ->
    Tensor``.

    The bucket is chosen for each sample from its own timestep, so one batch may hold samples of
    different buckets.

    Attributes:
        model: the float model with its layers swapped.
        sites: one AnyActivationQuantizer per quantizer, in the checkpoint's order;
            :meth:`activation_quantizers` has them by name.
    """

    edges: Tensor

    def __init__(
        self, model: nn.Module, checkpoint: Checkpoint, *, unrounded: bool = False
    ) -> None:
        """Swap the layers of ``model`` in place.

        Args:
            unrounded: keep the weights that ``model`` has, as near as they come to the checkpoint's
                codes; else take the codes.
        """
        super().__init__()
        self.model = model
        self.checkpoint = checkpoint
        self.bucket_state = BucketState()
        self.quantizer_names = tuple(checkpoint.quantizers)
        self.sites = nn.ModuleList(
            _quantizer(quantizer, self.bucket_state) for quantizer in checkpoint.quantizers.values()
        )
        self.register_buffer(
            "edges", torch.tensor(checkpoint.scheme.bucket_edges, dtype=torch.float32)
        )
        quantizers = self.activation_quantizers()
        for quantizer in checkpoint.quantizers.values():
            for name in quantizer.layers:
                if name in checkpoint.layers:
                    self._swap(
                        checkpoint.layers[name], quantizers[quantizer.name], unrounded=unrounded
                    )
        for product in checkpoint.matmuls.values():
            first, second = (
                None if quantizer is None else quantizers[quantizer] for quantizer in product.sites
            )
            set_submodule(
                self.model, product.name, self._matmul_class(product.name)((first, second))
            )
        for name, layer in self.quantized_layers().items():
            if name.rpartition(".")[2] == PROJECTION and isinstance(layer, QuantizedConv2d):
                layer.register_forward_pre_hook(_channels_last)
        if checkpoint.architecture.official_sums:
            layers = self.quantized_layers()
            for name in checkpoint.architecture.split_shortcuts:
                set_submodule(
                    self.model,
                    name,
                    QuantizedSplit(layers[f"{name}.first"], layers[f"{name}.second"]),
                )

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, teacher: nn.Module | None = None
    ) -> QuantizedModel:
        """The deployed model, or, with the float ``teacher``, the one to finetune: the same codes
        over unrounded weights.

        The unrounded weights are the teacher's where those round to the checkpoint's codes, and
        else the nearest that do, so that a rounding which was learned (AdaRound) is where
        finetuning starts, and always follows the weights from there.
        """
        if teacher is not None:
            return cls(prepared(copy.deepcopy(teacher), checkpoint), checkpoint, unrounded=True)
        with without_weights():  # all of them come from the checkpoint
            model = build_float_model(checkpoint.architecture)
        floats = {
            key: torch.from_numpy(np.array(value)) for key, value in checkpoint.floats.items()
        }
        try:
            result = model.load_state_dict(floats, strict=False, assign=True)
        except RuntimeError as e:
            reason = " ".join(str(e).split())
            raise InputError(f"the checkpoint does not fit its architecture: {reason}") from e
        of_layers = {f"{name}.{part}" for name in checkpoint.layers for part in ("weight", "bias")}
        missing = [key for key in result.missing_keys if key not in of_layers]
        if missing or result.unexpected_keys:
            raise InputError(
                "the checkpoint does not fit its architecture (missing: "
                f"{', '.join(missing[:3]) or 'nothing'}; unexpected: "
                f"{', '.join(result.unexpected_keys[:3]) or 'nothing'}); run `quest-deploy "
                "calibrate` again"
            )
        return cls(model, checkpoint)

    def _swap(self, data: LayerData, quantizer: AnyActivationQuantizer, *, unrounded: bool) -> None:
        layer = self.model.get_submodule(data.name)
        weight = torch.from_numpy(data.dequantized_weight)
        grid = _grid(data)
        if isinstance(layer, nn.Conv2d | nn.Linear) and (
            weight.shape != layer.weight.shape or (layer.bias is None) != (data.bias is None)
        ):
            raise InputError(
                f"the checkpoint does not fit its architecture: layer {data.name} has a weight of "
                f"{list(weight.shape)} and {'no' if data.bias is None else 'a'} bias, expected "
                f"{list(layer.weight.shape)}; run `quest-deploy calibrate` again"
            )
        if unrounded:
            channel = quantizer.channel if isinstance(quantizer, ActivationQuantizer) else None
            weight = unrounded_weight(layer.get_parameter("weight").detach(), data, channel)
        if data.bias is not None and layer.bias is not None:
            layer.bias = nn.Parameter(torch.from_numpy(data.bias.copy()))
        if isinstance(layer, nn.Conv2d):
            set_submodule(self.model, data.name, QuantizedConv2d(layer, weight, grid, quantizer))
        elif isinstance(layer, nn.Linear):
            of_blocks = self.checkpoint.architecture.attention is ScoreScale.OPERANDS
            kind = QuantizedPointwise if of_blocks else QuantizedLinear
            set_submodule(self.model, data.name, kind(layer, weight, grid, quantizer))
        else:
            raise InputError(
                f"layer {data.name}: expected Conv2d or Linear, found {type(layer).__name__}"
            )

    def _matmul_class(self, name: str) -> type[QuantizedMatmul]:
        """Return what sums in the order that the architecture says."""
        if self.checkpoint.architecture.official_sums:
            match self.checkpoint.architecture.attention, name.rpartition(".")[2]:
                case ScoreScale.PRODUCT, "scores":
                    return QuantizedTransformerQK
                case ScoreScale.OPERANDS, "mix":
                    return QuantizedBlockMix
        return QuantizedMatmul

    def bucket_of(self, timestep: Tensor) -> Tensor:
        """The bucket of each timestep [B], int64 [B]: the number of edges <= t."""
        return bucket_of(timestep, self.edges)

    @contextmanager
    def at_timesteps(self, timestep: Tensor, *, sharing: bool = False) -> Iterator[None]:
        """Let parts of the model compute for samples at ``timestep`` [B].

        Args:
            sharing: whether a quantizer that reads the same tensor several times, one after the
                other,
                quantizes it once: in a forward pass, and in the backward pass, in which
                checkpointed blocks run again.
        """
        with self.bucket_state.during(self.bucket_of(timestep), sharing=sharing):
            yield

    def forward(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """Predict for sample [B, ...] at timestep [B] (or a scalar, for the whole batch)."""
        timestep = torch.as_tensor(timestep).expand(sample.shape[0])
        with self.at_timesteps(timestep, sharing=True):
            output: Tensor = self.model(sample, timestep, **conditions, return_dict=False)[0]
            return output

    def quantized_layers(self) -> dict[str, QuantizedLayer]:
        """The quantized layers by their module path in the float model, in the checkpoint's
        order.
        """
        layers: dict[str, QuantizedLayer] = {}
        for name in self.checkpoint.layers:
            layer = self.model.get_submodule(name)
            assert isinstance(layer, QuantizedLayer)
            layers[name] = layer
        return layers

    def activation_quantizers(self) -> dict[str, AnyActivationQuantizer]:
        """The quantizers by name, in the checkpoint's order."""
        quantizers: dict[str, AnyActivationQuantizer] = {}
        for name, quantizer in zip(self.quantizer_names, self.sites, strict=True):
            assert isinstance(quantizer, AnyActivationQuantizer)
            quantizers[name] = quantizer
        return quantizers

    def quantized_matmuls(self) -> dict[str, QuantizedMatmul]:
        """The quantized products by their module path, in the checkpoint's order."""
        products: dict[str, QuantizedMatmul] = {}
        for name in self.checkpoint.matmuls:
            product = self.model.get_submodule(name)
            assert isinstance(product, QuantizedMatmul)
            products[name] = product
        return products

    @torch.no_grad()
    def to_checkpoint(self, provenance: dict[str, Any]) -> Checkpoint:
        """The model as it is now, its weights rounded."""
        layers = {}
        for name, layer in self.quantized_layers().items():
            data = self.checkpoint.layers[name]
            codes: Any = weight_codes(layer.weight, layer.grid).cpu().numpy()
            if data.weight_zero_point is not None:
                codes = codes + data.weight_zero_point.astype(np.int16).reshape(
                    -1, *[1] * (codes.ndim - 1)
                )
            layers[name] = dataclasses.replace(
                data,
                codes=codes.astype(data.codes.dtype),
                bias=None if layer.bias is None else layer.bias.cpu().numpy().copy(),
            )
        quantizers = {
            name: _quantizer_data(self.checkpoint.quantizers[name], quantizer)
            for name, quantizer in self.activation_quantizers().items()
        }
        return dataclasses.replace(
            self.checkpoint,
            layers=layers,
            quantizers=quantizers,
            floats={key: np.array(x) for key, x in float_state(self.model, layers).items()},
            provenance=provenance,
        )


PROJECTION = "proj_out"
"""The name of the convolution behind a spatial transformer, in diffusers and in CompVis's code."""


def _channels_last(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Lay a transformer's result out in memory as CompVis's code does, whose results an imported
    model then gives to the bit.

    Convolutions and norms differ in the last bit between layouts, and a normalized sum of h and a
    large embedding magnifies that.
    """
    return (args[0].contiguous(memory_format=torch.channels_last),)


def fold_smoothing_scale(weight: Tensor, channel: Tensor) -> Tensor:
    """Multiply each input channel of ``weight`` [O, I/groups, ...] by its ``channel`` entry [I]."""
    outputs, inputs_per_group = weight.shape[:2]
    groups = channel.numel() // inputs_per_group
    factors = channel.view(groups, inputs_per_group).repeat_interleave(outputs // groups, dim=0)
    return weight * factors.view(outputs, inputs_per_group, *([1] * (weight.dim() - 2)))


def float_state(model: nn.Module, layers: Iterable[str]) -> dict[str, Array]:
    """The parameters and persistent buffers that belong to none of the quantized ``layers``, in the
    model's own memory where that is a CPU's.
    """
    quantized = tuple(f"{name}." for name in layers)
    return {
        key: _array(value)
        for key, value in model.state_dict().items()
        if not key.startswith(quantized)
    }


def _array(value: Tensor) -> Array:
    if value.dtype is not torch.bfloat16:
        return value.cpu().numpy()
    # Such as NumPy does not know, widened when they are read.
    return LazyArray(tuple(value.shape), np.dtype(np.float32), lambda: value.float().cpu().numpy())


def build_float_model(architecture: Architecture) -> nn.Module:
    """The float model with uninitialized meaning: its class from diffusers, its weights to be
    filled in.
    """
    model = bounded_network(architecture.class_name, architecture.config)
    if architecture.heads is not None:
        set_heads(model, architecture.heads)
    if architecture.ip_adapter:
        add_image_attentions(model)
    return prepare(
        model, architecture.split_shortcuts, architecture.attention, architecture.low_rank
    ).eval()


def prepared(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Rewrite ``model``, the float one that ``checkpoint`` was made from, in place as the
    checkpoint's architecture has it, with the checkpoint's branches of low rank; its float results
    stay the same but for rounding.
    """
    architecture = checkpoint.architecture
    prepare(model, architecture.split_shortcuts, architecture.attention, architecture.low_rank)
    for name, factors in checkpoint.branches.items():
        branched = model.get_submodule(name)
        assert isinstance(branched, LowRank)
        branched.take(*(torch.from_numpy(factor.copy()) for factor in factors))
    return model


def downsampling(model: nn.Module) -> int:
    """Return what heights and widths of the samples of a network must be multiples of."""
    config: Any = model.config
    return kind_of(model).sample_multiple(config)


def token_inputs(model: nn.Module) -> tuple[str, ...]:
    """The conditions [B, tokens, ...] of a network, which have as many tokens as each other."""
    return kind_of(model).token_inputs


def conv_geometry(layer: nn.Module) -> ConvGeometry | None:
    """A Conv2d's geometry, or None for a Linear; raise InputError for padding that ONNX Conv would
    not reproduce.
    """
    if not isinstance(layer, nn.Conv2d):
        return None
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise InputError(
            f"convolution with padding {layer.padding!r} ({layer.padding_mode}): expected explicit "
            "zero padding"
        )

    def pair(values: tuple[int, ...]) -> tuple[int, int]:
        return int(values[0]), int(values[1])

    return ConvGeometry(pair(layer.stride), pair(layer.padding), pair(layer.dilation), layer.groups)


CODE_MARGIN = 0.25
"""How far inside its code's interval, in steps, a weight is put that would round to another code:
deep enough that finetuning's first moves, some hundredths of a step, do not undo a rounding that
was learned, and no farther from the weight than that takes."""


def unrounded_weight(weight: Tensor, data: LayerData, channel: Tensor | None) -> Tensor:
    """The weight nearest to a float model's ``weight`` [O, I, ...] that rounds to the codes of
    ``data``, with the smoothing scale ``channel`` [I] folded in.
    """
    folded = weight if channel is None else fold_smoothing_scale(weight, channel)
    return _nearest_with_codes(folded, torch.from_numpy(data.centered_codes), _grid(data))


def _nearest_with_codes(weight: Tensor, codes: Tensor, grid: WeightGrid) -> Tensor:
    """The weight [O, ...] nearest to ``weight`` that rounds to ``codes`` on ``grid``; clipped
    weights stay where they are.
    """
    if bool((weight_codes(weight, grid) == codes).all()):
        return weight
    scale = per_sample(grid.scale, weight)
    half = 0.5 - CODE_MARGIN
    ratio = weight / scale
    nearest = torch.clamp(ratio, codes - half, codes + half) * scale
    return torch.where(weight_codes(weight, grid) == codes, weight, nearest)


def _grid(data: LayerData) -> WeightGrid:
    scale = torch.from_numpy(data.weight_scale.copy())
    if data.weight_zero_point is None:
        return WeightGrid.symmetric(scale, data.weight_bits)
    zero_point = torch.from_numpy(data.weight_zero_point.astype(np.float32))
    return WeightGrid(scale, -zero_point, activation_levels(data.weight_bits) - zero_point)


def _quantizer(quantizer: QuantizerData, buckets: BucketState) -> AnyActivationQuantizer:
    scale = torch.from_numpy(quantizer.scale.copy())
    if isinstance(quantizer, ActivationQuantizerData):
        channel = torch.from_numpy(quantizer.channel.copy())
        return ActivationQuantizer(
            quantizer.bits,
            scale,
            torch.from_numpy(-quantizer.low),
            channel,
            quantizer.axis,
            buckets,
            quantizer.symmetry,
        )
    zero_point = torch.from_numpy(quantizer.zero_point.copy())
    symmetric = quantizer.code_low == -quantizer.code_high and not zero_point.any()
    return PerChannelActivationQuantizer(
        scale,
        zero_point,
        (quantizer.code_low, quantizer.code_high),
        quantizer.axis,
        buckets,
        symmetric=bool(symmetric),
    )


def _quantizer_data(data: QuantizerData, quantizer: AnyActivationQuantizer) -> QuantizerData:
    if isinstance(data, ActivationQuantizerData):
        assert isinstance(quantizer, ActivationQuantizer)
        scale, low, high = (table.cpu().numpy().copy() for table in quantizer.tables())
        return dataclasses.replace(data, scale=scale, low=low, high=high)
    return dataclasses.replace(
        data,
        scale=quantizer.scale.cpu().numpy().copy(),
        zero_point=torch.round(quantizer.zero_point).cpu().numpy().copy(),
    )


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
