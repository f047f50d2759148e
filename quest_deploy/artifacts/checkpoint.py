"""The checkpoint: a quantized model in one safetensors file, with its scheme inside. No torch
needed.

Weights are stored as integer codes (4-bit ones packed two to a byte, low nibble first, as ONNX
packs INT4), so the file is about the size that the model has when it is deployed. Everything that
the graph needs is in it; the FP model is not needed again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from quest_deploy.artifacts.scheme import Scheme, Symmetry, activation_levels, weight_range
from quest_deploy.errors import InputError
from quest_deploy.files import atomic_file

FORMAT = "quest-deploy checkpoint"
VERSION = 2

OPERANDS = {"scores": ("q", "k"), "mix": ("softmax", "v")}
"""By the name of a product of attention, what its operands are called, the left one first."""

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class ConvGeometry:
    """A Conv2d's attributes, as [height, width] pairs; None in a layer means that it is a
    Linear.
    """

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class LayerData:
    """A quantized layer: y = s_k * layer(codes_x, weight_codes * weight_scale) + bias.

    Attributes:
        weight_codes: [O, I, kh, kw] or [O, I]; int8 within ``weight_range(weight_bits)``, or uint8
            in [0, 2^b - 1] where the weight is asymmetric.
        weight_scale: float32 [O].
        bias: float32 [O] or None.
        macs: multiply-adds for one sample.
        weight_zero_point: uint8 [O], of an asymmetric weight (imported ones are): weight = (codes -
            zero-point) * scale.
    """

    name: str
    weight_bits: int
    weight_codes: NDArray[np.int8] | NDArray[np.uint8]
    weight_scale: FloatArray
    bias: FloatArray | None
    conv: ConvGeometry | None
    macs: int
    weight_zero_point: NDArray[np.uint8] | None = None

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
        scale = self.weight_scale.reshape(-1, *([1] * (self.weight_codes.ndim - 1)))
        return np.asarray(self.centered_codes.astype(np.float32) * scale, np.float32)


@dataclass(frozen=True)
class SiteData:
    """A site whose codes can run in integer arithmetic: c = clamp(round(x / (scale * channel)),
    low, high), x^ = scale * c.

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
class FreeSiteData:
    """A site whose scales lie on the reduction axis, or whose codes fit no integer: it and its
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


@dataclass(frozen=True)
class ProductData:
    """A product of two activations, as in attention: y = a^ @ b^, operands [B, heads, ...].

    Attributes:
        sites: the operands' sites; None for one that stays in float.
        macs: multiply-adds for one sample.
    """

    name: str
    sites: tuple[str | None, str | None]
    macs: int


class ScoreScale(StrEnum):
    """Where attention's 1/sqrt(d) is applied."""

    PRODUCT = "product"
    """To the scores q k^T, after quantization of q and k: Stable Diffusion's attention."""
    OPERANDS = "operands"
    """To q and to k, d^(-1/4) each, before they are quantized: latent diffusion's own attention."""


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
    """

    class_name: str
    config: dict[str, Any]
    split_shortcuts: dict[str, int] = field(default_factory=dict)
    attention: ScoreScale | None = None
    heads: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A quantized model.

    Attributes:
        model: the registry's name of the model.
        floats: the parameters and buffers of everything that is not quantized, by state-dict key.
        provenance: how it came to be: {"method": ..., options}.
    """

    model: str
    architecture: Architecture
    scheme: Scheme
    layers: dict[str, LayerData]
    sites: dict[str, SiteData | FreeSiteData]
    floats: dict[str, NDArray[Any]]
    provenance: dict[str, Any] = field(default_factory=dict)
    products: dict[str, ProductData] = field(default_factory=dict)

    def share_at(self, bits: int) -> tuple[float, float]:
        """The shares, in [0, 1], of the layers' weights and multiply-adds that have weights of
        ``bits`` bits.

        Attention's own products, which have no weights, count among the multiply-adds with the bits
        of their wider operand.
        """
        chosen = [layer for layer in self.layers.values() if layer.weight_bits == bits]
        weights = sum(layer.weight_codes.size for layer in self.layers.values())
        products = sum(p.macs for p in self.products.values() if self.product_bits(p) == bits)
        macs = sum(layer.macs for layer in self.layers.values()) + sum(
            product.macs for product in self.products.values()
        )
        return sum(x.weight_codes.size for x in chosen) / weights, (
            sum(x.macs for x in chosen) + products
        ) / macs

    def product_bits(self, product: ProductData) -> int:
        """The bits of the wider operand; 32 where one stays in float."""
        return max(32 if site is None else self.sites[site].bits for site in product.sites)

    @property
    def float_sites(self) -> dict[str, str]:
        """By name, why each site that computes in float, with what reads it, does so."""
        return {
            name: self._why_float(site)
            for name, site in self.sites.items()
            if isinstance(site, FreeSiteData)
        }

    def _why_float(self, site: FreeSiteData) -> str:
        if site.scale.shape[1] > 1 and all(
            (table == table[:, :1]).all() for table in (site.scale, site.zero_point)
        ):
            return "codes that int8 does not hold"
        readers = [self.layers[name] for name in site.layers if name in self.layers]
        if readers:
            summed = site.scale.shape[1] == _input_channels(
                readers[0]
            )  # else they lie along the tokens
        else:
            summed = any(
                site.axis == axis
                for x in self.products.values()
                for name, axis in zip(x.sites, (3, 2), strict=True)
                if name == site.name
            )
        if summed:
            return "a scale for each channel lies on the axis that is summed over"
        return "a scale for each channel or token, where an integer product has one for the tensor"

    def site_of(self, layer: str) -> SiteData | FreeSiteData:
        """The site that ``layer`` reads."""
        return next(site for site in self.sites.values() if layer in site.layers)


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


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write ``checkpoint`` to ``path``, whole or not at all."""
    tensors: dict[str, NDArray[Any]] = {}
    layers, sites = [], []
    for layer in checkpoint.layers.values():
        key = f"layer.{layer.name}"
        codes = layer.weight_codes
        tensors[f"{key}.codes"] = pack_4bit(codes) if layer.weight_bits == 4 else codes
        tensors[f"{key}.scale"] = layer.weight_scale
        if layer.weight_zero_point is not None:
            tensors[f"{key}.zero_point"] = layer.weight_zero_point
        if layer.bias is not None:
            tensors[f"{key}.bias"] = layer.bias
        layers.append(
            {
                "name": layer.name,
                "weight_bits": layer.weight_bits,
                "shape": list(codes.shape),
                "bias": layer.bias is not None,
                "conv": None if layer.conv is None else asdict(layer.conv),
                "macs": layer.macs,
                "asymmetric": layer.weight_zero_point is not None,
            }
        )
    for site in checkpoint.sites.values():
        entry: dict[str, Any] = {
            "name": site.name,
            "bits": site.bits,
            "axis": site.axis,
            "layers": list(site.layers),
        }
        if isinstance(site, SiteData):
            tables: tuple[str, ...] = ("scale", "low", "high", "channel")
            entry |= {"symmetry": site.symmetry.value}
        else:
            tables = ("scale", "zero_point")
            entry |= {"code_range": [site.code_low, site.code_high]}
        tensors |= {f"site.{site.name}.{table}": getattr(site, table) for table in tables}
        sites.append(entry)
    tensors |= {f"float.{name}": value for name, value in checkpoint.floats.items()}
    content = {
        "model": checkpoint.model,
        "architecture": asdict(checkpoint.architecture),
        "scheme": checkpoint.scheme.to_json(),
        "layers": layers,
        "sites": sites,
        "products": [asdict(product) for product in checkpoint.products.values()],
        "provenance": checkpoint.provenance,
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "content": json.dumps(content)}
    with atomic_file(path) as temporary:
        # Not save_file: its errors on a full disk are no OSError.
        temporary.write_bytes(
            save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata)
        )


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and validate a checkpoint; raise InputError for anything that :func:`save_checkpoint`
    would not have written.
    """
    try:
        with safe_open(path, framework="numpy") as stream:
            metadata = stream.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(
                    f"{path}: expected a {FORMAT}, found a safetensors file of another kind"
                )
            if metadata.get("version") != str(VERSION):
                raise InputError(
                    f"{path}: expected checkpoint version {VERSION}, found "
                    f"{metadata.get('version')}"
                )
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 - not a dict
        return _parse(json.loads(metadata["content"]), tensors)
    except FileNotFoundError as e:
        raise InputError(
            f"{path} does not exist; run `quest-deploy calibrate` or `quest-deploy finetune` first"
        ) from e
    except (SafetensorError, OSError) as e:
        raise InputError(
            f"{path}: not a readable safetensors file ({e}); it is truncated or damaged, make it "
            "again"
        ) from e
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as e:
        raise InputError(
            f"{path}: the checkpoint's content is damaged ({type(e).__name__}: {e}); make it again"
        ) from e
    except InputError as e:
        raise InputError(str(e) if str(path) in str(e) else f"{path}: {e}") from e


