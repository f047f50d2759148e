from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from quest_deploy.engine.backends import get_backend
from quest_deploy.engine.base import EngineOptions, Runner, SplitRunner, build_engine
from quest_deploy.engine.onnxruntime import OnnxRuntimeBackend
from quest_deploy.errors import InputError
from quest_deploy.reference_files import TABLES
from quest_deploy.verify.judge import LAYER_TOLERANCE
from quest_deploy.verify.verify import Verification, verify_engine
from tests.quest_deploy.support import change, initializer, set_initializer, strict_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx

    from quest_deploy.checkpoint import Checkpoint

BACKENDS = ("onnxruntime", "openvino")
OPTIONS = EngineOptions(threads=1)
FIRST = "down_blocks.0.resnets.0"
RESNET, ATTENTION = "up_blocks.0.resnets.0", "down_blocks.0.attentions.0.transformer_blocks.0"
Verify = "Callable[[str, Callable[[ir.Model], Any]], Verification]"


@pytest.fixture(scope="module")
def verify_changed(mini_proto: onnx.ModelProto, mini_reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Verify:
    """Change the portable graph, build an engine of it, and verify that against the unchanged model's reference."""

    def verify(backend: str, edit: Callable[[ir.Model], Any]) -> Verification:
        model = ir.from_proto(mini_proto)
        edit(model)
        folder = tmp_path_factory.mktemp("changed")
        build_engine(get_backend(backend), model, folder, OPTIONS, "cd" * 32)
        return verify_engine(get_backend(backend), OPTIONS, folder, mini_reference)

    return verify


@pytest.fixture(scope="module")
def faithful(mini_engines: Callable[[str], Path], mini_reference: Path) -> Callable[[str], Verification]:
    return lambda backend: verify_engine(get_backend(backend), OPTIONS, mini_engines(backend), mini_reference)


class SmallBatches(OnnxRuntimeBackend):
    """onnxruntime as if its engines took three rows at most, as TensorRT's take those of their profile."""

    def open(self, folder: Path, options: EngineOptions) -> Runner:
        inner = super().open(folder, options)

        class Limited(Runner):
            def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                assert max(len(value) for value in feeds.values()) <= 3
                return inner.infer(feeds)

        return SplitRunner(Limited(), 3)


def test_an_engine_with_a_largest_batch_is_verified_with_all_timesteps_and_records(
    mini_engines: Callable[[str], Path], mini_reference: Path, faithful: Callable[[str], Verification]
) -> None:
    found = verify_engine(SmallBatches(), OPTIONS, mini_engines("onnxruntime"), mini_reference)
    assert found.passed
    assert sum(site.codes for site in found.sites) == sum(site.codes for site in faithful("onnxruntime").sites)


def swap_buckets(model: ir.Model, site: str, one: int, other: int) -> None:
    for table in ("scale", "low", "high"):
        values = initializer(model, f"{site}.{table}")
        values[[one, other]] = values[[other, one]]
        set_initializer(model, f"{site}.{table}", values)


def next_code(model: ir.Model, layer: str) -> None:
    """Change one weight code of a layer by one, within its range."""
    first = initializer(model, f"{layer}.weight").reshape(-1)[0]
    change(model, f"{layer}.weight", 0, by=-1 if first > 0 else 1)


def next_edge_float(model: ir.Model) -> None:
    edges = initializer(model, "bucket_edges")
    edges[0] = np.nextafter(edges[0], np.float32(0))
    set_initializer(model, "bucket_edges", edges)


def wrong_layer(name: str) -> Callable[[Verification], bool]:
    return lambda verification: any(problem.startswith(f"layer {name}:") for problem in verification.problems)


def wrong_site(name: str) -> Callable[[Verification], bool]:
    return lambda verification: any(problem.startswith(f"site {name}:") for problem in verification.problems)


CHANGES: dict[str, tuple[Callable[[ir.Model], Any], Callable[[Verification], bool]]] = {
    "one scale by 0.1%": (lambda m: change(m, f"{RESNET}.conv1.scale", 1, factor=1.001), wrong_layer(f"{RESNET}.conv1")),
    "one 4-bit weight code": (lambda m: next_code(m, f"{RESNET}.conv2"), wrong_layer(f"{RESNET}.conv2")),
    "one 4-bit weight code of a linear layer": (lambda m: next_code(m, f"{ATTENTION}.ff.net.2"), wrong_layer(f"{ATTENTION}.ff.net.2")),
    "one 8-bit weight code": (lambda m: next_code(m, "conv_in"), wrong_layer("conv_in")),
    "one weight scale by 0.1%": (lambda m: change(m, "conv_out.weight_scale", 1, factor=1.001), wrong_layer("conv_out")),
    "one bias": (lambda m: change(m, f"{ATTENTION}.attn1.to_out.0.bias", 2, by=0.01), wrong_layer(f"{ATTENTION}.attn1.to_out.0")),
    "one bucket edge by a step": (lambda m: change(m, "bucket_edges", 1, by=1), lambda v: 667 in v.wrong_buckets),
    "one bucket edge by one float": (next_edge_float, lambda v: any(333.33 < t < 333.34 for t in v.wrong_buckets)),
    "one lower clip bound by one": (
        lambda m: change(m, f"{ATTENTION}.ff.net.0.proj.low", 2, by=-1),
        wrong_site(f"{ATTENTION}.ff.net.0.proj"),
    ),
    "one upper clip bound by one": (
        lambda m: change(m, f"{ATTENTION}.attn1.to_q.high", 0, by=-1),
        wrong_site(f"{ATTENTION}.attn1.to_q"),
    ),
    "one channel-vector entry by 1%": (lambda m: change(m, f"{FIRST}.conv1.channel", 4, factor=1.01), wrong_site(f"{FIRST}.conv1")),
    "two buckets swapped in one site": (lambda m: swap_buckets(m, f"{FIRST}.conv2", 0, 2), wrong_site(f"{FIRST}.conv2")),
}
"""Each in a layer of its own, so that its mark can be told apart where one engine carries all of them."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_faithful_engine_passes(faithful: Callable[[str], Verification], backend: str) -> None:
    verification = faithful(backend)
    assert verification.problems == []
    assert verification.passed
    assert [b.bucket for b in verification.buckets] == [0, 1, 2]
    assert (len(verification.layers), len(verification.sites)) == (27, 22)
    assert sum(site.codes for site in verification.sites) > 10_000
    assert all(site.unexplained == 0 for site in verification.sites)
    assert max(layer.error for layer in verification.layers) < LAYER_TOLERANCE


@pytest.mark.parametrize("changed", CHANGES)
def test_a_single_change_of_the_graph_fails_on_onnxruntime(verify_changed: Verify, changed: str) -> None:
    edit, found = CHANGES[changed]
    verification = verify_changed("onnxruntime", edit)
    assert not verification.passed
    assert found(verification), verification.problems


@pytest.fixture(scope="module")
def all_changes_on_openvino(verify_changed: Verify) -> Verification:
    """One engine with all the changes: openvino compiles it slowly, and each layer is judged alone anyway."""
    return verify_changed("openvino", lambda model: [edit(model) for edit, _ in CHANGES.values()])


@pytest.mark.parametrize("changed", CHANGES)
def test_each_change_of_the_graph_is_found_on_openvino(all_changes_on_openvino: Verification, changed: str) -> None:
    assert CHANGES[changed][1](all_changes_on_openvino), all_changes_on_openvino.problems


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_that_is_not_a_number_fails_and_its_report_is_valid_json(verify_changed: Verify, backend: str) -> None:
    verification = verify_changed(backend, lambda model: change(model, "conv_out.bias", 0, by=np.nan))
    assert any("layer conv_out" in problem for problem in verification.problems)
    assert any("end-to-end" in problem for problem in verification.problems)
    assert strict_json(json.dumps(verification.to_json()))["passed"] is False


def test_a_scale_changed_by_a_thousandth_is_found_in_any_site(verify_changed: Verify, mini_checkpoint: Checkpoint) -> None:
    sites = mini_checkpoint.sites
    verification = verify_changed("onnxruntime", lambda m: [change(m, f"{site}.scale", 1, factor=1.001) for site in sites])
    assert {x.layer for x in verification.layers if not x.error <= LAYER_TOLERANCE} == set(mini_checkpoint.layers)


def test_a_channel_vector_entry_changed_by_a_hundredth_is_found_in_any_site(
    verify_changed: Verify, mini_checkpoint: Checkpoint
) -> None:
    sites = list(mini_checkpoint.sites)
    verification = verify_changed("onnxruntime", lambda m: [change(m, f"{site}.channel", 0, factor=1.01) for site in sites])
    assert [site for site in sites if not wrong_site(site)(verification)] == []


def test_a_changed_weight_code_is_found_in_any_layer(verify_changed: Verify, mini_checkpoint: Checkpoint) -> None:
    verification = verify_changed("onnxruntime", lambda m: [next_code(m, layer) for layer in mini_checkpoint.layers])
    assert {x.layer for x in verification.layers if not x.error <= LAYER_TOLERANCE} == set(mini_checkpoint.layers)


@pytest.mark.parametrize(("bound", "by"), [("low", -1), ("low", 1), ("high", -1), ("high", 1)])
def test_a_changed_clip_bound_is_found_in_any_site(verify_changed: Verify, mini_checkpoint: Checkpoint, bound: str, by: int) -> None:
    # 127 + 1 is no int8 code: the 8-bit bounds are narrowed only.
    sites = [name for name, site in mini_checkpoint.sites.items() if site.bits == 4 or (bound, by) in (("low", 1), ("high", -1))]
    verification = verify_changed("onnxruntime", lambda m: [change(m, f"{site}.{bound}", 1, by=by) for site in sites])
    assert [site for site in sites if not wrong_site(site)(verification)] == []


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("record", [0, 1])
def test_an_end_to_end_difference_in_any_sample_of_any_record_fails(
    mini_engines: Callable[[str], Path], mini_reference: Path, tmp_path: Path, record: int, sample: int
) -> None:
    shutil.copytree(mini_reference, tmp_path, dirs_exist_ok=True)
    path = sorted(tmp_path.glob("buckets-*"))[record]
    tensors = load_file(path)
    tensors["output"][sample] += 1
    save_file(tensors, path)
    verification = verify_engine(get_backend("onnxruntime"), OPTIONS, mini_engines("onnxruntime"), tmp_path)
    bucket = int(tensors["bucket"][sample])
    assert [p.split(":")[0] for p in verification.problems] == [f"bucket {bucket}"]


def test_the_counts_per_bucket_cover_every_compared_code(faithful: Callable[[str], Verification]) -> None:
    verification = faithful("onnxruntime")
    assert sum(b.codes for b in verification.buckets) == sum(s.codes for s in verification.sites)


def test_the_whole_model_may_differ_by_at_least_as_much_as_one_layer(faithful: Callable[[str], Verification]) -> None:
    verification = faithful("onnxruntime")
    assert verification.end_to_end_tolerance >= LAYER_TOLERANCE


def test_progress_counts_every_site_and_layer(mini_engines: Callable[[str], Path], mini_reference: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    verify_engine(
        get_backend("onnxruntime"), OPTIONS, mini_engines("onnxruntime"), mini_reference, lambda *progress: calls.append(progress)
    )
    assert [(done, total) for _, done, total in calls] == [(i + 1, 49) for i in range(49)]


def test_the_reference_of_another_model_is_an_input_error(
    mini_engines: Callable[[str], Path], mini_reference: Path, tmp_path: Path
) -> None:
    shutil.copytree(mini_reference, tmp_path, dirs_exist_ok=True)
    tables = load_file(tmp_path / TABLES)
    save_file({name.replace("conv_in", "conv_other"): value for name, value in tables.items()}, tmp_path / TABLES)
    with pytest.raises(InputError, match="reference of another model; run `quest-deploy reference` again"):
        verify_engine(get_backend("onnxruntime"), OPTIONS, mini_engines("onnxruntime"), tmp_path)


def test_verifying_an_engine_needs_no_torch(mini_engines: Callable[[str], Path], mini_reference: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from quest_deploy.engine.backends import get_backend; from quest_deploy.engine.base import EngineOptions\n"
        "from quest_deploy.verify.verify import verify_engine\n"
        "print([name for name in ('torch', 'diffusers') if name in sys.modules])\n"
        "sys.modules['torch'] = None\n"  # polygraphy imports it where it is installed
        "engine, reference = map(Path, sys.argv[1:])\n"
        "print(verify_engine(get_backend('onnxruntime'), EngineOptions(threads=1), engine, reference).passed)"
    )
    arguments = [sys.executable, "-c", program, str(mini_engines("onnxruntime")), str(mini_reference)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "True"]
