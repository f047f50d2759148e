"""The checkpoint: a quantized model in one safetensors file, with its scheme inside. No torch
needed.

Weights are stored as integer codes (4-bit ones packed two to a byte, low nibble first, as ONNX
packs INT4), so the file is about the size that the model has when it is deployed. Everything that
the graph needs is in it; the FP model is not needed again.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import MinLen
from numpy.typing import NDArray
from pydantic import NonNegativeInt, PlainValidator
from safetensors import SafetensorError

from quest_deploy.artifacts.lazy_tensors import Array, LazyArray, stored_tensors, write_tensors
from quest_deploy.artifacts.model_source import IMPORTED
from quest_deploy.artifacts.schema import Positive, WeightBits, parse, validated
from quest_deploy.artifacts.scheme import Scheme, Symmetry, activation_levels, weight_range
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import atomic_file

FORMAT = "quest-deploy checkpoint"
VERSION = 2

OPERANDS = {"scores": ("q", "k"), "mix": ("softmax", "v")}
"""By the name of a product of attention, what its operands are called, the left one first."""

RESIDUAL, DOWN, UP = "residual", "down", "up"
"""In the place of a layer with a branch of low rank: the layer without the branch's share of its
weight, and the branch's two factors.
"""

FloatArray = NDArray[np.float32]
HalfArray = NDArray[np.float16]


@validated("a convolution's attributes")
@dataclass(frozen=True)
class ConvGeometry:
    """A Conv2d's attributes, as [height, width] pairs; None in a layer means that it is a
    Linear.
    """

    stride: tuple[Positive, Positive]
    padding: tuple[NonNegativeInt, NonNegativeInt]
    dilation: tuple[Positive, Positive]
    groups: Positive


@dataclass(frozen=True)
class LayerData:
    """A quantized layer: y = s_k * layer(codes_x, weight_codes * weight_scale) + bias.

    Attributes:
        codes: of the weight, [O, I, kh, kw] or [O, I]; int8 within ``weight_range(weight_bits)``,
            or uint8 in [0, 2^b - 1] where the weight is asymmetric. Of a checkpoint that was read,
            not in memory; see :attr:`weight_codes`.
        weight_scale: float32 [O].
        bias: float32 [O] or None.
        macs: multiply-adds for one sample.
        weight_zero_point: uint8 [O], of an asymmetric weight (imported ones are): weight = (codes -
            zero-point) * scale.
    """

    name: str
    weight_bits: int
    codes: Array
    weight_scale: FloatArray
    bias: FloatArray | None
    conv: ConvGeometry | None
    macs: int
    weight_zero_point: NDArray[np.uint8] | None = None

    @property
    def weight_codes(self) -> NDArray[Any]:
        """The codes in memory; read each time that they are asked for."""
        return np.asarray(self.codes)

    @property
    def centered_codes(self) -> NDArray[np.int16]:
        """The codes with the zero-point subtracted, int16, in the layer's shape: weight =
        centered_codes * scale.
        """
        codes = self.weight_codes.astype(np.int16)
        if self.weight_zero_point is None:
            return codes
        return np.asarray(
            codes - self.weight_zero_point.astype(np.int16).reshape(-1, *([1] * (codes.ndim - 1))),
            np.int16,
        )

    @property
    def dequantized_weight(self) -> FloatArray:
        """The weight in float32, in the layer's shape."""
        scale = self.weight_scale.reshape(-1, *([1] * (len(self.codes.shape) - 1)))
        return np.asarray(self.centered_codes.astype(np.float32) * scale, np.float32)


