"""Engines of other weights by refit: graphs that are compared, what is refused, and all of the
command but TensorRT itself, which puts weights in on a GPU alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tensorrt_rtx as trt

import quest_deploy as qd
from exporters.graph_info import CHECKPOINT_KEY, load_graph, save_graph
from exporters.lowering.tensorrt import lower
from quest_deploy.artifacts.checkpoint import Checkpoint
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import GRAPH, Workspace
from quest_deploy.backends.base import ENGINE_FILE, LOWERED, check_unchanged, engine_info
from quest_deploy.backends.refit import changed_weights
from quest_deploy.backends.tensorrt import base as shared
from quest_deploy.files import sha256_of
from tests.helpers import assert_holds, hand_checkpoint, hand_graph
from tests.quest_deploy.support import cli, flip_byte, snapshot

RTX = "tensorrt-rtx"
BUILD = ("build-engine", "--backend", RTX)


def with_other_weights(checkpoint: Checkpoint, *names: str) -> Checkpoint:
    """The checkpoint with other codes and scales in these layers, as a LoRA gives them."""
    layers = dict(checkpoint.layers)
    for name in names:
        layer = layers[name]
        layers[name] = replace(
            layer,
            codes=np.roll(layer.weight_codes, 1, axis=0),
            weight_scale=layer.weight_scale * np.float32(1.25),
        )
    return replace(checkpoint, layers=layers)


def workspace(root: Path, checkpoint: Checkpoint, digest: str) -> Path:
    """A workspace with the graph of ``checkpoint``."""
    model = hand_graph(checkpoint)
    model.metadata_props[CHECKPOINT_KEY] = digest * 64
    made = Workspace.create(root, "emoji", Scheme.parse("w4a4", buckets=2))
    save_graph(model, root / GRAPH)
    made.record("export", inputs=(), options={}, files=[root / GRAPH], details={})
    return root


def weights_of(lowered: Path) -> dict[str, str]:
    """The values of a graph's initializers, by name."""
    model = onnx.load(lowered)
    return {
        each.name: onnx.numpy_helper.to_array(each).tobytes().hex()
        for each in model.graph.initializer
    }


