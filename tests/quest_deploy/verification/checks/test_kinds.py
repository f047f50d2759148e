"""Every kind of quantized layer, product and quantizer, from checkpoint through graph and engine,
against the fake-quantized model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from torch import nn

from exporters.graph_info import graph_info
from exporters.lowering import onnxruntime as lower_onnxruntime
from exporters.lowering import tensorrt as lower_tensorrt
from exporters.passes.remove_quantization import RemoveQuantization
from exporters.torch_to_qdq import portable_graph
from quest_deploy.artifacts.checkpoint import (
    ActivationQuantizerData,
    Checkpoint,
    LayerData,
    load_checkpoint,
    save_checkpoint,
)
from quest_deploy.artifacts.scheme import Granularity, Scheme, Symmetry
from quest_deploy.backends.base import build_engine
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.calibration.ptq import CalibrationOptions, calibrate
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.verification.checks import Verification, verify_engine
from quest_deploy.verification.reference import save_reference
from tests.helpers import run
from tests.quest_deploy.support import change, initializer, places, set_initializer

OPTIONS = EngineOptions(threads=1)
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def asymmetric(checkpoint: Checkpoint) -> Checkpoint:
    """As an imported checkpoint may be: asymmetric weights, and asymmetric 8-bit activations, also
    in front of padded convolutions.
    """

    def layer(data: LayerData) -> LayerData:
        zero_point = np.full(len(data.weight_codes), 7 if data.weight_bits == 4 else 120, np.uint8)
        codes = data.weight_codes.astype(np.int16) + zero_point.reshape(
            -1, *[1] * (data.weight_codes.ndim - 1)
        )
        codes = np.clip(codes, 0, 2**data.weight_bits - 1).astype(np.uint8)
        return dataclasses.replace(data, codes=codes, weight_zero_point=zero_point)

    def quantizer(data: Any) -> Any:
        if data.symmetry is not Symmetry.SYMMETRIC:
            return data
        zero_point = np.arange(len(data.scale), dtype=np.float32) + 100
        return dataclasses.replace(
            data, symmetry=Symmetry.ASYMMETRIC, low=-zero_point, high=255 - zero_point
        )

    layers = {name: layer(data) for name, data in checkpoint.layers.items()}
    return dataclasses.replace(
        checkpoint,
        layers=layers,
        quantizers={name: quantizer(data) for name, data in checkpoint.quantizers.items()},
    )


KINDS: dict[str, tuple[Scheme, Callable[[Checkpoint], Checkpoint]]] = {
    "attention at 8 bits": (
        Scheme.parse("w4a4", buckets=3, attention_bits=8, softmax_bits=8),
        lambda c: c,
    ),
    "attention at 4 bits, split shortcuts": (
        Scheme.parse("w4a4", buckets=3, attention_bits=4, softmax_bits=8, split_shortcuts=True),
        lambda c: c,
    ),
    "softmax alone": (Scheme.parse("w4a8", buckets=3, softmax_bits=4), lambda c: c),
    "free channels": (
        Scheme.parse(
            "w4a4",
            buckets=3,
            granularity=Granularity.PER_CHANNEL,
            attention_bits=8,
            softmax_bits=8,
        ),
        lambda c: c,
    ),
    "asymmetric": (
        Scheme.parse(
            "w4a8", buckets=3, granularity=Granularity.PER_TENSOR, attention_bits=8, softmax_bits=8
        ),
        asymmetric,
    ),
}


class Case(NamedTuple):
    """A checkpoint, its portable graph, and its reference."""

    kind: str
    checkpoint: Checkpoint
    proto: onnx.ModelProto
    reference: Path


@pytest.fixture(scope="module")
def cases(
    mini_unet: nn.Module, mini_trajectories: Trajectories, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def case(kind: str) -> Case:
        if kind not in made:
            scheme, edit = KINDS[kind]
            checkpoint = edit(
                calibrate("mini", mini_unet, mini_trajectories, scheme, CalibrationOptions())
            )
            folder = tmp_path_factory.mktemp("kind")
            save_checkpoint(checkpoint, folder / "checkpoint.safetensors")
            checkpoint = load_checkpoint(folder / "checkpoint.safetensors")
            save_reference(
                QuantizedModel.from_checkpoint(checkpoint).eval(), mini_trajectories, folder
            )
            proto = ir.to_proto(
                portable_graph(checkpoint, next(mini_trajectories.batches(2)), "ab" * 32)
            )
            made[kind] = Case(kind, checkpoint, proto, folder)
        return made[kind]

    return case


def verified(
    case: Case, backend: str, folder: Path, edit: Callable[[ir.Model], Any] = lambda model: None
) -> Verification:
    model = ir.from_proto(case.proto)
    edit(model)
    build_engine(get_backend(backend), model, folder, OPTIONS, "cd" * 32)
    return verify_engine(get_backend(backend), OPTIONS, folder, case.reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "backend", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)]
)
def test_an_engine_of_every_kind_computes_what_the_fake_quantized_model_does(
    cases: Callable[[str], Case], kind: str, backend: str, tmp_path: Path
) -> None:
    case = cases(kind)
    onnx.checker.check_model(case.proto, full_check=True)
    found = verified(case, backend, tmp_path)
    assert found.problems == []
    assert {layer.layer for layer in found.layers} == {
        *case.checkpoint.layers,
        *case.checkpoint.matmuls,
    }
    assert {quantizer.site for quantizer in found.sites} == set(case.checkpoint.quantizers)
    assert all(quantizer.codes for quantizer in found.sites)
    assert {segment.segment for segment in found.segments} >= {
        s for s in case.checkpoint.quantizers if "transformer_blocks" in s
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention at 8 bits", "softmax alone", "asymmetric"])
def test_an_engine_is_verified_on_samples_of_another_size_than_it_was_calibrated_on(
    cases: Callable[[str], Case], mini_trajectories: Trajectories, kind: str, tmp_path: Path
) -> None:
    case, folder = cases(kind), tmp_path / "reference"
    save_reference(
        QuantizedModel.from_checkpoint(case.checkpoint).eval(),
        mini_trajectories,
        folder,
        sample_size=(2, 4),
    )
    (tmp_path / "engine").mkdir()
    found = verified(case._replace(reference=folder), "openvino", tmp_path / "engine")
    assert found.problems == []
    assert all(quantizer.codes for quantizer in found.sites)


@pytest.mark.parametrize("kind", ["attention at 8 bits", "softmax alone", "free channels"])
def test_another_softmax_is_placed_before_its_own_quantizer(
    cases: Callable[[str], Case], kind: str, tmp_path: Path
) -> None:
    def sigmoid(model: ir.Model) -> None:
        for node in (node for node in model.graph if node.op_type == "Softmax"):
            node.op_type = "Sigmoid"
            node.attributes.clear()

    found = places(verified(cases(kind), "onnxruntime", tmp_path, sigmoid).problems)
    assert [x for x in found if x[0] != "bucket"] == [
        ("segment", f"{ATTENTION.replace('attn1', a)}.softmax") for a in ("attn1", "attn2")
    ]


def wrong(found: Verification, name: str) -> bool:
    return any(
        name in problem and problem.startswith(("quantizer", "layer")) for problem in found.problems
    )


def swap_tables(model: ir.Model, one: str, other: str) -> None:
    """Give each of two quantizers the other's scales and bounds."""
    for table in ("scale", "low", "high", "offset"):
        first, second = (initializer(model, f"{quantizer}.{table}") for quantizer in (one, other))
        set_initializer(model, f"{one}.{table}", second)
        set_initializer(model, f"{other}.{table}", first)