@dataclass(frozen=True)
class ActivationQuantizerData:
    """A quantizer whose codes can run in integer arithmetic: c = clamp(round(x / (scale *
    channel)), low, high), x^ = scale * c.

    Attributes:
        layers: the layers or the product that read it.
        scale, low, high: float32 [K]; low and high are integers, -127 and 127 or -z and 2^b-1-z.
        channel: float32 [C], the static per-channel vector along ``axis``, folded into the weights
            of the layers.
    """

    name: str
    bits: int
    symmetry: Symmetry
    axis: int
    layers: tuple[str, ...]
    scale: FloatArray
    low: FloatArray
    high: FloatArray
    channel: FloatArray

    @property
    def offset(self) -> FloatArray:
        """What is added to the codes so that they fit int8, float32 [K]: zeros, or -128 - low where
        a bound lies outside int8.
        """
        if self.low.min() >= -128 and self.high.max() <= 127:
            return np.zeros_like(self.low)
        return np.asarray(-128 - self.low, np.float32)


@dataclass(frozen=True)
class PerChannelQuantizerData:
    """A quantizer whose scales lie on the reduction axis, or whose codes fit no integer: it and its
    readers compute in float.

    x^ = (clamp(round(x / scale) + zero_point, code_low, code_high) - zero_point) * scale, in this
    order of float32 operations, the official code's (its zero-points reach 1.6e8, where the order
    matters).

    Attributes:
        layers: the layers or the product that read it.
        scale: float32 [K, C] along ``axis``, not zero, of either sign. zero_point: float32 [K, C],
            integers.
        code_low, code_high: the codes' range, the zero-point included.
    """

    name: str
    bits: int
    axis: int
    layers: tuple[str, ...]
    scale: FloatArray
    zero_point: FloatArray
    code_low: int
    code_high: int


QuantizerData = ActivationQuantizerData | PerChannelQuantizerData


@validated("a product")
@dataclass(frozen=True)
class AttentionMatmulData:
    """A product of two activations, as in attention: y = a^ @ b^, operands [B, heads, ...].

    Attributes:
        sites: the operands' quantizers; None for one that stays in float.
        macs: multiply-adds for one sample.
    """

    name: str
    sites: tuple[str | None, str | None]
    macs: Positive


class ScoreScale(StrEnum):
    """Where attention's 1/sqrt(d) is applied."""

    PRODUCT = "product"
    """To the scores q k^T, after quantization of q and k: Stable Diffusion's attention."""
    OPERANDS = "operands"
    """To q and to k, d^(-1/4) each, before they are quantized: latent diffusion's own attention."""


