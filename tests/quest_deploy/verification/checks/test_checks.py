from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from exporters.graph_info import QUANTIZERS_KEY
from exporters.torch_to_qdq import portable_graph
from quest_deploy.artifacts.checkpoint import Checkpoint
from quest_deploy.artifacts.reference import TABLES, ReferenceIndex, load_reference
from quest_deploy.backends.base import ENGINE_FILE, Runner, SplitRunner, build_engine
from quest_deploy.backends.onnxruntime import OnnxRuntimeBackend
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.cli import descriptions
from quest_deploy.errors import InputError
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.verification import reference
from quest_deploy.verification.checks import Verification, verify_engine
from quest_deploy.verification.reference import save_reference
from quest_deploy.verification.tolerances import LAYER_TOLERANCE, relative_error
from tests.helpers import assert_holds, refused
from tests.quest_deploy.support import change, initializer, places, set_initializer, strict_json

BACKENDS = ("onnxruntime", "openvino")
SLOW_ON_OPENVINO = ("onnxruntime", pytest.param("openvino", marks=pytest.mark.slow))
"""It compiles a graph several times as slowly."""
OPTIONS = EngineOptions(threads=1)
FIRST = "down_blocks.0.resnets.0"
RESNET, ATTENTION = "up_blocks.0.resnets.0", "down_blocks.0.attentions.0.transformer_blocks.0"
Verify = "Callable[[str, Callable[[ir.Model], Any]], Verification]"


