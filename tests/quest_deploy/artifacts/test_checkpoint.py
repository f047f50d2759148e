from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from quest_deploy.artifacts.checkpoint import (
    ActivationQuantizerData,
    Checkpoint,
    PerChannelQuantizerData,
    load_checkpoint,
    pack_4bit,
    pack_int4,
    save_checkpoint,
    unpack_int4,
    unpack_uint4,
)
from quest_deploy.artifacts.lazy_tensors import LazyArray
from tests.helpers import Array, assert_holds, branched_checkpoint, kinds_checkpoint, refused

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def codes_of(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).integers(-8, 8, shape, dtype=np.int8)


@given(shape=shapes, seed=st.integers(0, 2**32 - 1))
def test_int4_codes_survive_packing(shape: tuple[int, ...], seed: int) -> None:
    codes = codes_of(shape, seed)
    packed = pack_int4(codes)
    assert packed.size == (codes.size + 1) // 2
    np.testing.assert_array_equal(unpack_int4(packed, shape), codes)


@given(shape=shapes, seed=st.integers(0, 2**32 - 1))
def test_int4_codes_are_packed_as_onnx_packs_them(shape: tuple[int, ...], seed: int) -> None:
    codes = codes_of(shape, seed)
    proto = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, shape, codes.flatten().tolist())
    theirs = (
        np.asarray(proto.int32_data, np.uint8)
        if proto.int32_data
        else np.frombuffer(proto.raw_data, np.uint8)
    )
    np.testing.assert_array_equal(pack_int4(codes), theirs)
    np.testing.assert_array_equal(
        onnx.numpy_helper.to_array(proto).astype(np.int8), unpack_int4(theirs, shape)
    )


@given(shape=shapes, seed=st.integers(0, 2**32 - 1))
def test_unsigned_4_bit_codes_are_packed_as_onnx_packs_uint4_and_survive(
    shape: tuple[int, ...], seed: int
) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, shape, dtype=np.uint8)
    proto = onnx.helper.make_tensor("w", onnx.TensorProto.UINT4, shape, codes.flatten().tolist())
    theirs = (
        np.asarray(proto.int32_data, np.uint8)
        if proto.int32_data
        else np.frombuffer(proto.raw_data, np.uint8)
    )
    np.testing.assert_array_equal(pack_4bit(codes), theirs)
    np.testing.assert_array_equal(unpack_uint4(theirs, shape), codes)


def test_packing_follows_the_logical_order_of_a_transposed_array() -> None:
    codes = codes_of((3, 5), 0)
    np.testing.assert_array_equal(pack_int4(codes.T), pack_int4(np.ascontiguousarray(codes.T)))