@validated("architecture")
@dataclass(frozen=True)
class Architecture:
    """The float model's class (of diffusers or ``models.unets``) and its configuration, enough to
    build it without its weights.

    Attributes:
        split_shortcuts: by the name of a shortcut convolution that was split in two, the channels
            that its first half reads.
        attention: where explicit attention, whose products are modules, applies its scale; None
            where attention was left alone.
        heads: the heads of every attention, where the configuration, which has one size for the
            heads of all levels, cannot say it.
        official_sums: whether sums are added up in the order of the official code, which then gives
            the official results to the bit; so they are in imported checkpoints.
        low_rank: by the name of a layer that has a branch of low rank, the branch's rank.
        ip_adapter: whether each cross-attention has an IP-Adapter's keys and values beside it.
    """

    class_name: str
    config: dict[str, Any]
    split_shortcuts: dict[str, Positive]
    attention: ScoreScale | None
    heads: Positive | None = None
    official_sums: bool = False
    low_rank: dict[str, Positive] = field(default_factory=dict)
    ip_adapter: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A quantized model.

    Attributes:
        model: the registry's name of the model.
        floats: the parameters and buffers of everything that is not quantized, by state-dict key;
            of a checkpoint that was read, each is read when ``numpy.asarray`` asks for it.
        provenance: how it came to be: {"method": ..., options}.
    """

    model: str
    architecture: Architecture
    scheme: Scheme
    layers: dict[str, LayerData]
    quantizers: dict[str, QuantizerData]
    floats: dict[str, Array]
    provenance: dict[str, Any] = field(default_factory=dict)
    matmuls: dict[str, AttentionMatmulData] = field(default_factory=dict)

    def share_at(self, bits: int) -> tuple[float, float]:
        """The shares, in [0, 1], of the layers' weights and multiply-adds that have weights of
        ``bits`` bits.

        Attention's own products, which have no weights, count among the multiply-adds with the bits
        of their wider operand. Branches of low rank count with 16 bits.
        """
        chosen = [layer for layer in self.layers.values() if layer.weight_bits == bits]
        branches = {name: down.size + up.size for name, (down, up) in self.branches.items()}
        beside = [self.layers[f"{name}.{RESIDUAL}"] for name in branches]
        weights = sum(layer.codes.size for layer in self.layers.values())
        weights += sum(branches.values())
        products = sum(p.macs for p in self.matmuls.values() if self.product_bits(p) == bits)
        macs = sum(layer.macs for layer in self.layers.values()) + sum(
            product.macs for product in self.matmuls.values()
        )
        macs += sum(
            layer.macs * size // layer.codes.size
            for layer, size in zip(beside, branches.values(), strict=True)
        )
        return sum(x.codes.size for x in chosen) / weights, (
            sum(x.macs for x in chosen) + products
        ) / macs

    def product_bits(self, product: AttentionMatmulData) -> int:
        """The bits of the wider operand; 32 where one stays in float."""
        return max(
            32 if quantizer is None else self.quantizers[quantizer].bits
            for quantizer in product.sites
        )

    @property
    def branches(self) -> dict[str, tuple[HalfArray, HalfArray]]:
        """The factors of each branch of low rank, ``down`` [rank, I, kh, kw] or [rank, I] and
        ``up`` [O, rank], by the name of the layer that is their sum with ``<name>.residual``.
        """
        return {
            name: (
                np.asarray(self.floats[f"{name}.{DOWN}"]),
                np.asarray(self.floats[f"{name}.{UP}"]),
            )
            for name in self.architecture.low_rank
        }

    @property
    def float_sites(self) -> dict[str, str]:
        """By name, why each quantizer that computes in float, with what reads it, does so."""
        return {
            name: self._why_float(quantizer)
            for name, quantizer in self.quantizers.items()
            if isinstance(quantizer, PerChannelQuantizerData)
        }

    def _why_float(self, quantizer: PerChannelQuantizerData) -> str:
        if quantizer.scale.shape[1] > 1 and all(
            (table == table[:, :1]).all() for table in (quantizer.scale, quantizer.zero_point)
        ):
            return "codes that int8 does not hold"
        readers = [self.layers[name] for name in quantizer.layers if name in self.layers]
        if readers:
            summed = quantizer.scale.shape[1] == _input_channels(
                readers[0]
            )  # else they lie along the tokens
        else:
            summed = any(
                quantizer.axis == axis
                for x in self.matmuls.values()
                for name, axis in zip(x.sites, (3, 2), strict=True)
                if name == quantizer.name
            )
        if summed:
            return "a scale for each channel lies on the axis that is summed over"
        return "a scale for each channel or token, where an integer product has one for the tensor"

    def quantizer_of(self, layer: str) -> QuantizerData:
        """The quantizer that ``layer`` reads."""
        return next(
            quantizer for quantizer in self.quantizers.values() if layer in quantizer.layers
        )


def pack_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack codes in [-8, 7] two to a byte, in C order, the first in the low nibble (the ONNX
    layout); uint8 [ceil(n/2)].
    """
    flat = np.zeros(codes.size + codes.size % 2, np.uint8)
    flat[: codes.size] = codes.reshape(-1).view(np.uint8) & 0xF
    packed: NDArray[np.uint8] = flat[0::2] | np.left_shift(flat[1::2], np.uint8(4))
    return packed