@pytest.fixture(scope="module")
def verify_changed(
    mini_proto: onnx.ModelProto, mini_reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> Verify:
    """Change the portable graph, build an engine of it, and verify that against the unchanged
    model's reference.
    """

    def verify(backend: str, edit: Callable[[ir.Model], Any]) -> Verification:
        model = ir.from_proto(mini_proto)
        edit(model)
        folder = tmp_path_factory.mktemp("changed")
        build_engine(get_backend(backend), model, folder, OPTIONS, "cd" * 32)
        return verify_engine(get_backend(backend), OPTIONS, folder, mini_reference)

    return verify


@pytest.fixture(scope="module")
def faithful(
    mini_engines: Callable[[str], Path], mini_reference: Path
) -> Callable[[str], Verification]:
    return lambda backend: verify_engine(
        get_backend(backend), OPTIONS, mini_engines(backend), mini_reference
    )


@pytest.fixture
def copied(mini_reference: Path, tmp_path: Path) -> Path:
    """The reference, to be changed."""
    return shutil.copytree(mini_reference, tmp_path / "reference")


@pytest.fixture(scope="module")
def verify_against(mini_engines: Callable[[str], Path]) -> Callable[[Path], Verification]:
    """Verify the engine of onnxruntime against a reference."""
    return lambda reference: verify_engine(
        get_backend("onnxruntime"), OPTIONS, mini_engines("onnxruntime"), reference
    )


class SmallBatches(OnnxRuntimeBackend):
    """onnxruntime as if its engines took three rows at most, as TensorRT's take those of their
    profile.
    """

    def open(self, folder: Path, options: EngineOptions) -> Runner:
        inner = super().open(folder, options)

        class Limited(Runner):
            def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                assert max(len(value) for value in feeds.values()) <= 3
                return inner.infer(feeds)

        return SplitRunner(Limited(), 3)


def test_an_engine_with_a_largest_batch_is_verified_with_all_timesteps_and_records(
    mini_engines: Callable[[str], Path],
    mini_reference: Path,
    faithful: Callable[[str], Verification],
) -> None:
    found = verify_engine(SmallBatches(), OPTIONS, mini_engines("onnxruntime"), mini_reference)
    assert found.passed
    assert sum(quantizer.codes for quantizer in found.sites) == sum(
        quantizer.codes for quantizer in faithful("onnxruntime").sites
    )


class TakesOtherSizes(OnnxRuntimeBackend):
    """Opens engines that refuse every input, as TensorRT's do where they are built for others."""

    def open(self, folder: Path, options: EngineOptions) -> Runner:
        assert (folder / ENGINE_FILE).exists(), "a cut was opened before the engine itself"

        class Refusing(Runner):
            def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
                raise InputError("built for other inputs")

        return Refusing()


def test_an_engine_that_does_not_take_the_references_sizes_is_refused_before_any_cut_is_compiled(
    mini_engines: Callable[[str], Path], mini_reference: Path
) -> None:
    with refused("built for other inputs"):
        verify_engine(TakesOtherSizes(), OPTIONS, mini_engines("onnxruntime"), mini_reference)


def swap_buckets(model: ir.Model, quantizer: str, one: int, other: int) -> None:
    for table in ("scale", "low", "high"):
        values = initializer(model, f"{quantizer}.{table}")
        values[[one, other]] = values[[other, one]]
        set_initializer(model, f"{quantizer}.{table}", values)


def next_code(model: ir.Model, layer: str) -> None:
    """Change one weight code of a layer by one, within its range."""
    weight = initializer(model, f"{layer}.weight")
    middle = 128 if weight.dtype == np.uint8 else 0
    change(model, f"{layer}.weight", 0, by=-1 if weight.reshape(-1)[0] > middle else 1)


def next_edge_float(model: ir.Model) -> None:
    edges = initializer(model, "bucket_edges")
    edges[0] = np.nextafter(edges[0], np.float32(0))
    set_initializer(model, "bucket_edges", edges)


def wrong_layer(name: str) -> Callable[[Verification], bool]:
    return lambda verification: any(
        problem.startswith(f"layer {name}:") for problem in verification.problems
    )


def wrong_quantizer(name: str) -> Callable[[Verification], bool]:
    return lambda verification: any(
        problem.startswith(f"quantizer {name}:") for problem in verification.problems
    )


CHANGES: dict[str, tuple[Callable[[ir.Model], Any], Callable[[Verification], bool]]] = {
    "one scale by 0.1%": (
        lambda m: change(m, f"{RESNET}.conv1.scale", 1, factor=1.001),
        wrong_layer(f"{RESNET}.conv1"),
    ),
    "one 4-bit weight code": (
        lambda m: next_code(m, f"{RESNET}.conv2"),
        wrong_layer(f"{RESNET}.conv2"),
    ),
    "one 4-bit weight code of a linear layer": (
        lambda m: next_code(m, f"{ATTENTION}.ff.net.2"),
        wrong_layer(f"{ATTENTION}.ff.net.2"),
    ),
    "one 8-bit weight code": (lambda m: next_code(m, "conv_in"), wrong_layer("conv_in")),
    "one weight scale by 0.1%": (
        lambda m: change(m, "conv_out.weight_scale", 1, factor=1.001),
        wrong_layer("conv_out"),
    ),
    "one bias": (
        lambda m: change(m, f"{ATTENTION}.attn1.to_out.0.bias", 2, by=0.01),
        wrong_layer(f"{ATTENTION}.attn1.to_out.0"),
    ),
    "one bucket edge by a step": (
        lambda m: change(m, "bucket_edges", 1, by=1),
        lambda v: 667 in v.wrong_buckets,
    ),
    "one bucket edge by one float": (
        next_edge_float,
        lambda v: any(333.33 < t < 333.34 for t in v.wrong_buckets),
    ),
    "one lower clip bound by one": (
        lambda m: change(m, f"{ATTENTION}.ff.net.0.proj.low", 2, by=-1),
        wrong_quantizer(f"{ATTENTION}.ff.net.0.proj"),
    ),
    "one upper clip bound by one": (
        lambda m: change(m, f"{ATTENTION}.attn1.to_q.high", 0, by=-1),
        wrong_quantizer(f"{ATTENTION}.attn1.to_q"),
    ),
    "one channel-vector entry by 1%": (
        lambda m: change(m, f"{FIRST}.conv1.channel", 4, factor=1.01),
        wrong_quantizer(f"{FIRST}.conv1"),
    ),
    "two buckets swapped in one site": (
        lambda m: swap_buckets(m, f"{FIRST}.conv2", 0, 2),
        wrong_quantizer(f"{FIRST}.conv2"),
    ),
}
"""Each in a layer of its own, so that its mark can be told apart where one engine carries all of
them.
"""
ALONE = ("one scale by 0.1%", "one bucket edge by one float")
"""Changes that the quick tests make without the others too."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_faithful_engine_passes(faithful: Callable[[str], Verification], backend: str) -> None:
    verification = faithful(backend)
    assert verification.problems == []
    assert verification.passed
    assert [b.bucket for b in verification.buckets] == [0, 1, 2]
    assert (len(verification.layers), len(verification.sites)) == (27, 22)
    assert sum(quantizer.codes for quantizer in verification.sites) > 10_000
    assert all(quantizer.unexplained == 0 for quantizer in verification.sites)
    assert max(layer.error for layer in verification.layers) < LAYER_TOLERANCE
    assert {segment.segment for segment in verification.segments} == {
        quantizer.site for quantizer in verification.sites
    } | {"output"}
    assert max(segment.tolerance for segment in verification.segments) < 0.01


@pytest.mark.parametrize(
    "changed",
    [
        changed if changed in ALONE else pytest.param(changed, marks=pytest.mark.slow)
        for changed in CHANGES
    ],
)
def test_a_single_change_of_the_graph_fails_on_onnxruntime(
    verify_changed: Verify, changed: str
) -> None:
    edit, found = CHANGES[changed]
    verification = verify_changed("onnxruntime", edit)
    assert not verification.passed
    assert found(verification), verification.problems


def node_of(model: ir.Model, output: str) -> ir.Node:
    return next(node for node in model.graph if node.outputs[0].name == output)


def nodes_of(model: ir.Model, *op_types: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type in op_types]


def sigmoid_for_softmax(model: ir.Model) -> None:
    for node in nodes_of(model, "Softmax"):
        node.op_type = "Sigmoid"
        node.attributes.clear()


def unscaled_scores(model: ir.Model) -> None:
    """Drop the 1/sqrt(d), which is multiplied into q and into k."""
    for node in nodes_of(model, "Softmax"):
        scores = node.inputs[0]
        assert scores is not None
        for operand in scores.producer().inputs:
            operand.replace_all_uses_with(operand.producer().inputs[0])


def swapped_sin_and_cos(model: ir.Model) -> None:
    for node in nodes_of(model, "Sin", "Cos"):
        node.op_type = {"Sin": "Cos", "Cos": "Sin"}[node.op_type]


def one_operand_twice(model: ir.Model) -> None:
    """Add a residual block's result to itself."""
    (node,) = (
        n
        for n in nodes_of(model, "Add")
        if n.inputs[1] is not None and n.inputs[1].name == f"{FIRST}.conv2.output"
    )
    node.replace_input_with(0, node.inputs[1])


def swapped_halves(model: ir.Model, output: str) -> None:
    node = node_of(model, output)
    first, second = node.inputs
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)


