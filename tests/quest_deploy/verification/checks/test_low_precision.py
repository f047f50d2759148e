"""Engines whose activations are FP16, against the fake-quantized model at that type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.passes.to_dtype import to_dtype
from quest_deploy.artifacts.checkpoint import Checkpoint
from quest_deploy.artifacts.reference import load_reference
from quest_deploy.backends.base import build_engine
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.verification.checks import Verification, verify_engine
from quest_deploy.verification.tolerances import (
    LAYER_TOLERANCE,
    SENSITIVITY_FACTOR,
    layer_tolerance,
)
from tests.quest_deploy.support import change, places

OPTIONS = EngineOptions(threads=1)
RESNET = "up_blocks.0.resnets.0"
Verify = "Callable[..., Verification]"


@pytest.fixture(scope="module")
def verify_low_precision(
    mini_proto: onnx.ModelProto, mini_reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> Verify:
    """Change the portable graph, make it FP16, build an engine of it, and verify that against the
    unchanged model's reference.
    """

    def verify(edit: Callable[[ir.Model], Any] = lambda model: None) -> Verification:
        model = ir.from_proto(mini_proto)
        edit(model)
        folder = tmp_path_factory.mktemp("half")
        build_engine(
            get_backend("onnxruntime"), to_dtype(model, "fp16"), folder, OPTIONS, "cd" * 32
        )
        return verify_engine(get_backend("onnxruntime"), OPTIONS, folder, mini_reference)

    return verify


def test_a_faithful_fp16_engine_passes_at_what_fp16_allows(
    verify_low_precision: Verify, mini_reference: Path, mini_checkpoint: Checkpoint
) -> None:
    found = verify_low_precision()
    assert found.problems == []
    assert sum(quantizer.codes for quantizer in found.sites) > 10_000
    assert all(quantizer.unexplained == 0 for quantizer in found.sites)
    assert {layer.layer for layer in found.layers} == set(mini_checkpoint.layers)
    errors = [layer.error for layer in found.layers]
    assert max(errors) > LAYER_TOLERANCE  # it is no FP32 engine
    assert found.layer_tolerance == layer_tolerance("fp16") < 0.003
    sensitivities = [record.sensitivity("fp16") for record in load_reference(mini_reference)[0]]
    largest = max(max(found) for found in sensitivities if found is not None)
    assert found.end_to_end_tolerance == max(layer_tolerance("fp16"), SENSITIVITY_FACTOR * largest)


def test_the_timestep_path_is_held_to_fp32(verify_low_precision: Verify) -> None:
    found = {segment.segment: segment.tolerance for segment in verify_low_precision().segments}
    assert found["time_embedding.linear_1"] < 1e-3 < found[f"{RESNET}.conv2"]


def test_a_scale_wrong_by_a_hundredth_is_found_in_any_quantizer_in_fp16(
    verify_low_precision: Verify, mini_checkpoint: Checkpoint
) -> None:
    found = verify_low_precision(
        lambda m: [
            change(m, f"{quantizer}.scale", 1, factor=1.01)
            for quantizer in mini_checkpoint.quantizers
        ]
    )
    assert {x.layer for x in found.layers if x.error > x.tolerance} == set(mini_checkpoint.layers)
    assert {x.site for x in found.sites if x.unexplained} == set(mini_checkpoint.quantizers)


@pytest.mark.parametrize(
    ("bound", "by"),
    [
        ("low", -1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("low", 1), ("high", -1), ("high", 1))
        ),
    ],
)
def test_a_wrong_clip_bound_is_found_in_fp16(
    verify_low_precision: Verify, mini_checkpoint: Checkpoint, bound: str, by: int
) -> None:
    quantizers = [
        name for name, quantizer in mini_checkpoint.quantizers.items() if quantizer.bits == 4
    ]
    found = verify_low_precision(
        lambda m: [change(m, f"{quantizer}.{bound}", 1, by=by) for quantizer in quantizers]
    )
    assert {x.site for x in found.sites if x.unexplained} == set(quantizers)


def test_a_changed_weight_and_a_changed_norm_are_found_in_fp16(
    verify_low_precision: Verify,
) -> None:
    def edit(model: ir.Model) -> None:
        change(model, f"{RESNET}.conv1.bias", 0, by=0.5)
        change(model, f"model.{RESNET}.norm1.weight", 3, factor=1.02)

    found = places(verify_low_precision(edit).problems)
    assert [x for x in found if x[0] in ("layer", "segment")] == [
        ("layer", f"{RESNET}.conv1"),
        ("segment", f"{RESNET}.conv1"),
        # Its norm has an equal weight, so that the graph holds one.
        ("segment", "up_blocks.0.resnets.1.conv1"),
    ]


def test_an_fp16_output_that_is_not_a_number_fails(verify_low_precision: Verify) -> None:
    found = verify_low_precision(lambda m: change(m, "conv_out.bias", 0, by=np.nan))
    assert ("layer", "conv_out") in places(found.problems)