def pack_4bit(codes: NDArray[np.int8] | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """:func:`pack_int4` for codes of either sign: uint8 codes in [0, 15] are packed as ONNX packs
    UINT4.
    """
    return pack_int4(codes.view(np.int8))


def unpack_uint4(packed: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Undo :func:`pack_4bit` for unsigned codes."""
    return unpack_int4(packed, shape).view(np.uint8) & np.uint8(0xF)


def unpack_int4(packed: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Undo :func:`pack_int4`."""
    nibbles = np.empty(packed.size * 2, np.int8)
    nibbles[0::2] = (packed << 4).view(np.int8) >> 4
    nibbles[1::2] = packed.view(np.int8) >> 4
    return nibbles[: int(np.prod(shape))].reshape(shape)


@validated("layer")
@dataclass(frozen=True)
class _LayerEntry:
    """A layer in the header; its tensors stand under ``layer.<name>``."""

    name: str
    weight_bits: WeightBits
    shape: tuple[Positive, ...]
    bias: bool
    conv: ConvGeometry | None
    macs: Positive
    asymmetric: bool

    def __post_init__(self) -> None:
        if len(self.shape) != (2 if self.conv is None else 4):
            kind = "a Linear" if self.conv is None else "a Conv2d"
            raise ValueError(f"expected the weight's shape of {kind}, found {list(self.shape)}")


@validated("site")
@dataclass(frozen=True)
class _QuantizerEntry:
    """A quantizer in the header: with a symmetry, or with the range of codes where it computes in
    float; its tensors stand under ``site.<name>``.
    """

    name: str
    bits: int
    axis: Positive
    layers: tuple[str, ...]
    symmetry: Symmetry | None = None
    code_range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.symmetry is None) == (self.code_range is None):
            raise ValueError("expected either a symmetry or a code range")
        if self.code_range is None and self.bits not in (4, 8):
            raise ValueError(f"expected codes of 4 or 8 bits, found {self.bits}")
        if self.code_range is not None and self.code_range[0] >= self.code_range[1]:
            raise ValueError(f"expected a code range from low to high, found {self.code_range}")


@validated("checkpoint")
@dataclass(frozen=True)
class _Header:
    """What a checkpoint says besides its tensors."""

    model: str
    architecture: Architecture
    scheme: Annotated[Scheme, PlainValidator(Scheme.from_json)]
    layers: Annotated[tuple[_LayerEntry, ...], MinLen(1)]
    sites: tuple[_QuantizerEntry, ...]
    products: tuple[AttentionMatmulData, ...]
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.provenance.get("method"), str):
            raise ValueError(f"expected a provenance with its method, found {self.provenance}")
        for product in self.products:
            attention, _, kind = product.name.rpartition(".")
            expected = tuple(f"{attention}.{operand}" for operand in OPERANDS.get(kind, ()))
            if not expected or any(
                quantizer not in (None, x)
                for quantizer, x in zip(product.sites, expected, strict=True)
            ):
                raise ValueError(
                    f"product {product.name}: expected the operands {expected}, found "
                    f"{product.sites}"
                )
        read = sorted(
            (reader, quantizer.name) for quantizer in self.sites for reader in quantizer.layers
        )
        of_products = [
            (p.name, quantizer) for p in self.products for quantizer in p.sites if quantizer
        ]
        of_layers = [pair for pair in read if pair not in of_products]
        if [reader for reader, _ in of_layers] != sorted(layer.name for layer in self.layers):
            raise ValueError("its quantizers and its layers do not match")
        if sorted(of_layers + of_products) != read:
            raise ValueError("its quantizers and its products do not match")


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write ``checkpoint`` to ``path``, whole or not at all, a tensor at a time."""
    tensors: dict[str, Array] = {}
    layers, quantizers = [], []
    for layer in checkpoint.layers.values():
        key = f"layer.{layer.name}"
        tensors[f"{key}.codes"] = _packed(layer.codes) if layer.weight_bits == 4 else layer.codes
        tensors[f"{key}.scale"] = layer.weight_scale
        if layer.weight_zero_point is not None:
            tensors[f"{key}.zero_point"] = layer.weight_zero_point
        if layer.bias is not None:
            tensors[f"{key}.bias"] = layer.bias
        layers.append(
            _LayerEntry(
                layer.name,
                layer.weight_bits,
                layer.codes.shape,
                layer.bias is not None,
                layer.conv,
                layer.macs,
                layer.weight_zero_point is not None,
            )
        )
    for quantizer in checkpoint.quantizers.values():
        form: dict[str, Any]
        if isinstance(quantizer, ActivationQuantizerData):
            tables: tuple[str, ...] = ("scale", "low", "high", "channel")
            form = {"symmetry": quantizer.symmetry}
        else:
            tables = ("scale", "zero_point")
            form = {"code_range": (quantizer.code_low, quantizer.code_high)}
        tensors |= {f"site.{quantizer.name}.{table}": getattr(quantizer, table) for table in tables}
        quantizers.append(
            _QuantizerEntry(
                quantizer.name, quantizer.bits, quantizer.axis, quantizer.layers, **form
            )
        )
    tensors |= {f"float.{name}": value for name, value in checkpoint.floats.items()}
    content = {
        "model": checkpoint.model,
        # Without branches or an IP-Adapter it reads as it did before there were any.
        "architecture": {
            key: value
            for key, value in asdict(checkpoint.architecture).items()
            if key not in ("low_rank", "ip_adapter") or value
        },
        "scheme": checkpoint.scheme.to_json(),
        "layers": [asdict(layer) for layer in layers],
        "sites": [
            {key: value for key, value in asdict(quantizer).items() if value is not None}
            for quantizer in quantizers
        ],
        "products": [asdict(product) for product in checkpoint.matmuls.values()],
        "provenance": checkpoint.provenance,
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "content": json.dumps(content)}

    def check(name: str, values: NDArray[Any]) -> None:
        if not np.isfinite(values).all():
            raise QuestDeployError(
                f"{checkpoint.provenance['method']} ended in values of {name} that are not finite; "
                "nothing was saved"
            )

    with atomic_file(path) as temporary, temporary.open("wb") as file:
        write_tensors(file, tensors, metadata, check)


def _packed(codes: Array) -> LazyArray:
    size = math.prod(codes.shape)
    return LazyArray(((size + 1) // 2,), np.dtype(np.uint8), lambda: pack_4bit(np.asarray(codes)))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and validate a checkpoint; raise InputError for anything that :func:`save_checkpoint`
    would not have written. Codes and floats, which may be gigabytes, stay in the file.
    """
    try:
        metadata, tensors = stored_tensors(path)
        if metadata.get("format") != FORMAT:
            raise InputError(
                f"{path}: expected a {FORMAT}, found a safetensors file of another kind"
            )
        if metadata.get("version") != str(VERSION):
            raise InputError(
                f"{path}: expected checkpoint version {VERSION}, found {metadata.get('version')}"
            )
        return _assemble(parse(_Header, json.loads(metadata["content"]), str(path)), tensors)
    except FileNotFoundError as e:
        raise InputError(
            f"{path} does not exist; run `quest-deploy calibrate` or `quest-deploy finetune` first"
        ) from e
    except (SafetensorError, OSError) as e:
        raise InputError(
            f"{path}: not a readable safetensors file ({e}); it is truncated or damaged, make it "
            "again"
        ) from e
    except (KeyError, ValueError, RecursionError) as e:
        raise InputError(
            f"{path}: the checkpoint's content is damaged ({type(e).__name__}: {e}); make it again"
        ) from e
    except InputError as e:
        raise InputError(str(e) if str(path) in str(e) else f"{path}: {e}") from e