BETWEEN: dict[str, tuple[Callable[[ir.Model], Any], str]] = {
    "a sigmoid for the softmax": (sigmoid_for_softmax, f"{ATTENTION}.attn1.to_out.0"),
    "no 1/sqrt(d)": (unscaled_scores, f"{ATTENTION}.attn1.to_out.0"),
    "a norm's epsilon of 1": (
        lambda m: node_of(m, f"{ATTENTION}.attn1.to_q.input").attributes.add(
            ir.AttrFloat32("epsilon", 1.0)
        ),
        f"{ATTENTION}.attn1.to_q",
    ),
    "one weight of a norm by 0.1%": (
        lambda m: change(m, f"model.{RESNET}.norm1.weight", 3, factor=1.001),
        f"{RESNET}.conv1",
    ),
    "sine and cosine swapped": (swapped_sin_and_cos, "time_embedding.linear_1"),
    "a residual sum of one operand twice": (
        one_operand_twice,
        "down_blocks.0.attentions.0.proj_in",
    ),
    "a skip connection's halves swapped": (
        lambda m: swapped_halves(m, "up_blocks.0.resnets.1.conv_shortcut.input"),
        "up_blocks.0.resnets.1.conv1",
    ),
    "the tanh approximation of a GELU": (
        lambda m: nodes_of(m, "Gelu")[0].attributes.add(ir.AttrString("approximate", "tanh")),
        f"{ATTENTION}.ff.net.2",
    ),
}
"""Changes of the float part between layers, and the quantizer before which each is first seen."""