def assert_equal(a: Any, b: Any) -> None:
    """Equal in type, and arrays in dtype and every bit, wherever they lie, through all dataclasses
    and dictionaries.
    """
    a, b = (np.asarray(x) if isinstance(x, LazyArray) else x for x in (a, b))
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_equal(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert a == b


def test_a_checkpoint_survives_saving_and_loading_exactly(hand: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(hand, tmp_path / "a.safetensors")
    assert_equal(load_checkpoint(tmp_path / "a.safetensors"), hand)


def test_a_calibrated_checkpoint_survives_saving_and_loading_exactly(
    small_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    save_checkpoint(small_checkpoint, tmp_path / "a.safetensors")
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    config = json.loads(json.dumps(small_checkpoint.architecture.config))
    architecture = dataclasses.replace(small_checkpoint.architecture, config=config)
    floats = {key: small_checkpoint.floats[key] for key in loaded.floats}
    assert loaded.floats.keys() == small_checkpoint.floats.keys()
    assert_equal(
        loaded, dataclasses.replace(small_checkpoint, architecture=architecture, floats=floats)
    )


@pytest.mark.parametrize("buckets", [1, 2])
def test_products_per_channel_quantizers_asymmetric_weights_and_the_rewrites_survive_saving_and_loading_exactly(
    buckets: int, tmp_path: Path
) -> None:
    checkpoint = kinds_checkpoint(buckets)
    save_checkpoint(checkpoint, tmp_path / "a.safetensors")
    assert_equal(load_checkpoint(tmp_path / "a.safetensors"), checkpoint)


def test_a_checkpoint_without_branches_or_an_ip_adapter_is_written_as_before_there_were_any(
    hand: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(hand, path)
    with safe_open(path, "numpy") as file:
        found = json.loads(file.metadata()["content"])["architecture"]
    before = ["class_name", "config", "split_shortcuts", "attention", "heads", "official_sums"]
    assert list(found) == before


@pytest.mark.parametrize(("model", "expected"), [("imported", True), ("kinds", False)])
def test_an_imported_checkpoint_of_an_earlier_version_sums_in_the_official_order(
    model: str, expected: bool, tmp_path: Path
) -> None:
    checkpoint = dataclasses.replace(kinds_checkpoint(), model=model)
    path = save_edited(checkpoint, tmp_path, lambda c, t, m: c["architecture"].pop("official_sums"))
    assert load_checkpoint(path).architecture.official_sums is expected


def test_codes_fit_int8_with_their_offset_which_is_zero_wherever_they_fit_without() -> None:
    quantizers = [
        quantizer
        for quantizer in kinds_checkpoint(3).quantizers.values()
        if isinstance(quantizer, ActivationQuantizerData)
    ]
    assert {quantizer.bits for quantizer in quantizers if quantizer.offset.any()} == {8}
    for quantizer in quantizers:
        assert (quantizer.low + quantizer.offset >= -128).all()
        assert (quantizer.high + quantizer.offset <= 127).all()
        fits = (quantizer.low >= -128).all() and (quantizer.high <= 127).all()
        assert fits == (not quantizer.offset.any())


def test_a_centered_code_is_the_code_less_its_output_channels_zero_point() -> None:
    for layer in kinds_checkpoint().layers.values():
        for o in range(len(layer.weight_scale)):
            zero_point = 0 if layer.weight_zero_point is None else int(layer.weight_zero_point[o])
            expected = layer.weight_codes[o].astype(int) - zero_point
            np.testing.assert_array_equal(layer.centered_codes[o], expected)
            np.testing.assert_array_equal(
                layer.dequantized_weight[o], expected.astype(np.float32) * layer.weight_scale[o]
            )


def test_a_per_channel_quantizer_says_which_of_its_scales_keeps_it_in_float() -> None:
    checkpoint = kinds_checkpoint()
    constant = np.ones((2, 4), np.float32)
    wide = PerChannelQuantizerData(
        "wide", 16, 3, ("attn.mix",), constant, 0 * constant, 0, 2**16 - 1
    )
    operand = PerChannelQuantizerData(
        "attn.q",
        4,
        3,
        ("attn.scores",),
        np.arange(1, 9, dtype=np.float32).reshape(2, 4),
        0 * constant,
        0,
        15,
    )
    quantizers = {**checkpoint.quantizers, "wide": wide, "attn.q": operand}
    facts = {
        "free_conv": "axis",
        "by_channel": "axis",
        "by_token": "token",
        "attn.q": "axis",
        "wide": "int8",
    }
    reasons = dataclasses.replace(checkpoint, quantizers=quantizers).float_sites
    assert reasons.keys() == facts.keys()
    for name, fact in facts.items():
        assert_holds(reasons[name], fact)
    other = {**quantizers, "attn.q": dataclasses.replace(operand, axis=2)}
    assert_holds(dataclasses.replace(checkpoint, quantizers=other).float_sites["attn.q"], "token")


def test_products_count_among_the_multiply_adds_with_their_wider_operands_bits() -> None:
    checkpoint = kinds_checkpoint()
    assert [checkpoint.product_bits(product) for product in checkpoint.matmuls.values()] == [
        4,
        8,
        32,
    ]
    total = 5 * 10 + 3 * 36
    assert checkpoint.share_at(4)[1] == pytest.approx((3 * 10 + 36) / total)
    assert checkpoint.share_at(8)[1] == pytest.approx((2 * 10 + 36) / total)


def test_reading_a_checkpoint_needs_no_torch(hand: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(hand, tmp_path / "a.safetensors")
    code = (
        "import sys; from pathlib import Path; from quest_deploy.artifacts.checkpoint import "
        "load_checkpoint;"
        f"load_checkpoint(Path({str(tmp_path / 'a.safetensors')!r})); sys.exit('torch' in "
        "sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shares_count_weights_and_multiply_adds_of_the_chosen_bits(hand: Checkpoint) -> None:
    sizes = {name: layer.weight_codes.size for name, layer in hand.layers.items()}
    weights, macs = hand.share_at(4)
    assert weights == pytest.approx((sizes["conv"] + sizes["to_q"]) / sum(sizes.values()))
    assert macs == pytest.approx(0.5)
    assert sum(hand.share_at(4)) + sum(hand.share_at(8)) == pytest.approx(2)


def test_a_dequantized_weight_is_code_times_its_output_channels_scale(hand: Checkpoint) -> None:
    for layer in hand.layers.values():
        for o in range(len(layer.weight_scale)):
            np.testing.assert_array_equal(
                layer.dequantized_weight[o], layer.weight_codes[o] * layer.weight_scale[o]
            )


def test_the_quantizer_of_a_layer_is_the_one_that_lists_it(hand: Checkpoint) -> None:
    assert {name: hand.quantizer_of(name).name for name in hand.layers} == {
        "conv": "conv",
        "last": "last",
        "to_q": "to_q",
        "to_k": "to_q",
    }


Edit = "Callable[[dict[str, Any], dict[str, Array], dict[str, str]], Any]"


@pytest.fixture
def edited(hand: Checkpoint, tmp_path: Path) -> Callable[[Edit], Path]:
    """Save ``hand``, let a function change its content, tensors and metadata, and write it
    again.
    """
    return lambda edit: save_edited(hand, tmp_path, edit)


def save_edited(checkpoint: Checkpoint, folder: Path, edit: Edit) -> Path:
    path = folder / "edited.safetensors"
    save_checkpoint(checkpoint, path)
    with safe_open(path, framework="numpy") as stream:
        metadata = dict(stream.metadata())
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    content = json.loads(metadata["content"])
    edit(content, tensors, metadata)
    if "content" in metadata:
        metadata["content"] = json.dumps(content)
    save_file(tensors, path, metadata or None)
    return path


def put(container: Any, *keys_and_value: Any) -> None:
    """container[k1][k2]... = value"""
    *keys, last, value = keys_and_value
    for key in keys:
        container = container[key]
    container[last] = value


EDITS: dict[str, Callable[[dict[str, Any], dict[str, Array], dict[str, str]], Any]] = {
    "another format": lambda c, t, m: put(m, "format", "pt"),
    "no metadata": lambda c, t, m: m.clear(),
    "another version": lambda c, t, m: put(m, "version", "1"),
    "no content": lambda c, t, m: m.pop("content"),
    "another scheme version": lambda c, t, m: put(c, "scheme", "version", 9),
    "unknown scheme key": lambda c, t, m: put(c, "scheme", "rotation", 1),
    "no scheme": lambda c, t, m: c.pop("scheme"),
    "fewer buckets": lambda c, t, m: put(c, "scheme", "bucket_edges", []),
    "no layers": lambda c, t, m: c.pop("layers"),
    "layers that are text": lambda c, t, m: put(c, "layers", "conv"),
    "a layer gone": lambda c, t, m: c["layers"].pop(),
    "a quantizer gone": lambda c, t, m: c["sites"].pop(),
    "a layer in two sites": lambda c, t, m: c["sites"][0]["layers"].append("last"),
    "a quantizer that names a stranger": lambda c, t, m: put(c, "sites", 0, "layers", ["nobody"]),
    "another shape": lambda c, t, m: put(c, "layers", 0, "shape", [4, 1, 3, 4]),
    "a shape that is text": lambda c, t, m: put(c, "layers", 0, "shape", "4133"),
    "other weight bits": lambda c, t, m: put(c, "layers", 0, "weight_bits", 8),
    "unsupported weight bits": lambda c, t, m: put(c, "layers", 1, "weight_bits", 5),
    "unsupported quantizer bits": lambda c, t, m: (
        put(c, "sites", 0, "bits", 7),
        put(t, "site.conv.high", t["site.conv.low"] + 127),
    ),
    "a broken geometry": lambda c, t, m: put(c, "layers", 0, "conv", {"stride": 1}),
    "a stride of three": lambda c, t, m: put(c, "layers", 0, "conv", "stride", [1, 1, 1]),
    "a convolution that says it is linear": lambda c, t, m: put(c, "layers", 0, "conv", None),
    "a quantizer along the batch": lambda c, t, m: put(c, "sites", 0, "axis", 0),
    "an axis that is text": lambda c, t, m: put(c, "sites", 0, "axis", "1"),
    "multiply-adds that are text": lambda c, t, m: put(c, "layers", 0, "macs", "many"),
    "no architecture": lambda c, t, m: c.pop("architecture"),
    "no provenance": lambda c, t, m: c.pop("provenance"),
    "a bias gone": lambda c, t, m: t.pop("layer.conv.bias"),
    "an unexpected tensor": lambda c, t, m: put(t, "layer.conv.extra", np.zeros(1, np.float32)),
    "codes gone": lambda c, t, m: t.pop("layer.conv.codes"),
    "8-bit codes at -128": lambda c, t, m: put(t, "layer.last.codes", 0, -128),
    "codes as floats": lambda c, t, m: put(
        t, "layer.last.codes", t["layer.last.codes"].astype(np.float32)
    ),
    "a scale of zero": lambda c, t, m: put(t, "layer.conv.scale", 0, 0),
    "a scale that is no number": lambda c, t, m: put(t, "site.conv.scale", 0, np.nan),
    "a scale in double precision": lambda c, t, m: put(
        t, "site.conv.scale", t["site.conv.scale"].astype(np.float64)
    ),
    "an infinite scale": lambda c, t, m: put(t, "site.conv.scale", 0, np.inf),
    "a negative channel": lambda c, t, m: put(t, "site.conv.channel", 0, -1),
    "a smoothing scale of another length": lambda c, t, m: put(
        t, "site.conv.channel", np.ones(3, np.float32)
    ),
    "a smoothing scale of rank two": lambda c, t, m: put(
        t, "site.conv.channel", np.ones((1, 2), np.float32)
    ),
    "bounds of another width": lambda c, t, m: put(t, "site.conv.high", 0, 99),
    "bounds between integers": lambda c, t, m: (
        put(t, "site.conv.low", 0, -3.5),
        put(t, "site.conv.high", 0, 11.5),
    ),
    "bounds above zero": lambda c, t, m: (
        put(t, "site.conv.low", 0, 1),
        put(t, "site.conv.high", 0, 16),
    ),
    "shifted 8-bit bounds": lambda c, t, m: (
        put(t, "site.last.low", 0, -254),
        put(t, "site.last.high", 0, 0),
    ),
    "bounds that are no number": lambda c, t, m: put(t, "site.conv.low", 0, np.nan),
    "a bias that is no number": lambda c, t, m: put(t, "layer.conv.bias", 0, np.nan),
    "an infinite float parameter": lambda c, t, m: put(t, "float.norm.weight", 0, np.inf),
    "a provenance without its method": lambda c, t, m: put(c, "provenance", {}),
    "a provenance in a list": lambda c, t, m: put(c, "provenance", [1]),
    "a method that is a number": lambda c, t, m: put(c, "provenance", "method", 5),
    "a model in a list": lambda c, t, m: put(c, "model", ["hand"]),
    "a class that is a number": lambda c, t, m: put(c, "architecture", "class_name", 5),
    "a configuration that is text": lambda c, t, m: put(c, "architecture", "config", "small"),
    "an architecture in a list": lambda c, t, m: put(c, "architecture", []),
    "not one layer": lambda c, t, m: (
        c.update(layers=[], sites=[]),
        [t.pop(key) for key in list(t) if not key.startswith("float.")],
    ),
    "a layer without weights": lambda c, t, m: (
        put(c, "layers", 0, "shape", [0, 1, 3, 3]),
        [
            put(t, f"layer.conv.{table}", t[f"layer.conv.{table}"][:0].copy())
            for table in ("codes", "scale", "bias")
        ],
    ),
    "no multiply-adds": lambda c, t, m: put(c, "layers", 0, "macs", 0),
    "multiply-adds below zero": lambda c, t, m: put(c, "layers", 0, "macs", -5),
    "a convolution's quantizer along the height": lambda c, t, m: put(c, "sites", 0, "axis", 2),
    "a linear's quantizer along a fifth axis": lambda c, t, m: put(c, "sites", 2, "axis", 4),
    "an edge beyond all floats": lambda c, t, m: put(c, "scheme", "bucket_edges", [10**400]),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_checkpoint_that_we_would_not_have_written_is_an_input_error_with_its_path(
    edited: Any, edit: Any
) -> None:
    path = edited(edit)
    with refused("edited.safetensors"):
        load_checkpoint(path)


KIND_EDITS: dict[str, Callable[[dict[str, Any], dict[str, Array], dict[str, str]], Any]] = {
    "no products": lambda c, t, m: c.pop("products"),
    "a product gone": lambda c, t, m: c["products"].pop(),
    "a product with one operand": lambda c, t, m: put(c, "products", 0, "sites", ["attn.q"]),
    "a product of three": lambda c, t, m: c["products"][0]["sites"].append(None),
    "a product that reads one quantizer twice": lambda c, t, m: put(
        c, "products", 0, "sites", ["attn.q", "attn.q"]
    ),
    "a product that reads a stranger": lambda c, t, m: put(
        c, "products", 0, "sites", ["attn.q", "nobody"]
    ),
    "a product that reads a layer's site": lambda c, t, m: put(
        c, "products", 0, "sites", ["attn.q", "plain"]
    ),
    "a product that reads another's site": lambda c, t, m: put(
        c, "products", 0, "sites", ["attn.q", "attn.v"]
    ),
    "a product whose operand is a number": lambda c, t, m: put(
        c, "products", 2, "sites", [3, "half.v"]
    ),
    "a product that no quantizer names": lambda c, t, m: put(c, "sites", 5, "layers", []),
    "a product's multiply-adds that are text": lambda c, t, m: put(c, "products", 0, "macs", "36"),
    "a product's multiply-adds below zero": lambda c, t, m: put(c, "products", 0, "macs", -36),
    "a product whose operands are swapped": lambda c, t, m: put(
        c, "products", 0, "sites", ["attn.k", "attn.q"]
    ),
    "a product of an unknown kind": lambda c, t, m: (
        put(c, "products", 2, "name", "half.other"),
        put(c, "sites", 9, "layers", ["half.other"]),
    ),
    "an operand's quantizer along a fifth axis": lambda c, t, m: put(c, "sites", 5, "axis", 4),
    "zero-points gone": lambda c, t, m: t.pop("layer.padded.zero_point"),
    "zero-points of a symmetric weight": lambda c, t, m: put(
        t, "layer.by_channel.zero_point", np.zeros(6, np.uint8)
    ),
    "zero-points beyond 4 bits": lambda c, t, m: put(t, "layer.padded.zero_point", 0, 16),
    "signed zero-points": lambda c, t, m: put(
        t, "layer.plain.zero_point", t["layer.plain.zero_point"].astype(np.int8)
    ),
    "a zero-point too few": lambda c, t, m: put(
        t, "layer.plain.zero_point", t["layer.plain.zero_point"][1:].copy()
    ),
    "an asymmetric weight said to be symmetric": lambda c, t, m: put(
        c, "layers", 2, "asymmetric", False
    ),
    "a layer silent about its symmetry": lambda c, t, m: c["layers"][2].pop("asymmetric"),
    "signed 8-bit codes of an asymmetric weight": lambda c, t, m: put(
        t, "layer.plain.codes", t["layer.plain.codes"].astype(np.int8)
    ),
    "a per-channel scale of zero": lambda c, t, m: put(t, "site.by_channel.scale", (0, 0), 0),
    "a per-channel scale that is no number": lambda c, t, m: put(
        t, "site.by_channel.scale", (0, 0), np.nan
    ),
    "a free zero-point between integers": lambda c, t, m: put(
        t, "site.by_channel.zero_point", (0, 0), 0.5
    ),
    "an infinite free zero-point": lambda c, t, m: put(
        t, "site.by_channel.zero_point", (0, 0), np.inf
    ),
    "free scales of fewer buckets": lambda c, t, m: put(
        t, "site.by_channel.scale", t["site.by_channel.scale"][:1].copy()
    ),
    "free scales of fewer channels": lambda c, t, m: put(
        t, "site.free_conv.scale", t["site.free_conv.scale"][:, :3].copy()
    ),
    "free scales of rank one": lambda c, t, m: put(
        t, "site.by_channel.scale", t["site.by_channel.scale"][:, 0].copy()
    ),
    "free zero-points of another shape": lambda c, t, m: put(
        t, "site.by_channel.zero_point", np.zeros((2, 4), np.float32)
    ),
    "an empty code range": lambda c, t, m: put(c, "sites", 1, "code_range", [15, 15]),
    "a code range of three": lambda c, t, m: put(c, "sites", 1, "code_range", [0, 7, 15]),
    "a code range of text": lambda c, t, m: put(c, "sites", 1, "code_range", ["0", "15"]),
    "free bits that are text": lambda c, t, m: put(c, "sites", 1, "bits", "4"),
    "a per-channel quantizer said to be an integer one": lambda c, t, m: (
        c["sites"][1].pop("code_range"),
        put(c, "sites", 1, "symmetry", "symmetric"),
    ),
    "an unknown key": lambda c, t, m: put(c, "rotation", 1),
    "an unknown key of a site": lambda c, t, m: put(c, "sites", 1, "rotation", 1),
    "a quantizer of both forms": lambda c, t, m: put(c, "sites", 1, "symmetry", "symmetric"),
    "an unknown symmetry": lambda c, t, m: put(c, "sites", 7, "symmetry", "skewed"),
    "unsigned codes below zero": lambda c, t, m: (
        put(t, "site.attn.softmax.low", 0, -1),
        put(t, "site.attn.softmax.high", 0, 254),
    ),
    "asymmetric 8-bit bounds too wide": lambda c, t, m: put(
        t, "site.plain.high", 0, t["site.plain.high"][0] + 1
    ),
    "an unknown place of the score scale": lambda c, t, m: put(
        c, "architecture", "attention", "somewhere"
    ),
    "no word about attention": lambda c, t, m: c["architecture"].pop("attention"),
    "no word about split shortcuts": lambda c, t, m: c["architecture"].pop("split_shortcuts"),
    "split shortcuts in a list": lambda c, t, m: put(
        c, "architecture", "split_shortcuts", ["up.conv_shortcut"]
    ),
    "a shortcut split at zero": lambda c, t, m: put(
        c, "architecture", "split_shortcuts", {"up.conv_shortcut": 0}
    ),
    "a shortcut split at half a channel": lambda c, t, m: put(
        c, "architecture", "split_shortcuts", {"up.conv_shortcut": 2.5}
    ),
}


@pytest.mark.parametrize("edit", KIND_EDITS.values(), ids=KIND_EDITS.keys())
def test_damage_to_products_per_channel_quantizers_asymmetric_weights_or_rewrites_is_an_input_error_with_the_path(
    edit: Any, tmp_path: Path
) -> None:
    path = save_edited(kinds_checkpoint(), tmp_path, edit)
    with refused("edited.safetensors"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["[" * 200_000, '"text"', "[]", "{"], ids=lambda text: text[:6])
def test_content_that_is_no_json_object_is_an_input_error_with_the_path(
    hand: Checkpoint, tmp_path: Path, text: str
) -> None:
    path = save_edited(hand, tmp_path, lambda c, t, m: None)
    with safe_open(path, framework="numpy") as stream:
        metadata = {**stream.metadata(), "content": text}
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata)
    with refused("edited.safetensors"):
        load_checkpoint(path)


def test_the_editing_fixture_itself_leaves_a_valid_checkpoint(
    edited: Any, hand: Checkpoint
) -> None:
    assert_equal(load_checkpoint(edited(lambda c, t, m: None)).layers, hand.layers)


def test_a_truncated_file_is_an_input_error_with_its_path_at_every_length(
    hand: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "cut.safetensors"
    save_checkpoint(hand, path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with refused("cut.safetensors"):
            load_checkpoint(path)


def test_a_missing_file_and_a_folder_in_its_place_are_input_errors_with_the_path(
    tmp_path: Path,
) -> None:
    with refused(tmp_path / "none.safetensors", "quest-deploy finetune"):
        load_checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with refused(tmp_path / "folder.safetensors"):
        load_checkpoint(tmp_path / "folder.safetensors")


def test_a_failed_save_leaves_the_old_checkpoint(hand: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(hand, path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_checkpoint(dataclasses.replace(hand, provenance={"bad": object()}), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_branches_are_saved_in_fp16_and_a_checkpoint_without_has_no_trace_of_them(
    tmp_path: Path, hand: Checkpoint
) -> None:
    checkpoint, path = branched_checkpoint(), tmp_path / "checkpoint.safetensors"
    save_checkpoint(checkpoint, path)
    found = load_checkpoint(path)
    assert found.architecture == checkpoint.architecture
    assert found.scheme == checkpoint.scheme
    for name, factors in checkpoint.branches.items():
        for ours, theirs in zip(found.branches[name], factors, strict=True):
            assert ours.dtype == np.float16
            np.testing.assert_array_equal(ours, theirs)
    save_checkpoint(hand, path)
    assert b"low_rank" not in path.read_bytes()


@pytest.mark.parametrize(
    "edit",
    [
        lambda c, t, m: t.pop("float.last.up"),
        lambda c, t, m: put(t, "float.last.up", t["float.last.up"].astype(np.float32)),
        lambda c, t, m: put(t, "float.to_q.down", t["float.to_q.down"][:, :4].copy()),
        lambda c, t, m: put(t, "float.to_q.down", t["float.to_q.down"] * np.float16(np.inf)),
        lambda c, t, m: put(c, "architecture", "low_rank", "to_q", 2),
        lambda c, t, m: put(c, "architecture", "low_rank", "to_q", 0),
        lambda c, t, m: put(c, "architecture", "low_rank", "to_k", 3),
    ],
    ids=["gone", "wide", "narrow", "infinite", "another rank", "rank 0", "without its layer"],
)
def test_branches_that_do_not_fit_their_layers_are_refused(
    tmp_path: Path, edit: Callable[..., Any]
) -> None:
    path = save_edited(branched_checkpoint(), tmp_path, edit)
    with refused(path):
        load_checkpoint(path)


def test_branches_count_with_16_bits_among_weights_and_multiply_adds() -> None:
    checkpoint = branched_checkpoint()
    weights = sum(layer.weight_codes.size for layer in checkpoint.layers.values())
    factors = {"last": 2 * 36 + 3 * 2, "to_q": 3 * 5 + 7 * 3}
    four, macs = checkpoint.share_at(4)
    assert four == pytest.approx((36 + 35) / (weights + sum(factors.values())))
    beside = 10 * factors["last"] // 108 + 10 * factors["to_q"] // 35
    assert macs == pytest.approx(20 / (40 + beside))