def _assemble(header: _Header, tensors: dict[str, LazyArray]) -> Checkpoint:
    """The checkpoint of ``header`` and ``tensors``; raise InputError where they do not belong
    together.
    """
    layers = {entry.name: _layer(entry, tensors) for entry in header.layers}
    products = {product.name: product for product in header.products}
    buckets = header.scheme.buckets
    quantizers = {entry.name: _quantizer(entry, tensors, layers, buckets) for entry in header.sites}
    branches = {
        key: value
        for name, rank in header.architecture.low_rank.items()
        for key, value in _branch(name, rank, layers, tensors).items()
    }
    floats: dict[str, Array] = branches | {
        key.removeprefix("float."): tensors.pop(key)
        for key in list(tensors)
        if key.startswith("float.")
    }
    _check(not tensors, f"unexpected tensors: {', '.join(sorted(tensors)[:5])}")
    for name, values in floats.items():
        _check_finite(np.asarray(values), f"float.{name}")
    # Headers of earlier versions do not tell an imported checkpoint's order of sums.
    official = header.architecture.official_sums or header.model == IMPORTED
    return Checkpoint(
        header.model,
        replace(header.architecture, official_sums=official),
        header.scheme,
        layers,
        quantizers,
        floats,
        header.provenance,
        products,
    )