CHANGES: dict[str, tuple[str, Callable[[ir.Model], Any], str]] = {
    "a softmax scale by 0.1%": (
        "attention at 8 bits",
        lambda m: change(m, f"{ATTENTION}.softmax.scale", 1, factor=1.001),
        f"{ATTENTION}.mix",
    ),
    "a softmax offset by one": (
        "attention at 8 bits",
        lambda m: change(m, f"{ATTENTION}.softmax.offset", 1, by=1),
        f"{ATTENTION}.softmax",
    ),
    "a scale of k by 0.1%": (
        "attention at 8 bits",
        lambda m: change(m, f"{ATTENTION}.k.scale", 2, factor=1.001),
        ATTENTION,
    ),
    "q and k with each other's table": (
        "attention at 8 bits",
        lambda m: swap_tables(m, f"{ATTENTION}.q", f"{ATTENTION}.k"),
        f"{ATTENTION}.q",
    ),
    "softmax and v with each other's table": (
        "attention at 8 bits",
        lambda m: swap_tables(m, f"{ATTENTION}.softmax", f"{ATTENTION}.v"),
        f"{ATTENTION}.mix",
    ),
    "a per-channel scale by 0.1%": (
        "free channels",
        lambda m: change(m, "conv_in.scale", 3, factor=1.001),
        "conv_in",
    ),
    "a free zero-point by one": (
        "free channels",
        lambda m: change(m, f"{ATTENTION}.to_q.zero_point", 3, by=1),
        f"{ATTENTION}.to_q",
    ),
    "a weight's zero-point sum": (
        "asymmetric",
        lambda m: change(m, "conv_in.weight_sums", 0, factor=1.001),
        "conv_in",
    ),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_single_change_of_such_a_graph_fails(
    cases: Callable[[str], Case], changed: str, tmp_path: Path
) -> None:
    kind, edit, name = CHANGES[changed]
    found = verified(cases(kind), "onnxruntime", tmp_path, edit)
    assert wrong(found, name), found.problems


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensorrt_graph_has_zero_points_of_zero_alone_and_computes_the_same(
    cases: Callable[[str], Case], kind: str, mini_trajectories: Trajectories
) -> None:
    case = cases(kind)
    for_tensorrt = lower_tensorrt.lower(ir.from_proto(case.proto))
    for name, value in for_tensorrt.graph.initializers.items():
        assert value.dtype not in (ir.DataType.UINT4, ir.DataType.UINT8, ir.DataType.INT4), name
    for node in for_tensorrt.graph:
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            zero = node.inputs[2]
            assert zero is not None
            assert zero.const_value is not None
            assert not zero.const_value.numpy().any(), node.name
    feeds = {name: value.numpy() for name, value in next(mini_trajectories.batches(2)).items()}
    expected = run(lower_onnxruntime.lower(ir.from_proto(case.proto)), feeds)[0]
    np.testing.assert_allclose(
        run(for_tensorrt, feeds)[0], expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_float_graph_of_every_kind_has_neither_codes_nor_tables(
    cases: Callable[[str], Case], kind: str, mini_trajectories: Trajectories
) -> None:
    model = ir.from_proto(cases(kind).proto)
    RemoveQuantization()(model)
    left = {node.op_type for node in model.graph} & {
        "TimestepQuantize",
        "DequantizeLinear",
        "QuantizeLinear",
        "Round",
        "Clip",
        "Pad",
    }
    assert not left
    output = run(
        model, {name: value.numpy() for name, value in next(mini_trajectories.batches(2)).items()}
    )[0]
    assert np.isfinite(output).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_bucket_computes_what_all_buckets_do_for_its_timesteps(
    cases: Callable[[str], Case], kind: str, mini_trajectories: Trajectories
) -> None:
    feeds = {
        name: value.numpy() for name, value in next(mini_trajectories.batches(2)).items()
    }  # t = 990: the last of three buckets
    expected = run(lower_onnxruntime.lower(ir.from_proto(cases(kind).proto)), feeds)[0]
    frozen = run(lower_onnxruntime.lower(ir.from_proto(cases(kind).proto), frozen_bucket=2), feeds)[
        0
    ]
    np.testing.assert_allclose(frozen, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_graph_says_which_quantizers_compute_in_float(cases: Callable[[str], Case]) -> None:
    info = graph_info(ir.from_proto(cases("free channels").proto))
    quantizers = cases("free channels").checkpoint.quantizers
    assert {name for name, quantizer in info.quantizers.items() if not quantizer.integer} == {
        n for n, s in quantizers.items() if not isinstance(s, ActivationQuantizerData)
    }
    assert {name for name, quantizer in info.quantizers.items() if quantizer.integer} == {
        f"{product.rpartition('.')[0]}.{operand}"
        for product in info.matmuls
        for operand in (("q", "k") if product.endswith("scores") else ("softmax", "v"))
    }