@pytest.mark.parametrize(
    "value", [f"{ATTENTION}.attn1.to_q.input", f"{ATTENTION}.attn1.to_out.0.output"]
)
def test_a_quantizer_that_reads_another_tensor_fails_even_if_the_graph_says_so(
    verify_changed: Verify, value: str
) -> None:
    quantizer = f"{ATTENTION}.attn2.to_q"

    def rewire(model: ir.Model) -> None:
        wrong = next(
            x
            for node in model.graph
            for x in (*node.inputs, *node.outputs)
            if x is not None and x.name == value
        )
        node_of(model, f"{quantizer}.codes").replace_input_with(0, wrong)
        quantizers = json.loads(model.metadata_props[QUANTIZERS_KEY])
        for entry in (entry for entry in quantizers if entry["name"] == quantizer):
            entry["input"] = value
        model.metadata_props[QUANTIZERS_KEY] = json.dumps(quantizers)

    verification = verify_changed("onnxruntime", rewire)
    between = [x for x in places(verification.problems) if x[0] == "segment"]
    assert between == [("segment", quantizer)]


@pytest.mark.parametrize("backend", SLOW_ON_OPENVINO)
@pytest.mark.parametrize("changed", BETWEEN)
def test_a_change_between_layers_fails_and_is_placed(
    verify_changed: Verify, changed: str, backend: str
) -> None:
    edit, place = BETWEEN[changed]
    verification = verify_changed(backend, edit)
    found = places(verification.problems)
    assert not [x for x in found if x[0] in ("quantizer", "layer")]
    assert [x for x in found if x[0] == "segment"][:1] == [("segment", place)]


def test_a_segment_that_is_not_a_number_fails(verify_changed: Verify) -> None:
    verification = verify_changed(
        "onnxruntime", lambda m: change(m, f"model.{RESNET}.norm1.weight", 3, by=np.nan)
    )
    assert ("segment", f"{RESNET}.conv1") in places(verification.problems)


