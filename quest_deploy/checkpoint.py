"""The checkpoint: a quantized model in one safetensors file, with its scheme inside. No torch needed.

Weights are stored as integer codes (4-bit ones packed two to a byte, low nibble first, as ONNX packs INT4), so the file is about
the size that the model has when it is deployed. Everything that the graph needs is in it; the FP model is not needed again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from quest_deploy.errors import InputError
from quest_deploy.files import atomic_file
from quest_deploy.scheme import Scheme, activation_levels, is_symmetric, weight_range

FORMAT = "quest-deploy checkpoint"
VERSION = 1

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class ConvGeometry:
    """A Conv2d's attributes, as [height, width] pairs; None in a layer means that it is a Linear."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class LayerData:
    """A quantized layer: y = s_k * layer(codes_x, weight_codes * weight_scale) + bias.

    Attributes:
        weight_codes: int8, [O, I, kh, kw] or [O, I], within ``weight_range(weight_bits)``.
        weight_scale: float32 [O].
        bias: float32 [O] or None.
        macs: multiply-adds for one sample.
    """

    name: str
    weight_bits: int
    weight_codes: NDArray[np.int8]
    weight_scale: FloatArray
    bias: FloatArray | None
    conv: ConvGeometry | None
    macs: int

    @property
    def dequantized_weight(self) -> FloatArray:
        """The weight in float32, in the layer's shape."""
        scale = self.weight_scale.reshape(-1, *([1] * (self.weight_codes.ndim - 1)))
        return self.weight_codes.astype(np.float32) * scale


@dataclass(frozen=True)
class SiteData:
    """A site's tables: scale, low and high [K], the static channel vector [C]; low and high are integers in int8's range."""

    name: str
    bits: int
    axis: int
    layers: tuple[str, ...]
    scale: FloatArray
    low: FloatArray
    high: FloatArray
    channel: FloatArray


@dataclass(frozen=True)
class Architecture:
    """The float model's class (a diffusers class name) and its configuration, enough to build it without its weights."""

    class_name: str
    config: dict[str, Any]


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
    sites: dict[str, SiteData]
    floats: dict[str, NDArray[Any]]
    provenance: dict[str, Any] = field(default_factory=dict)

    def share_at(self, bits: int) -> tuple[float, float]:
        """The shares, in [0, 1], of the layers' weights and multiply-adds that have weights of ``bits`` bits."""
        chosen = [layer for layer in self.layers.values() if layer.weight_bits == bits]
        weights = sum(layer.weight_codes.size for layer in self.layers.values())
        macs = sum(layer.macs for layer in self.layers.values())
        return sum(layer.weight_codes.size for layer in chosen) / weights, sum(layer.macs for layer in chosen) / macs

    def site_of(self, layer: str) -> SiteData:
        """The site that ``layer`` reads."""
        return next(site for site in self.sites.values() if layer in site.layers)


def pack_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack codes in [-8, 7] two to a byte, in C order, the first in the low nibble (the ONNX layout); uint8 [ceil(n/2)]."""
    flat = np.zeros(codes.size + codes.size % 2, np.uint8)
    flat[: codes.size] = codes.reshape(-1).view(np.uint8) & 0xF
    packed: NDArray[np.uint8] = flat[0::2] | np.left_shift(flat[1::2], np.uint8(4))
    return packed


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
        tensors[f"{key}.codes"] = pack_int4(codes) if layer.weight_bits == 4 else codes
        tensors[f"{key}.scale"] = layer.weight_scale
        if layer.bias is not None:
            tensors[f"{key}.bias"] = layer.bias
        layers.append({
            "name": layer.name, "weight_bits": layer.weight_bits, "shape": list(codes.shape), "bias": layer.bias is not None,
            "conv": None if layer.conv is None else asdict(layer.conv), "macs": layer.macs,
        })  # fmt: skip
    for site in checkpoint.sites.values():
        for table in ("scale", "low", "high", "channel"):
            tensors[f"site.{site.name}.{table}"] = getattr(site, table)
        sites.append({"name": site.name, "bits": site.bits, "axis": site.axis, "layers": list(site.layers)})
    tensors |= {f"float.{name}": value for name, value in checkpoint.floats.items()}
    content = {
        "model": checkpoint.model, "architecture": asdict(checkpoint.architecture), "scheme": checkpoint.scheme.to_json(),
        "layers": layers, "sites": sites, "provenance": checkpoint.provenance,
    }  # fmt: skip
    metadata = {"format": FORMAT, "version": str(VERSION), "content": json.dumps(content)}
    with atomic_file(path) as temporary:
        # Not save_file: its errors on a full disk are no OSError.
        temporary.write_bytes(save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and validate a checkpoint; raise InputError for anything that :func:`save_checkpoint` would not have written."""
    try:
        with safe_open(path, framework="numpy") as stream:
            metadata = stream.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(f"{path}: expected a {FORMAT}, found a safetensors file of another kind")
            if metadata.get("version") != str(VERSION):
                raise InputError(f"{path}: expected checkpoint version {VERSION}, found {metadata.get('version')}")
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 - not a dict
        return _parse(json.loads(metadata["content"]), tensors)
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist; run `quest-deploy calibrate` or `quest-deploy finetune` first") from e
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: not a readable safetensors file ({e}); it is truncated or damaged, make it again") from e
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: the checkpoint's content is damaged ({type(e).__name__}: {e}); make it again") from e
    except InputError as e:
        raise InputError(str(e) if str(path) in str(e) else f"{path}: {e}") from e


