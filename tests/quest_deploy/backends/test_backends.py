from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import parser as onnx_parser

from exporters.graph_info import graph_info, load_graph
from exporters.passes.cut import cut_segments
from quest_deploy.backends.base import (
    ENGINE_FILE,
    LOWERED,
    OneBucketRunner,
    Runner,
    SplitRunner,
    build_engine,
    engine_info,
    input_shapes,
    open_engine,
)
from quest_deploy.backends.openvino.backend import fusing_crashes
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import BACKENDS, get_backend
from quest_deploy.backends.tensorrt.base import DEFAULT_CAPABILITIES, ENGINE
from quest_deploy.errors import QuestDeployError
from quest_deploy.files import sha256_of
from quest_deploy.quantization.model import QuantizedModel
from tests.helpers import refused, relative_error, reseal
from tests.quest_deploy.support import LINKS, Chain, flip_byte, linked, truncate

CPU_BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    """Five samples, each at a timestep of its own, in all three buckets."""
    rng = np.random.default_rng(3)
    return {
        "sample": rng.standard_normal((5, 2, 4, 4)).astype(np.float32),
        "timestep": np.asarray([999, 100.5, 500, 333.34, 0], np.float32),
        "encoder_hidden_states": rng.standard_normal((5, 3, 8)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def undamaged(small_proto: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An onnxruntime engine whose weights are large enough for a file of their own."""
    folder = tmp_path_factory.mktemp("undamaged")
    build_engine(
        get_backend("onnxruntime"),
        ir.from_proto(small_proto),
        folder,
        EngineOptions(threads=1),
        "cd" * 32,
    )
    assert (folder / f"{LOWERED}.data").stat().st_size > 0
    return folder


@pytest.fixture
def engine(undamaged: Path, tmp_path: Path) -> Path:
    """A copy of the onnxruntime engine, to be damaged."""
    return shutil.copytree(undamaged, tmp_path / "engine")


@pytest.fixture(scope="module")
def rtx(
    mini_proto: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[str, int, int]]]:
    """A TensorRT for RTX engine for Ada, built by the real builder, and what it reported
    meanwhile.
    """
    folder, calls = tmp_path_factory.mktemp("rtx"), []
    build_engine(
        get_backend("tensorrt-rtx"),
        ir.from_proto(mini_proto),
        folder,
        EngineOptions(compute_capability=("89",), max_batch=4),
        "cd" * 32,
        lambda *progress: calls.append(progress),
    )
    return folder, calls


class Limited(Runner):
    """A runner that refuses more than ``most`` rows, keeps how many it got, and answers the sample
    plus the timestep.
    """

    def __init__(self, most: int) -> None:
        self.most, self.batches, self.closed = most, [], False

    def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert {len(value) for value in feeds.values()} == {len(feeds["sample"])}
        assert len(feeds["sample"]) <= self.most
        self.batches.append(len(feeds["sample"]))
        return {"sum": feeds["sample"] + feeds["timestep"][:, None], "timestep": feeds["timestep"]}

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("rows", "batches"),
    [(1, [1]), (3, [3]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (9, [4, 4, 1])],
    ids=lambda x: str(x),
)
def test_a_batch_beyond_the_largest_is_split_and_its_results_are_put_together(
    rows: int, batches: list[int]
) -> None:
    inner = Limited(4)
    feeds = {"sample": np.arange(rows * 3.0).reshape(rows, 3), "timestep": np.arange(float(rows))}
    outputs = SplitRunner(inner, 4).infer(feeds)
    assert inner.batches == batches
    np.testing.assert_array_equal(outputs["sum"], feeds["sample"] + feeds["timestep"][:, None])
    np.testing.assert_array_equal(outputs["timestep"], feeds["timestep"])


def test_closing_a_runner_that_splits_closes_the_one_inside() -> None:
    inner = Limited(4)
    with SplitRunner(inner, 4):
        assert not inner.closed
    assert inner.closed


@pytest.mark.parametrize(
    ("timesteps", "batches"),
    [([5.0], [1]), ([7.0, 7.0, 7.0], [3]), ([9.0, 1.0, 9.0, 5.0, 1.0], [2, 1, 2])],
)
@pytest.mark.parametrize("name", ["timestep", "bucket"])
def test_rows_of_each_timestep_run_together_and_their_results_are_put_where_they_were(
    name: str, timesteps: list[float], batches: list[int]
) -> None:
    class Uniform(Limited):
        def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
            assert len(np.unique(feeds[name])) == 1
            return super().infer({"sample": feeds["sample"], "timestep": feeds[name]})

    inner, rows = Uniform(5), len(timesteps)
    feeds = {"sample": np.arange(rows * 3.0).reshape(rows, 3), name: np.asarray(timesteps)}
    with OneBucketRunner(inner) as runner:
        outputs = runner.infer(feeds)
    assert (inner.batches, inner.closed) == (batches, True)
    np.testing.assert_array_equal(outputs["sum"], feeds["sample"] + feeds[name][:, None])


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt"])
@pytest.mark.parametrize("quantize", ["native", "gathered"])
def test_a_tensorrt_engine_of_gathered_scales_gets_batches_of_one_timestep_alone(
    backend: str, quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Limited(6)
    monkeypatch.setattr(
        "quest_deploy.backends.tensorrt.base._TensorRtRunner",
        lambda folder, options, package: opened,
    )
    options = EngineOptions(max_batch=2, quantize=quantize)
    with get_backend(backend).open(tmp_path, options) as runner:
        runner.infer({"sample": np.zeros((4, 1)), "timestep": np.asarray([1.0, 2.0, 1.0, 1.0])})
    assert opened.batches == {"native": [2, 2], "gathered": [2, 1, 1]}[quantize]


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt"])
def test_a_tensorrt_engine_never_gets_more_rows_than_its_profile_allows(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Limited(6)
    monkeypatch.setattr(
        "quest_deploy.backends.tensorrt.base._TensorRtRunner",
        lambda folder, options, package: opened,
    )
    with get_backend(backend).open(tmp_path, EngineOptions(max_batch=6)) as runner:
        outputs = runner.infer({"sample": np.zeros((20, 1)), "timestep": np.arange(20.0)})
    assert opened.batches == [6, 6, 6, 2]
    np.testing.assert_array_equal(outputs["sum"][:, 0], np.arange(20.0))


def test_there_are_four_backends_and_others_are_refused_by_name() -> None:
    assert set(BACKENDS) == {"openvino", "onnxruntime", "tensorrt-rtx", "tensorrt"}
    with refused("'tflite'", *BACKENDS):
        get_backend("tflite")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_engine_agrees_with_the_fake_quantized_model(
    mini_engines: Callable[[str], Path],
    mini_quantized: QuantizedModel,
    feeds: dict[str, np.ndarray],
    backend: str,
) -> None:
    with open_engine(get_backend(backend), mini_engines(backend)) as runner:
        (output,) = runner.infer(feeds).values()
    with torch.no_grad():
        expected = mini_quantized(
            **{name: torch.from_numpy(value) for name, value in feeds.items()}
        ).numpy()
    assert relative_error(output, expected) < 1e-5


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_batch_that_mixes_timesteps_equals_each_sample_alone(
    mini_engines: Callable[[str], Path], feeds: dict[str, np.ndarray], backend: str
) -> None:
    with open_engine(get_backend(backend), mini_engines(backend)) as runner:
        (together,) = runner.infer(feeds).values()
        for i in range(5):
            (alone,) = runner.infer(
                {name: value[i : i + 1] for name, value in feeds.items()}
            ).values()
            assert relative_error(together[i : i + 1], alone) < 1e-5


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_output_is_not_overwritten_by_the_next_inference(
    mini_engines: Callable[[str], Path], feeds: dict[str, np.ndarray], backend: str
) -> None:
    with open_engine(get_backend(backend), mini_engines(backend)) as runner:
        (first,) = runner.infer(feeds).values()
        kept = first.copy()
        runner.infer(feeds | {"sample": feeds["sample"] + 1})
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_inputs_need_not_be_contiguous(
    mini_engines: Callable[[str], Path], feeds: dict[str, np.ndarray], backend: str
) -> None:
    strided = {name: np.repeat(value, 2, axis=0)[::2] for name, value in feeds.items()}
    with open_engine(get_backend(backend), mini_engines(backend)) as runner:
        (plain,), (from_strided,) = runner.infer(feeds).values(), runner.infer(strided).values()
    np.testing.assert_array_equal(plain, from_strided)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_engine_says_what_built_it_from_which_graph_for_which_hardware(
    mini_engines: Callable[[str], Path], backend: str
) -> None:
    record = engine_info(mini_engines(backend))
    assert (record.backend, record.graph_sha256, record.checkpoint_sha256) == (
        backend,
        "cd" * 32,
        "ab" * 32,
    )
    assert {"quest-deploy", backend} <= record.built_by.keys()
    assert record.hardware["device"].lower() == "cpu"
    assert record.files == {
        path.name: sha256_of(path)
        for path in mini_engines(backend).iterdir()
        if path.name != ENGINE_FILE
    }
    assert record.options == EngineOptions(threads=1)


@pytest.mark.parametrize(
    "damage",
    [flip_byte, truncate, lambda path: path.unlink()],
    ids=["edited", "truncated", "removed"],
)
@pytest.mark.parametrize("name", [LOWERED, f"{LOWERED}.data"])
def test_a_damaged_engine_file_is_refused_before_it_is_loaded(
    engine: Path, name: str, damage: Callable[[Path], Any]
) -> None:
    damage(engine / name)
    with refused(engine / name, "quest-deploy build-engine"):
        open_engine(get_backend("onnxruntime"), engine)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"version": 1}, "build-engine 1 2"),
        ({"format": "other"}, "build-engine"),
        ({"options": None}, "build-engine options"),
        ({"options": {"threads": "1"}}, "build-engine options.threads"),
        ({"options": {"thread": 1}}, "build-engine options.thread"),
        ({"more": 1}, "build-engine more"),
        ({"files": None}, "build-engine files"),
        ({"backend": None}, "build-engine backend"),
        ({"backend": "openvino"}, "openvino onnxruntime"),
    ],
)
def test_a_damaged_engine_description_is_an_input_error(
    engine: Path, changes: dict[str, Any], facts: str
) -> None:
    reseal(engine / ENGINE_FILE, lambda content: content.update(changes))
    with refused(*facts.split()):
        open_engine(get_backend("onnxruntime"), engine)


@pytest.mark.parametrize("key", ["backend", "files", "options"])
def test_an_engine_description_without_a_key_is_an_input_error(engine: Path, key: str) -> None:
    reseal(engine / ENGINE_FILE, lambda content: content.pop(key))
    with refused("quest-deploy build-engine"):
        open_engine(get_backend("onnxruntime"), engine)


def test_an_engine_of_another_backend_is_refused(engine: Path) -> None:
    with refused("openvino", "onnxruntime"):
        open_engine(get_backend("openvino"), engine)


def test_a_folder_without_an_engine_is_an_input_error(tmp_path: Path) -> None:
    with refused(tmp_path / ENGINE_FILE):
        open_engine(get_backend("openvino"), tmp_path)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("unknown", [False, True], ids=["no graph", "an unknown operator"])
def test_what_a_runtime_refuses_is_one_error_of_one_line(
    backend: str, unknown: bool, tmp_path: Path
) -> None:
    graph = onnx_parser.parse_model(
        '<ir_version: 10, opset_import: ["": 19]> g (float[2] x) => (float[2] y) { y = Foo(x) }'
    )
    content = graph.SerializeToString() if unknown else b"no graph"
    (tmp_path / LOWERED).write_bytes(content)
    facts = ["Foo"] if unknown and backend == "onnxruntime" else []
    with refused(backend, tmp_path / LOWERED, *facts, error=QuestDeployError) as caught:
        get_backend(backend).compile(
            tmp_path / LOWERED, tmp_path, EngineOptions(compiled_batch=()), lambda *progress: None
        )
    assert "\n" not in str(caught.value)
    assert "core.cpp" not in str(caught.value)


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_engine_of_links_gives_what_the_engine_gives_and_leaves_nothing(
    mini_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, kind: str
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    built = mini_chain.root / "engines" / backend  # whose weights fill a file of their own
    engine = linked(built, tmp_path / "engine", kind)
    with (
        open_engine(get_backend(backend), built) as real,
        open_engine(get_backend(backend), engine) as runner,
    ):
        for rows in (2, 1):  # one of which openvino compiles when it meets it
            shapes = input_shapes(load_graph(built / LOWERED), rows)
            feeds = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
            (expected,), (found,) = real.infer(feeds).values(), runner.infer(feeds).values()
            np.testing.assert_array_equal(found, expected)
    assert not list((tmp_path / "scratch").iterdir())
    flip_byte((engine / f"{LOWERED}.data").resolve())
    with refused(engine / f"{LOWERED}.data", "quest-deploy build-engine"):
        open_engine(get_backend(backend), engine)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_onnxruntime_lacks_here_is_an_input_error(
    engine: Path, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    reseal(engine / ENGINE_FILE, lambda content: content["options"].update(provider=provider))
    with refused(provider, "'quest-deploy[gpu]'"):
        open_engine(get_backend("onnxruntime"), engine)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_backend_whose_package_is_missing_says_what_to_install(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for check in (get_backend(backend).check_build, get_backend(backend).check_run):
        with refused(backend, "pip install 'quest-deploy[cpu]'"):
            check(EngineOptions())


def test_tensorrt_rtx_builds_without_a_gpu_for_the_capability_chosen(
    rtx: tuple[Path, list[tuple[str, int, int]]],
) -> None:
    folder, _ = rtx
    assert (folder / ENGINE).stat().st_size > 100_000
    record = engine_info(folder)
    assert record.hardware == {"device": "GPU", "compute_capabilities": ["89"]}
    assert record.files[ENGINE] == sha256_of(folder / ENGINE)
    assert record.built_by["tensorrt-rtx"]


def test_the_builders_own_progress_is_shown(rtx: tuple[Path, list[tuple[str, int, int]]]) -> None:
    _, calls = rtx
    assert any(done == total > 0 for _, done, total in calls)
    assert all(phase and 0 <= done <= total for phase, done, total in calls)


def test_without_a_choice_tensorrt_rtx_builds_for_several_generations() -> None:
    hardware = get_backend("tensorrt-rtx").hardware(EngineOptions())
    assert hardware["compute_capabilities"] == list(DEFAULT_CAPABILITIES)
    assert len(DEFAULT_CAPABILITIES) >= 3


@pytest.mark.parametrize("capability", ["12", "8.9", "ada", ""])
def test_an_unknown_compute_capability_is_refused_with_the_known_ones(capability: str) -> None:
    with refused(repr(capability), "89"):
        get_backend("tensorrt-rtx").check_build(
            EngineOptions(compute_capability=("89", capability))
        )


def test_running_a_tensorrt_rtx_engine_without_a_gpu_is_an_input_error(
    rtx: tuple[Path, list[tuple[str, int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_count", lambda: 0)
    with refused("GPU"):
        open_engine(get_backend("tensorrt-rtx"), rtx[0])


@pytest.mark.parametrize("purpose", ["check_build", "check_run"])
def test_tensorrt_without_its_sdk_is_an_input_error(
    purpose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with refused("tensorrt", "pip install 'quest-deploy[gpu]'", "SDK"):
        getattr(get_backend("tensorrt"), purpose)(EngineOptions())


def test_building_with_tensorrt_without_a_gpu_points_to_tensorrt_rtx(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.16.1"))
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_count", lambda: 0)
    with refused("tensorrt-rtx"):
        get_backend("tensorrt").check_build(EngineOptions())


def test_openvino_fuses_segments_but_where_a_norm_is_scaled_by_a_computed_factor(
    mini_engines: Callable[[str], Path],
) -> None:
    lowered = load_graph(mini_engines("openvino") / LOWERED)
    assert not fusing_crashes(cut_segments(lowered, graph_info(lowered)))
    scaled = """
        <ir_version: 10, opset_import: ["": 21]>
        scaled (float[2,4,8] x, float[4] weight, float[4] bias, float[2,4,1] scale, float[4,1] one) => (float[2,4,8] y) {
            normed = GroupNormalization <num_groups = 2> (x, weight, bias)
            factor = Add (scale, one)
            y = Mul (normed, factor)
        }
    """
    assert fusing_crashes(ir.from_onnx_text(scaled))