def _layer(entry: _LayerEntry, tensors: dict[str, LazyArray]) -> LayerData:
    name, bits, shape, asymmetric = entry.name, entry.weight_bits, entry.shape, entry.asymmetric
    low, high = (0, activation_levels(bits)) if asymmetric else weight_range(bits)
    key, dtype = f"layer.{name}.codes", np.uint8 if asymmetric else np.int8
    if bits == 4:  # four bits hold no other codes
        codes = _unpacked(
            _stored(tensors, key, ((math.prod(shape) + 1) // 2,), np.uint8), shape, dtype
        )
    else:
        codes = _stored(tensors, key, shape, dtype)
        read = np.asarray(codes)
        _check(
            low <= read.min() and read.max() <= high,
            f"layer {name}: weight codes outside {low}..{high}",
        )
    zero_point = (
        _take(tensors, f"layer.{name}.zero_point", shape[:1], np.uint8) if asymmetric else None
    )
    _check(
        zero_point is None or zero_point.max() <= high,
        f"layer {name}: weight zero-points outside {low}..{high}",
    )
    scale = _take(tensors, f"layer.{name}.scale", shape[:1], np.float32)
    _check_positive(scale, f"layer {name}: weight scale")
    bias = _take(tensors, f"layer.{name}.bias", shape[:1], np.float32) if entry.bias else None
    if bias is not None:
        _check_finite(bias, f"layer {name}: bias")
    return LayerData(name, bits, codes, scale, bias, entry.conv, entry.macs, zero_point)


def compact(codes: NDArray[np.int8], bits: int) -> Array:
    """Codes in the memory that they take in a file."""
    return codes if bits != 4 else _unpacked(pack_4bit(codes), codes.shape, np.int8)


def _unpacked(packed: Array, shape: tuple[int, ...], dtype: type) -> LazyArray:
    unpack = unpack_uint4 if dtype is np.uint8 else unpack_int4
    return LazyArray(shape, np.dtype(dtype), lambda: unpack(np.asarray(packed), shape))


def _branch(
    name: str, rank: int, layers: dict[str, LayerData], tensors: dict[str, LazyArray]
) -> dict[str, Array]:
    residual = layers.get(f"{name}.{RESIDUAL}")
    if residual is None:
        raise InputError(f"branch {name}: the layer beside it is missing")
    outputs, *inputs = residual.codes.shape
    shapes = {f"{name}.{DOWN}": (rank, *inputs), f"{name}.{UP}": (outputs, rank)}
    return {
        key: _stored(tensors, f"float.{key}", shape, np.float16) for key, shape in shapes.items()
    }


def _quantizer(
    entry: _QuantizerEntry,
    tensors: dict[str, LazyArray],
    layers: dict[str, LayerData],
    buckets: int,
) -> QuantizerData:
    name, bits, symmetry = entry.name, entry.bits, entry.symmetry
    readers = [layers[reader] for reader in entry.layers if reader in layers]
    of_conv = any(reader.conv is not None for reader in readers)
    last = 1 if of_conv else 3
    _check(
        entry.axis <= last,
        f"quantizer {name}: expected a channel axis of 1 to {last}, found {entry.axis}",
    )
    channels = _input_channels(readers[0]) if readers else None
    if symmetry is None:
        # A linear layer's per-channel scales may lie along its tokens instead, as imported
        # attention blocks' do.
        return _per_channel_quantizer(entry, tensors, buckets, channels if of_conv else None)
    scale, low, high = (
        _take(tensors, f"site.{name}.{table}", (buckets,), np.float32)
        for table in ("scale", "low", "high")
    )
    key = f"site.{name}.channel"
    channel = _take(tensors, key, _shape_of(tensors, key, channels), np.float32)
    _check(
        channel.ndim == 1,
        f"quantizer {name}: expected a smoothing scale, found {list(channel.shape)}",
    )
    _check_positive(scale, f"quantizer {name}: scale")
    _check_positive(channel, f"quantizer {name}: smoothing scale")
    _check(
        _bounded(symmetry, bits, low, high),
        f"quantizer {name}: clip bounds are not those of {bits}-bit codes",
    )
    return ActivationQuantizerData(
        name, bits, symmetry, entry.axis, entry.layers, scale, low, high, channel
    )


def _per_channel_quantizer(
    entry: _QuantizerEntry, tensors: dict[str, LazyArray], buckets: int, channels: int | None
) -> PerChannelQuantizerData:
    name = entry.name
    shape = (buckets, *_shape_of(tensors, f"site.{name}.scale", channels, skip=1))
    scale, zero_point = (
        _take(tensors, f"site.{name}.{table}", shape, np.float32)
        for table in ("scale", "zero_point")
    )
    _check(
        len(shape) == 2,
        f"quantizer {name}: expected scales [buckets, channels], found {list(shape)}",
    )
    _check(
        bool(np.all(np.isfinite(scale)) and np.all(scale != 0)),
        f"quantizer {name}: scales must be finite and not zero",
    )
    whole = np.all(np.isfinite(zero_point)) and np.all(zero_point == np.round(zero_point))
    _check(bool(whole), f"quantizer {name}: zero-points must be finite integers")
    low, high = entry.code_range or (0, 0)
    return PerChannelQuantizerData(
        name, entry.bits, entry.axis, entry.layers, scale, zero_point, low, high
    )


def _input_channels(layer: LayerData) -> int:
    return int(layer.codes.shape[1]) * (1 if layer.conv is None else layer.conv.groups)


def _shape_of(
    tensors: dict[str, LazyArray], key: str, channels: int | None, skip: int = 0
) -> tuple[int, ...]:
    """The expected shape behind the first ``skip`` dimensions: the readers' channels, or what is
    there for an operand of a product.
    """
    return tensors[key].shape[skip:] if channels is None else (channels,)


def _bounded(symmetry: Symmetry, bits: int, low: FloatArray, high: FloatArray) -> bool:
    levels = activation_levels(bits)
    if symmetry is Symmetry.SYMMETRIC:
        return bits == 8 and bool(np.all(low == -127) and np.all(high == 127))
    if symmetry is Symmetry.UNSIGNED:
        return bool(np.all(low == 0) and np.all(high == levels))
    return bool(
        np.all(high - low == levels)
        and np.all(low <= 0)
        and np.all(high >= 0)
        and np.all(low == np.round(low))
    )


def _check(condition: bool, problem: str) -> None:
    if not condition:
        raise InputError(problem)


def _stored(
    tensors: dict[str, LazyArray], key: str, shape: tuple[int, ...], dtype: type
) -> LazyArray:
    tensor = tensors.pop(key)
    if tensor.shape != shape or tensor.dtype != dtype:
        raise InputError(
            f"{key}: expected {np.dtype(dtype)} {list(shape)}, found {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
    return tensor


def _take(
    tensors: dict[str, LazyArray], key: str, shape: tuple[int, ...], dtype: type
) -> NDArray[Any]:
    return np.asarray(_stored(tensors, key, shape, dtype))


def _check_finite(values: NDArray[Any], what: str) -> None:
    _check(bool(np.all(np.isfinite(values))), f"{what} must be finite")


def _check_positive(values: NDArray[Any], what: str) -> None:
    if values.dtype != np.float32 or not np.all(np.isfinite(values)) or not np.all(values > 0):
        raise InputError(f"{what} must be finite and positive float32")