def _parse(content: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> Checkpoint:
    scheme = Scheme.from_json(content["scheme"])
    layers = {entry["name"]: _parse_layer(entry, tensors) for entry in content["layers"]}
    products = {entry["name"]: _parse_product(entry) for entry in content["products"]}
    _check(bool(layers), "it has no layers")
    sites = {
        entry["name"]: _parse_site(entry, tensors, layers, scheme.buckets)
        for entry in content["sites"]
    }
    readers = sorted((site.name, reader) for site in sites.values() for reader in site.layers)
    of_products = [
        (site, product.name)
        for product in products.values()
        for site in product.sites
        if site is not None
    ]
    of_layers = [pair for pair in readers if pair not in of_products]
    _check(
        sorted(reader for _, reader in of_layers) == sorted(layers),
        "its sites and its layers do not match",
    )
    _check(sorted(of_layers + of_products) == readers, "its sites and its products do not match")
    floats = {
        key.removeprefix("float."): tensors.pop(key)
        for key in list(tensors)
        if key.startswith("float.")
    }
    if tensors:
        raise InputError(f"unexpected tensors: {', '.join(sorted(tensors)[:5])}")
    for name, values in floats.items():
        _check_finite(values, f"float.{name}")
    architecture = _parse_architecture(content["architecture"])
    model, provenance = content["model"], content["provenance"]
    _check(isinstance(model, str), f"expected a model's name, found {model!r}")
    told = isinstance(provenance, dict) and isinstance(provenance.get("method"), str)
    _check(told, f"expected a provenance with its method, found {provenance!r}")
    return Checkpoint(model, architecture, scheme, layers, sites, floats, provenance, products)


def _parse_architecture(entry: dict[str, Any]) -> Architecture:
    splits = entry["split_shortcuts"]
    whole = isinstance(splits, dict) and all(
        type(channels) is int and channels > 0 for channels in splits.values()
    )
    _check(whole, f"damaged split shortcuts {splits}")
    attention = None if entry["attention"] is None else ScoreScale(entry["attention"])
    heads = entry.get("heads")  # files written before there was such a thing have none
    _check(heads is None or (type(heads) is int and heads > 0), f"a number of heads of {heads!r}")
    class_name, config = entry["class_name"], entry["config"]
    _check(
        isinstance(class_name, str), f"expected the name of a model's class, found {class_name!r}"
    )
    _check(
        isinstance(config, dict), f"expected a model's configuration, found {type(config).__name__}"
    )
    return Architecture(class_name, config, splits, attention, heads)


def _parse_product(entry: dict[str, Any]) -> ProductData:
    name, sites, macs = entry["name"], entry["sites"], entry["macs"]
    _check(
        len(sites) == 2 and all(site is None or isinstance(site, str) for site in sites),
        f"product {name}: operands {sites!r}",
    )
    _check(
        type(macs) is int and macs > 0, f"product {name}: its number of multiply-adds is {macs!r}"
    )
    attention, _, product = name.rpartition(".")
    expected = [f"{attention}.{operand}" for operand in OPERANDS[product]]
    fits = all(site in (None, operand) for site, operand in zip(sites, expected, strict=True))
    _check(fits, f"product {name}: expected the operands {expected}, found {sites}")
    return ProductData(name, (sites[0], sites[1]), macs)


def _parse_layer(entry: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> LayerData:
    name, bits, shape, conv = (
        entry["name"],
        entry["weight_bits"],
        tuple(entry["shape"]),
        entry["conv"],
    )
    _check(bits in (4, 8), f"layer {name}: expected weights of 4 or 8 bits, found {bits!r}")
    _check(
        len(shape) == (2 if conv is None else 4),
        f"layer {name}: weight of shape {list(shape)} for "
        f"{'a Linear' if conv is None else 'a Conv2d'}",
    )
    _check(
        all(type(size) is int and size > 0 for size in shape),
        f"layer {name}: weight of shape {list(shape)}",
    )
    _check(
        type(entry["macs"]) is int and entry["macs"] > 0,
        f"layer {name}: its number of multiply-adds is {entry['macs']!r}",
    )
    asymmetric = entry["asymmetric"]
    low, high = (0, activation_levels(bits)) if asymmetric else weight_range(bits)
    codes: NDArray[Any]
    if bits == 4:
        packed = _take(tensors, f"layer.{name}.codes", ((int(np.prod(shape)) + 1) // 2,), np.uint8)
        codes = unpack_uint4(packed, shape) if asymmetric else unpack_int4(packed, shape)
    else:
        codes = _take(tensors, f"layer.{name}.codes", shape, np.uint8 if asymmetric else np.int8)
    if codes.min(initial=0) < low or codes.max(initial=0) > high:
        raise InputError(f"layer {name}: weight codes outside {low}..{high}")
    zero_point = (
        _take(tensors, f"layer.{name}.zero_point", shape[:1], np.uint8) if asymmetric else None
    )
    _check(
        zero_point is None or zero_point.max(initial=0) <= high,
        f"layer {name}: weight zero-points outside {low}..{high}",
    )
    scale = _take(tensors, f"layer.{name}.scale", shape[:1], np.float32)
    _check_positive(scale, f"layer {name}: weight scale")
    bias = _take(tensors, f"layer.{name}.bias", shape[:1], np.float32) if entry["bias"] else None
    if bias is not None:
        _check_finite(bias, f"layer {name}: bias")
    geometry = None if conv is None else _parse_conv(name, conv)
    return LayerData(name, bits, codes, scale, bias, geometry, entry["macs"], zero_point)


def _parse_conv(name: str, entry: dict[str, Any]) -> ConvGeometry:
    pairs = {key: entry[key] for key in ("stride", "padding", "dilation")}
    integers = [value for pair in pairs.values() for value in pair] + [entry["groups"]]
    _check(
        all(len(pair) == 2 for pair in pairs.values()),
        f"layer {name}: expected pairs, found {pairs}",
    )
    _check(
        all(type(value) is int and value >= 0 for value in integers),
        f"layer {name}: damaged convolution attributes {entry}",
    )
    stride, padding, dilation = ((pair[0], pair[1]) for pair in pairs.values())
    return ConvGeometry(stride, padding, dilation, entry["groups"])


def _parse_site(
    entry: dict[str, Any],
    tensors: dict[str, NDArray[Any]],
    layers: dict[str, LayerData],
    buckets: int,
) -> SiteData | FreeSiteData:
    name, axis = entry["name"], entry["axis"]
    readers = [layers[reader] for reader in entry["layers"] if reader in layers]
    last = 1 if any(reader.conv is not None for reader in readers) else 3
    _check(
        type(axis) is int and 1 <= axis <= last,
        f"site {name}: expected a channel axis of 1 to {last}, found {axis!r}",
    )
    channels = _input_channels(readers[0]) if readers else None
    if "code_range" in entry:
        # A linear layer's free scales may lie along its tokens instead, as imported attention
        # blocks' do.
        return _parse_free_site(
            entry, tensors, buckets, channels if readers and readers[0].conv is not None else None
        )
    bits, symmetry = entry["bits"], Symmetry(entry["symmetry"])
    _check(bits in (4, 8), f"site {name}: expected codes of 4 or 8 bits, found {bits!r}")
    tables = {
        table: _take(tensors, f"site.{name}.{table}", (buckets,), np.float32)
        for table in ("scale", "low", "high")
    }
    channel = _take(
        tensors,
        f"site.{name}.channel",
        _shape_of(tensors, f"site.{name}.channel", channels),
        np.float32,
    )
    _check(
        channel.ndim == 1, f"site {name}: expected a channel vector, found {list(channel.shape)}"
    )
    _check_positive(tables["scale"], f"site {name}: scale")
    _check_positive(channel, f"site {name}: channel vector")
    _check(
        _bounded(symmetry, bits, tables["low"], tables["high"]),
        f"site {name}: clip bounds are not those of {bits}-bit codes",
    )
    return SiteData(name, bits, symmetry, axis, tuple(entry["layers"]), channel=channel, **tables)


def _parse_free_site(
    entry: dict[str, Any], tensors: dict[str, NDArray[Any]], buckets: int, channels: int | None
) -> FreeSiteData:
    name, (code_low, code_high) = entry["name"], entry["code_range"]
    shape = (buckets, *_shape_of(tensors, f"site.{name}.scale", channels, skip=1))
    scale, zero_point = (
        _take(tensors, f"site.{name}.{table}", shape, np.float32)
        for table in ("scale", "zero_point")
    )
    _check(
        len(shape) == 2, f"site {name}: expected scales [buckets, channels], found {list(shape)}"
    )
    _check(
        bool(np.all(np.isfinite(scale)) and np.all(scale != 0)),
        f"site {name}: scales must be finite and not zero",
    )
    whole = np.all(np.isfinite(zero_point)) and np.all(zero_point == np.round(zero_point))
    _check(bool(whole), f"site {name}: zero-points must be finite integers")
    _check(
        type(code_low) is int and type(code_high) is int and code_low < code_high,
        f"site {name}: code range {entry['code_range']}",
    )
    _check(type(entry["bits"]) is int, f"site {name}: bits {entry['bits']!r}")
    return FreeSiteData(
        name,
        entry["bits"],
        entry["axis"],
        tuple(entry["layers"]),
        scale,
        zero_point,
        code_low,
        code_high,
    )


def _input_channels(layer: LayerData) -> int:
    return int(layer.weight_codes.shape[1]) * (1 if layer.conv is None else layer.conv.groups)


def _shape_of(
    tensors: dict[str, NDArray[Any]], key: str, channels: int | None, skip: int = 0
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


def _take(
    tensors: dict[str, NDArray[Any]], key: str, shape: tuple[int, ...], dtype: type
) -> NDArray[Any]:
    tensor = tensors.pop(key)
    if tensor.shape != shape or tensor.dtype != dtype:
        raise InputError(
            f"{key}: expected {np.dtype(dtype)} {list(shape)}, found {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
    return tensor


def _check_finite(values: NDArray[Any], what: str) -> None:
    _check(bool(np.all(np.isfinite(values))), f"{what} must be finite")


def _check_positive(values: NDArray[Any], what: str) -> None:
    if values.dtype != np.float32 or not np.all(np.isfinite(values)) or not np.all(values > 0):
        raise InputError(f"{what} must be finite and positive float32")