@pytest.fixture(scope="module")
def sampled(
    mini_checkpoints: Callable[[int], Checkpoint],
    mini_trajectories: Trajectories,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A reference of the six-bucket model whose three records hold a part of the quantizers each,
    and the widest layer's in none.
    """

    folder = tmp_path_factory.mktemp("sampled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "MEGABYTE", 1000)
        model = QuantizedModel.from_checkpoint(mini_checkpoints(6)).eval()
        reference.save_reference(model, mini_trajectories, folder, megabytes=17, measured=1)
    return folder


@pytest.fixture(scope="module")
def verify_sampled(
    mini_checkpoints: Callable[[int], Checkpoint],
    mini_trajectories: Trajectories,
    sampled: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Verification]:
    """As ``verify_changed``, on onnxruntime and against the reference of a sample."""

    proto = ir.to_proto(
        portable_graph(mini_checkpoints(6), next(mini_trajectories.batches(2)), "ab" * 32)
    )

    def verify(edit: Callable[[ir.Model], Any] = lambda model: None) -> Verification:
        model = ir.from_proto(proto)
        edit(model)
        folder = tmp_path_factory.mktemp("changed")
        build_engine(get_backend("onnxruntime"), model, folder, OPTIONS, "cd" * 32)
        return verify_engine(get_backend("onnxruntime"), OPTIONS, folder, sampled)

    return verify


def in_records(sampled: Path) -> dict[str, set[int]]:
    """The buckets in which each quantizer of the sample is recorded."""
    buckets: dict[str, set[int]] = {}
    for record in load_reference(sampled)[0]:
        for quantizer in record.entry.sites:
            buckets.setdefault(quantizer, set()).update(record.entry.buckets)
    return buckets


def test_what_a_sample_holds_is_checked_and_no_more_is_claimed(
    verify_sampled: Callable[..., Verification], sampled: Path, mini_checkpoint: Checkpoint
) -> None:
    found, held = verify_sampled(), in_records(sampled)
    assert found.problems == []
    assert 0 < len(held) < len(mini_checkpoint.quantizers)
    assert {quantizer.site for quantizer in found.sites} == set(held)
    assert {layer.layer for layer in found.layers} == {
        layer for quantizer in held for layer in mini_checkpoint.quantizers[quantizer].layers
    }
    assert {segment.segment for segment in found.segments} == {*held, "output"}
    coverage = found.coverage
    assert (coverage.sites, coverage.all_sites, coverage.all_layers, coverage.all_buckets) == (
        len(held),
        22,
        27,
        6,
    )
    assert coverage.layers == len(found.layers)
    assert (coverage.fewest_buckets, coverage.most_buckets) == (2, 6)
    assert set(coverage.unchecked) == set(mini_checkpoint.quantizers) - set(held)
    assert_holds(
        descriptions.verification(found.to_json()),
        f"{len(held)} of 22",
        f"{len(found.layers)} of 27",
        "2 to 6 of 6",
        coverage.unchecked[0],
    )
    assert sum(b.codes for b in found.buckets) == sum(s.codes for s in found.sites)


def test_a_scale_changed_by_a_thousandth_is_found_in_exactly_the_buckets_in_which_a_sample_holds_its_quantizer(
    verify_sampled: Callable[..., Verification], sampled: Path, mini_checkpoint: Checkpoint
) -> None:
    held = in_records(sampled)
    found = verify_sampled(
        lambda m: [change(m, f"{quantizer}.scale", 4, factor=1.001) for quantizer in held]
    )
    wrong = {x.layer: x.bucket for x in found.layers if not x.error <= LAYER_TOLERANCE}
    assert set(wrong) == {
        layer
        for quantizer, buckets in held.items()
        if 4 in buckets
        for layer in mini_checkpoint.quantizers[quantizer].layers
    }
    assert set(wrong.values()) == {4}


def test_a_sampled_quantizer_that_reads_a_layer_of_which_the_reference_has_nothing_fails_and_is_told(
    verify_sampled: Callable[..., Verification], sampled: Path, mini_checkpoint: Checkpoint
) -> None:
    record, order = load_reference(sampled)[0][-1], list(mini_checkpoint.layers)
    quantizer = max(record.entry.sites, key=order.index)
    layer = next(
        name for name in order[: order.index(quantizer)] if f"layer.{name}.y" not in record.tensors
    )

    def add(model: ir.Model) -> None:
        """Add the mean of the layer's output to what the quantizer reads."""
        codes = node_of(model, f"{quantizer}.codes")
        mean = ir.node(
            "ReduceMean", [node_of(model, f"{layer}.output").outputs[0]], {"keepdims": 0}
        )
        total = ir.node("Add", [codes.inputs[0], mean.outputs[0]])
        read = codes.inputs[0]
        assert read is not None
        total.outputs[0].name, total.outputs[0].type, total.outputs[0].shape = (
            "changed",
            read.type,
            read.shape,
        )
        model.graph.insert_before(codes, [mean, total])
        codes.replace_input_with(0, total.outputs[0])
        quantizers = json.loads(model.metadata_props[QUANTIZERS_KEY])
        for entry in (entry for entry in quantizers if entry["name"] == quantizer):
            entry["input"] = "changed"
        model.metadata_props[QUANTIZERS_KEY] = json.dumps(quantizers)

    (problem,) = [x for x in verify_sampled(add).problems if x.startswith("segment")]
    assert places([problem]) == [("segment", quantizer)]
    assert_holds(problem, f"{layer}.output")


@pytest.mark.parametrize("backend", SLOW_ON_OPENVINO)
def test_real_activations_on_ties_are_no_problem_for_segments(
    mini_quantized: QuantizedModel,
    mini_trajectories: Trajectories,
    mini_engines: Callable[[str], Path],
    tmp_path: Path,
    backend: str,
) -> None:

    quantizer = mini_quantized.activation_quantizers()["conv_in"]
    step = quantizer.step(mini_trajectories.sample[0], mini_quantized.edges.new_zeros(4).long())
    on_ties = dataclasses.replace(
        mini_trajectories, sample=((mini_trajectories.sample / step).floor() + 0.5) * step
    )
    save_reference(mini_quantized, on_ties, tmp_path)
    tensors = load_file(sorted(tmp_path.glob("buckets-*"))[0])
    assert relative_error(tensors["untied_output"], tensors["output"]).max() > 0.01
    verification = verify_engine(get_backend(backend), OPTIONS, mini_engines(backend), tmp_path)
    assert not [
        problem
        for problem in verification.problems
        if problem.startswith(("segment", "site", "layer"))
    ]


def test_a_tolerance_that_says_nothing_is_called_so(
    verify_against: Callable[[Path], Verification],
    faithful: Callable[[str], Verification],
    copied: Path,
) -> None:
    verification = faithful("onnxruntime")
    assert verification.end_to_end_informative is (verification.end_to_end_tolerance <= 0.05)
    for sensitivity, informative in ((0.024, True), (0.026, False)):
        index = ReferenceIndex.read(copied)
        records = tuple(
            dataclasses.replace(record, sensitivity=(sensitivity,) * 2) for record in index.records
        )
        dataclasses.replace(index, records=records).write(copied)
        found = verify_against(copied)
        assert found.end_to_end_informative is informative
        said = descriptions.verification(found.to_json())
        assert ("informative" in said) is not informative


def test_a_segment_that_rounding_alone_changes_much_is_called_uninformative(
    verify_against: Callable[[Path], Verification], copied: Path
) -> None:
    for path in copied.glob("buckets-*"):
        tensors = load_file(path)
        tensors["rounding.conv_out"] = np.full(2, 0.02, np.float32)
        save_file(tensors, path)
    found = verify_against(copied)
    assert found.passed
    assert {x.segment: x.tolerance for x in found.segments if not x.informative} == {
        "conv_out": pytest.approx(0.08)
    }
    assert_holds(descriptions.verification(found.to_json()), "before conv_out")


@pytest.fixture(scope="module")
def all_changes_on_openvino(verify_changed: Verify) -> Verification:
    """One engine with all the changes: openvino compiles it slowly, and each layer is judged alone
    anyway.
    """
    return verify_changed("openvino", lambda model: [edit(model) for edit, _ in CHANGES.values()])


@pytest.mark.parametrize("changed", CHANGES)
def test_each_change_of_the_graph_is_found_on_openvino(
    all_changes_on_openvino: Verification, changed: str
) -> None:
    assert CHANGES[changed][1](all_changes_on_openvino), all_changes_on_openvino.problems


@pytest.mark.parametrize("backend", SLOW_ON_OPENVINO)
def test_an_output_that_is_not_a_number_fails_and_its_report_is_valid_json(
    verify_changed: Verify, backend: str
) -> None:
    verification = verify_changed(
        backend, lambda model: change(model, "conv_out.bias", 0, by=np.nan)
    )
    assert ("layer", "conv_out") in places(verification.problems)
    assert any("end-to-end" in problem for problem in verification.problems)
    assert strict_json(json.dumps(verification.to_json()))["passed"] is False


def test_a_scale_changed_by_a_thousandth_is_found_in_any_quantizer(
    verify_changed: Verify, mini_checkpoint: Checkpoint
) -> None:
    quantizers = mini_checkpoint.quantizers
    verification = verify_changed(
        "onnxruntime",
        lambda m: [change(m, f"{quantizer}.scale", 1, factor=1.001) for quantizer in quantizers],
    )
    assert {x.layer for x in verification.layers if not x.error <= LAYER_TOLERANCE} == set(
        mini_checkpoint.layers
    )


def test_a_smoothing_scale_entry_changed_by_a_hundredth_is_found_in_any_quantizer(
    verify_changed: Verify, mini_checkpoint: Checkpoint
) -> None:
    quantizers = list(mini_checkpoint.quantizers)
    verification = verify_changed(
        "onnxruntime",
        lambda m: [change(m, f"{quantizer}.channel", 0, factor=1.01) for quantizer in quantizers],
    )
    assert [
        quantizer for quantizer in quantizers if not wrong_quantizer(quantizer)(verification)
    ] == []


def test_a_changed_weight_code_is_found_in_any_layer(
    verify_changed: Verify, mini_checkpoint: Checkpoint
) -> None:
    verification = verify_changed(
        "onnxruntime", lambda m: [next_code(m, layer) for layer in mini_checkpoint.layers]
    )
    assert {x.layer for x in verification.layers if not x.error <= LAYER_TOLERANCE} == set(
        mini_checkpoint.layers
    )


@pytest.mark.parametrize(("bound", "by"), [("low", -1), ("low", 1), ("high", -1), ("high", 1)])
def test_a_changed_clip_bound_is_found_in_any_quantizer(
    verify_changed: Verify, mini_checkpoint: Checkpoint, bound: str, by: int
) -> None:
    # 127 + 1 is no int8 code: the 8-bit bounds are narrowed only.
    quantizers = [
        name
        for name, quantizer in mini_checkpoint.quantizers.items()
        if quantizer.bits == 4 or (bound, by) in (("low", 1), ("high", -1))
    ]
    verification = verify_changed(
        "onnxruntime",
        lambda m: [change(m, f"{quantizer}.{bound}", 1, by=by) for quantizer in quantizers],
    )
    assert [
        quantizer for quantizer in quantizers if not wrong_quantizer(quantizer)(verification)
    ] == []


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("record", [0, 1])
def test_an_end_to_end_difference_in_any_sample_of_any_record_fails(
    verify_against: Callable[[Path], Verification], copied: Path, record: int, sample: int
) -> None:
    path = sorted(copied.glob("buckets-*"))[record]
    tensors = load_file(path)
    tensors["output"][sample] += 1
    save_file(tensors, path)
    verification = verify_against(copied)
    bucket = int(tensors["bucket"][sample])
    assert places(verification.problems) == [("bucket", str(bucket))]


def test_the_counts_per_bucket_cover_every_compared_code(
    faithful: Callable[[str], Verification],
) -> None:
    verification = faithful("onnxruntime")
    assert sum(b.codes for b in verification.buckets) == sum(s.codes for s in verification.sites)


def test_the_whole_model_may_differ_by_at_least_as_much_as_one_layer(
    faithful: Callable[[str], Verification],
) -> None:
    verification = faithful("onnxruntime")
    assert verification.end_to_end_tolerance >= LAYER_TOLERANCE


def test_progress_counts_every_quantizer_and_layer_and_all_segments(
    mini_engines: Callable[[str], Path], mini_reference: Path
) -> None:
    calls: list[tuple[str, int, int]] = []
    verify_engine(
        get_backend("onnxruntime"),
        OPTIONS,
        mini_engines("onnxruntime"),
        mini_reference,
        lambda *progress: calls.append(progress),
    )
    assert [*dict.fromkeys(phase for phase, _, _ in calls)] == ["sites", "layers", "segments"]
    assert all(0 < done <= total == 50 for _, done, total in calls)
    assert [done for _, done, _ in calls] == sorted({done for _, done, _ in calls})
    assert calls[-1][1] == 50


def test_the_reference_of_another_model_is_an_input_error(
    verify_against: Callable[[Path], Verification], copied: Path
) -> None:
    tables = load_file(copied / TABLES)
    save_file(
        {name.replace("conv_in", "conv_other"): value for name, value in tables.items()},
        copied / TABLES,
    )
    with refused(copied, "quest-deploy reference"):
        verify_against(copied)


def test_a_reference_without_what_segments_need_is_an_input_error(
    verify_against: Callable[[Path], Verification], copied: Path
) -> None:
    path = sorted(copied.glob("buckets-*"))[0]
    save_file(
        {name: value for name, value in load_file(path).items() if name != "untied_output"}, path
    )
    with refused(copied, "quest-deploy reference"):
        verify_against(copied)


def test_verifying_an_engine_needs_no_torch(
    mini_engines: Callable[[str], Path], mini_reference: Path
) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from quest_deploy.backends.registry import get_backend; from "
        "quest_deploy.backends.options import EngineOptions\n"
        "from quest_deploy.verification.checks import verify_engine\n"
        "print([name for name in ('torch', 'diffusers') if name in sys.modules])\n"
        "sys.modules['torch'] = None\n"  # polygraphy imports it where it is installed
        "engine, reference = map(Path, sys.argv[1:])\n"
        "print(verify_engine(get_backend('onnxruntime'), EngineOptions(threads=1), engine, "
        "reference).passed)"
    )
    arguments = [
        sys.executable,
        "-c",
        program,
        str(mini_engines("onnxruntime")),
        str(mini_reference),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "True"]