class FakeTensorRt:
    """In the place of TensorRT on a GPU: a plan holds its weights by name, and a refitter exchanges
    all but those that are ``fixed``. The parser's refitter takes nothing less than all.
    """

    __version__ = trt.__version__
    ILogger = trt.ILogger
    ComputeCapability = trt.ComputeCapability
    fixed: Sequence[str] = ()
    fails = ""

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 - TensorRT's name
        def deserialize(plan: bytes) -> Any:
            weights = json.loads(plan)
            return SimpleNamespace(
                weights=weights, serialize=lambda: json.dumps(weights, sort_keys=True).encode()
            )

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    def Refitter(self, engine: Any, logger: Any) -> Any:  # noqa: N802
        given: dict[str, str] = {}
        return SimpleNamespace(
            get_all_weights=lambda: [name for name in engine.weights if name not in self.fixed],
            refit_cuda_engine=lambda: engine.weights.update(given) is None,
            given=given,
        )

    def OnnxParserRefitter(self, refitter: Any, logger: Any) -> Any:  # noqa: N802
        def refit_from_file(path: str) -> bool:
            found = weights_of(path)  # type: ignore[arg-type]
            refitter.given.update({name: found[name] for name in refitter.get_all_weights()})
            return not self.fails

        return SimpleNamespace(
            refit_from_file=refit_from_file,
            num_errors=1,
            get_error=lambda i: SimpleNamespace(desc=lambda: self.fails),
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    """A machine with a GPU, and TensorRT for RTX on it."""
    made = FakeTensorRt()

    def compile_plan(self: Any, lowered: Path, folder: Path, options: Any, progress: Any) -> None:
        weights = weights_of(lowered)
        held = dict.fromkeys(weights, "") if options.strip_plan else weights
        (folder / shared.ENGINE).write_text(json.dumps(held, sort_keys=True))

    monkeypatch.setattr(shared.TensorRtRtxBackend, "_module", lambda self: made)
    monkeypatch.setattr(shared.TensorRtRtxBackend, "compile", compile_plan)
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_count", lambda: 1)
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_compute_capability", lambda: "89")
    monkeypatch.setattr("quest_deploy.backends.cuda.driver_version", lambda: "13.0")
    return made


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return workspace(tmp_path / "base", hand_checkpoint(), "a")


@pytest.fixture
def folded(tmp_path: Path) -> Path:
    return workspace(tmp_path / "folded", with_other_weights(hand_checkpoint(), "to_q"), "b")


def built(root: Path, *options: str) -> Path:
    """The engine's folder, built with the options."""
    ended = cli(*BUILD, "-w", root, *options)
    assert ended.code == 0, ended.err
    return root / "engines" / RTX


@pytest.mark.parametrize("options", [(), ("--dtype", "fp16", "--quantize", "gathered")], ids=str)
def test_a_refitted_engine_is_the_one_that_building_gives_and_is_recorded_like_it(
    fake: FakeTensorRt, base: Path, folded: Path, options: tuple[str, ...]
) -> None:
    expected = (built(folded, "--refittable", *options) / shared.ENGINE).read_bytes()
    plain = engine_info(built(base, "--refittable", *options))
    before = snapshot(base)
    ended = cli(*BUILD, "-w", folded, "--refit-from", base, "--json")
    assert ended.code == 0, ended.err
    folder = folded / "engines" / RTX
    assert (folder / shared.ENGINE).read_bytes() == expected
    assert (base / "engines" / RTX / shared.ENGINE).read_bytes() != expected
    assert snapshot(base) == before
    record = engine_info(folder)
    check_unchanged(folder, record)
    Workspace.open(folded).require(f"build-engine/{RTX}")
    assert (record.options, record.hardware, record.runtime) == (
        *(plain.options, plain.hardware, plain.runtime),
    )
    assert (record.checkpoint_sha256, record.graph_sha256, record.refitted_from) == (
        *("b" * 64, sha256_of(folded / GRAPH), sha256_of(base / GRAPH)),
    )
    assert (ended.json["refit"]["workspace"], ended.json["refit"]["weights"]) == (str(base), 2)
    assert_holds(cli(*BUILD, "-w", folded, "--refit-from", base).out, base, "2 weights")


def test_what_was_refitted_can_be_refitted_again(
    fake: FakeTensorRt, base: Path, folded: Path
) -> None:
    first = (built(base, "--refittable") / shared.ENGINE).read_bytes()
    assert cli(*BUILD, "-w", folded, "--refit-from", base).code == 0
    qd.build_engine(base, backend=RTX, refit_from=folded)
    assert (base / "engines" / RTX / shared.ENGINE).read_bytes() == first


def test_an_engine_without_weights_is_refitted_by_its_graph_alone(
    fake: FakeTensorRt, base: Path, folded: Path
) -> None:
    plan = (built(base, "--refittable", "--strip-plan") / shared.ENGINE).read_bytes()
    assert cli(*BUILD, "-w", folded, "--refit-from", base).code == 0
    folder = folded / "engines" / RTX
    assert (folder / shared.ENGINE).read_bytes() == plan
    assert weights_of(folder / LOWERED) != weights_of(base / "engines" / RTX / LOWERED)


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "its weights are fixed": ((), "--refittable"),
    "an option that it was not built with": (
        ("--refittable", "--dtype", "fp16"),
        "--dtype bf16 fp16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_engine_that_cannot_be_refitted_so_is_refused_by_name(
    fake: FakeTensorRt, base: Path, folded: Path, name: str
) -> None:
    options, facts = REFUSED[name]
    folder, before = built(base, *options), snapshot(folded)
    chosen = ("--dtype", "bf16") if "--dtype" in options else ()
    ended = cli(*BUILD, "-w", folded, "--refit-from", base, *chosen)
    ended.assert_refused("--refit-from", folder, *facts.split())
    assert snapshot(folded) == before


def test_a_weight_that_the_plan_has_fixed_is_named_and_nothing_is_written(
    fake: FakeTensorRt, base: Path, folded: Path
) -> None:
    lowered = built(base, "--refittable") / LOWERED
    fake.fixed = [name for name in weights_of(lowered) if name.startswith("to_q.weight_scale")]
    assert fake.fixed
    before = snapshot(folded)
    ended = cli(*BUILD, "-w", folded, "--refit-from", base)
    ended.assert_refused("--refit-from", base, fake.fixed[0])
    assert snapshot(folded) == before
    fake.fixed = [name for name in weights_of(lowered) if name.startswith("to_k.")]  # unchanged
    assert cli(*BUILD, "-w", folded, "--refit-from", base).code == 0


def test_a_graph_that_differs_in_more_than_its_weights_is_refused(
    fake: FakeTensorRt, base: Path, tmp_path: Path
) -> None:
    folder = built(base, "--refittable")
    other = workspace(tmp_path / "other", hand_checkpoint(buckets=3), "c")
    before = snapshot(other)
    cli(*BUILD, "-w", other, "--refit-from", base).assert_refused("--refit-from", folder)
    assert snapshot(other) == before


def test_what_tensorrt_says_of_weights_that_it_does_not_take_is_told(
    fake: FakeTensorRt, base: Path, folded: Path
) -> None:
    built(base, "--refittable")
    fake.fails, before = "only 3 weights out of 4", snapshot(folded)
    ended = cli(*BUILD, "-w", folded, "--refit-from", base)
    assert ended.code == 1
    assert_holds(ended.err, fake.fails)
    assert snapshot(folded) == before


def test_the_workspace_to_refit_from_must_be_another_with_a_whole_engine_of_this_backend(
    fake: FakeTensorRt, base: Path, folded: Path, tmp_path: Path
) -> None:
    def refuse(root: Path, *facts: object, backend: str = RTX) -> None:
        command = ("build-engine", "--backend", backend, "-w", folded, "--refit-from", root)
        cli(*command).assert_refused(*facts)

    refuse(tmp_path / "nowhere", tmp_path / "nowhere", "calibrate")
    refuse(base, base / "engines" / RTX / ENGINE_FILE, "build-engine")
    refuse(base, "--refit-from", "openvino", "tensorrt", backend="openvino")
    built(folded, "--refittable")
    refuse(folded, "--refit-from", folded, "another workspace")
    flip_byte(built(base, "--refittable") / shared.ENGINE)
    refuse(base, base / "engines" / RTX / shared.ENGINE, "build-engine")


def test_without_a_gpu_nothing_is_refitted(
    fake: FakeTensorRt, base: Path, folded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(base, "--refittable")
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_count", lambda: 0)
    cli(*BUILD, "-w", folded, "--refit-from", base).assert_refused("GPU")


def test_the_package_has_all_that_a_refit_calls() -> None:
    for owner, names in {
        trt.Refitter: ("get_all_weights", "refit_cuda_engine"),
        trt.OnnxParserRefitter: ("refit_from_file", "num_errors", "get_error"),
        trt.Runtime: ("deserialize_cuda_engine",),
        trt.ICudaEngine: ("serialize",),
    }.items():
        assert all(hasattr(owner, name) for name in names), owner


class _Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: Any, message: str) -> None:
        pass


@pytest.mark.parametrize("quantize", ["native", "gathered"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_tensorrts_network_has_every_weight_that_a_lora_changes_among_those_to_refit(
    dtype: str, quantize: Any
) -> None:
    hand = hand_checkpoint()
    other = with_other_weights(hand, *hand.layers)
    before, after = (lower(hand_graph(x), dtype=dtype, quantize=quantize) for x in (hand, other))
    changed = changed_weights(before, after)
    assert len(changed) >= 2 * len(hand.layers)
    logger = _Log()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(ir.to_proto(after).SerializeToString())
    assert [name for name in changed if not network.mark_weights_refittable(name)] == []
    assert not network.mark_weights_refittable("no such weight")


@pytest.mark.parametrize("quantize", ["native", "gathered", "plugin"])
def test_a_graph_that_is_read_again_has_not_changed(
    small_graph: ir.Model, quantize: Any, tmp_path: Path
) -> None:
    lowered = lower(small_graph, dtype="fp16", quantize=quantize)
    save_graph(lowered, tmp_path / LOWERED)
    assert changed_weights(load_graph(tmp_path / LOWERED), lowered) == []


def test_only_weights_count_as_changed_and_all_of_them() -> None:
    hand = hand_checkpoint()

    def lowered(checkpoint: Checkpoint) -> ir.Model:
        return lower(hand_graph(checkpoint))

    assert changed_weights(lowered(hand), lowered(hand)) == []
    scales = replace(hand.quantizers["last"], scale=hand.quantizers["last"].scale * np.float32(2))
    tables = replace(hand, quantizers={**hand.quantizers, "last": scales})
    assert changed_weights(lowered(hand), lowered(tables))
    node = lowered(hand)
    next(each for each in node.graph if each.op_type == "Conv").attributes.pop("group", None)
    with pytest.raises(ValueError, match="differs"):
        changed_weights(lowered(hand), node)
    shorter = lowered(hand)
    name = next(iter(shorter.graph.initializers))
    value = shorter.graph.initializers[name]
    value.const_value = ir.tensor(np.zeros((1, 2, 3, 4, 5), np.float32), name=name)
    value.shape, value.dtype = ir.Shape([1, 2, 3, 4, 5]), ir.DataType.FLOAT
    with pytest.raises(ValueError, match=name):
        changed_weights(lowered(hand), shorter)