def _parse(content: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> Checkpoint:
    scheme = Scheme.from_json(content["scheme"])
    layers = {entry["name"]: _parse_layer(entry, tensors) for entry in content["layers"]}
    sites = {entry["name"]: _parse_site(entry, tensors, layers, scheme.buckets) for entry in content["sites"]}
    if sorted(name for site in sites.values() for name in site.layers) != sorted(layers):
        raise InputError("its sites and its layers do not match")
    floats = {key.removeprefix("float."): tensors.pop(key) for key in list(tensors) if key.startswith("float.")}
    if tensors:
        raise InputError(f"unexpected tensors: {', '.join(sorted(tensors)[:5])}")
    architecture = Architecture(content["architecture"]["class_name"], content["architecture"]["config"])
    return Checkpoint(content["model"], architecture, scheme, layers, sites, floats, content["provenance"])


def _parse_layer(entry: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> LayerData:
    name, bits, shape, conv = entry["name"], entry["weight_bits"], tuple(entry["shape"]), entry["conv"]
    _check(bits in (4, 8), f"layer {name}: expected weights of 4 or 8 bits, found {bits!r}")
    _check(
        len(shape) == (2 if conv is None else 4),
        f"layer {name}: weight of shape {list(shape)} for {'a Linear' if conv is None else 'a Conv2d'}",
    )
    _check(type(entry["macs"]) is int, f"layer {name}: its number of multiply-adds is {entry['macs']!r}")
    low, high = weight_range(bits)
    if bits == 4:
        codes = unpack_int4(_take(tensors, f"layer.{name}.codes", ((int(np.prod(shape)) + 1) // 2,), np.uint8), shape)
    else:
        codes = _take(tensors, f"layer.{name}.codes", shape, np.int8)
    if codes.min(initial=0) < low or codes.max(initial=0) > high:
        raise InputError(f"layer {name}: weight codes outside {low}..{high}")
    scale = _take(tensors, f"layer.{name}.scale", shape[:1], np.float32)
    _check_positive(scale, f"layer {name}: weight scale")
    bias = _take(tensors, f"layer.{name}.bias", shape[:1], np.float32) if entry["bias"] else None
    return LayerData(name, bits, codes, scale, bias, None if conv is None else _parse_conv(name, conv), entry["macs"])


def _parse_conv(name: str, entry: dict[str, Any]) -> ConvGeometry:
    pairs = {key: entry[key] for key in ("stride", "padding", "dilation")}
    integers = [value for pair in pairs.values() for value in pair] + [entry["groups"]]
    _check(all(len(pair) == 2 for pair in pairs.values()), f"layer {name}: expected pairs, found {pairs}")
    _check(all(type(value) is int and value >= 0 for value in integers), f"layer {name}: damaged convolution attributes {entry}")
    stride, padding, dilation = ((pair[0], pair[1]) for pair in pairs.values())
    return ConvGeometry(stride, padding, dilation, entry["groups"])


def _parse_site(entry: dict[str, Any], tensors: dict[str, NDArray[Any]], layers: dict[str, LayerData], buckets: int) -> SiteData:
    name, bits, axis = entry["name"], entry["bits"], entry["axis"]
    _check(bits in (4, 8), f"site {name}: expected codes of 4 or 8 bits, found {bits!r}")
    _check(type(axis) is int and axis > 0, f"site {name}: expected a channel axis of 1 or more, found {axis!r}")
    readers = [layers[reader] for reader in entry["layers"]]
    tables = {table: _take(tensors, f"site.{name}.{table}", (buckets,), np.float32) for table in ("scale", "low", "high")}
    channels = readers[0].weight_codes.shape[1] * (1 if readers[0].conv is None else readers[0].conv.groups)
    channel = _take(tensors, f"site.{name}.channel", (channels,), np.float32)
    _check_positive(tables["scale"], f"site {name}: scale")
    _check_positive(channel, f"site {name}: channel vector")
    low, high = tables["low"], tables["high"]
    if is_symmetric(bits):
        bounded = np.all(low == -127) and np.all(high == 127)
    else:
        levels = activation_levels(bits)
        bounded = np.all(high - low == levels) and np.all(low <= 0) and np.all(high >= 0) and np.all(low == np.round(low))
    _check(bool(bounded), f"site {name}: clip bounds are not those of {bits}-bit codes")
    return SiteData(name, bits, axis, tuple(entry["layers"]), channel=channel, **tables)


def _check(condition: bool, problem: str) -> None:
    if not condition:
        raise InputError(problem)


def _take(tensors: dict[str, NDArray[Any]], key: str, shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    tensor = tensors.pop(key)
    if tensor.shape != shape or tensor.dtype != dtype:
        raise InputError(f"{key}: expected {np.dtype(dtype)} {list(shape)}, found {tensor.dtype} {list(tensor.shape)}")
    return tensor


def _check_positive(values: NDArray[Any], what: str) -> None:
    if values.dtype != np.float32 or not np.all(np.isfinite(values)) or not np.all(values > 0):
        raise InputError(f"{what} must be finite and positive float32")
