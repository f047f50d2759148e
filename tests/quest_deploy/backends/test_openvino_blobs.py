"""Blobs of an engine, which open it without compiling, to the same bits."""

from __future__ import annotations

import errno
import logging
import shutil
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import openvino
import pytest

import quest_deploy as qd
from quest_deploy.artifacts.reference import load_reference
from quest_deploy.artifacts.workspace import CALIBRATED, TRAJECTORIES, Workspace
from quest_deploy.backends import exactness
from quest_deploy.backends.base import (
    BLOBS,
    ENGINE_FILE,
    LOWERED,
    build_engine,
    engine_info,
    file_bytes,
    open_engine,
)
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.backends.openvino import backend as openvino_backend
from quest_deploy.backends.openvino import blobs
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.errors import QuestDeployError
from quest_deploy.verification.checks.end_to_end import check_end_to_end
from quest_deploy.verification.checks.engine import CheckedEngine
from tests.helpers import refused, reseal
from tests.quest_deploy.support import flip_byte

if TYPE_CHECKING:
    from collections.abc import Callable

OPENVINO = get_backend("openvino")
BATCH = 2
needs_maps = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped"
)


def feeds(batch: int = BATCH) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "sample": rng.standard_normal((batch, 2, 4, 4)).astype(np.float32),
        "timestep": np.linspace(10, 990, batch).astype(np.float32),
        "encoder_hidden_states": rng.standard_normal((batch, 3, 8)).astype(np.float32),
    }


def emoji_feeds() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "sample": generator.standard_normal((2, 8, 8, 8), np.float32),
        "timestep": np.asarray([5, 700], np.float32),
        "encoder_hidden_states": generator.standard_normal((2, 24, 128), np.float32),
    }


def blob_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(BLOBS))


def answer(folder: Path, batch: int = BATCH) -> np.ndarray:
    with open_engine(OPENVINO, folder) as runner:
        return next(iter(runner.infer(feeds(batch)).values()))


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def built(
    request: pytest.FixtureRequest,
    mini_proto: onnx.ModelProto,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An engine of each precision; not to be changed."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    options = EngineOptions(threads=1, dtype=request.param)
    build_engine(OPENVINO, ir.from_proto(mini_proto), folder, options, "cd" * 32)
    return folder


@pytest.fixture
def engine(mini_engines: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of an engine, to be damaged."""
    return shutil.copytree(mini_engines("openvino"), tmp_path / "engine")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has another processor."""
    monkeypatch.setattr(exactness, "processor_name", lambda: "another processor")


def test_an_engine_opens_from_its_blob_to_the_bits_that_compiling_gives(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = engine_info(built).options
    shapes = tuple((name, value.shape) for name, value in feeds().items())
    compiled = openvino_backend.compile_graph(built / LOWERED, options, shapes)
    request = compiled.create_infer_request()
    expected = next(iter(request.infer(feeds()).values())).copy()
    monkeypatch.setattr(openvino_backend, "compile_graph", None)
    np.testing.assert_array_equal(answer(built), expected)


def test_verification_holds_where_the_whole_engine_is_opened_from_its_blob(
    mini_engines: Callable[[str], Path], mini_reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mini_engines("openvino")
    monkeypatch.setattr(openvino_backend, "compile_graph", None)
    checked = CheckedEngine(OPENVINO, engine_info(folder).options, folder)
    errors = check_end_to_end(checked, load_reference(mini_reference)[0])
    assert max(error.max() for error in errors) < 1e-3


def test_a_batch_that_has_no_blob_is_compiled(engine: Path) -> None:
    assert len(answer(engine, 3)) == 3


def test_a_blob_takes_the_weights_from_the_file_beside_the_graph(workspace: Path) -> None:
    engine = workspace / "engines" / "openvino"
    data, (blob,) = engine / f"{LOWERED}.data", blob_files(engine)
    inputs, options = emoji_feeds(), engine_info(engine).options

    def found() -> np.ndarray:
        with OPENVINO.open(engine, options) as runner:
            return next(iter(runner.infer(inputs).values()))

    opened = found()
    content = blob.read_bytes()
    blob.unlink()
    np.testing.assert_array_equal(opened, found())
    blob.write_bytes(content)
    data.write_bytes(bytes(data.stat().st_size))
    assert not np.array_equal(opened, found())


def test_a_blob_that_holds_the_weights_gives_the_same_bits_and_needs_no_other_file(
    workspace: Path,
) -> None:
    engine = workspace / "engines" / "openvino"
    inputs = emoji_feeds()
    with OPENVINO.open(engine, engine_info(engine).options) as runner:
        expected = next(iter(runner.infer(inputs).values()))
    small = blob_files(engine)[0].stat().st_size
    qd.build_engine(workspace, compiled_weights=True)
    (blob,) = blob_files(engine)
    data = engine / f"{LOWERED}.data"
    assert blob.stat().st_size > small + data.stat().st_size
    data.write_bytes(bytes(data.stat().st_size))
    with OPENVINO.open(engine, engine_info(engine).options) as runner:
        np.testing.assert_array_equal(next(iter(runner.infer(inputs).values())), expected)


def test_every_blob_is_hashed_and_a_changed_one_refused(engine: Path) -> None:
    (blob,) = blob_files(engine)
    assert blob.name in engine_info(engine).files
    flip_byte(blob)
    with refused(blob):
        answer(engine)


def test_on_another_processor_the_graph_is_compiled_and_a_line_says_so(
    engine: Path, elsewhere: None, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answer_without_blobs(engine)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(answer(engine), expected)
    (line,) = [x.getMessage() for x in caplog.records if x.name == blobs.__name__]
    assert "build-engine" in line


def answer_without_blobs(folder: Path) -> np.ndarray:
    lone = folder.with_name("lone")
    shutil.copytree(folder, lone)
    for blob in blob_files(lone):
        blob.unlink()
    with OPENVINO.open(lone, engine_info(folder).options) as runner:
        return next(iter(runner.infer(feeds()).values()))


def test_a_blob_that_the_runtime_cannot_read_is_compiled_instead_and_a_line_says_so(
    engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (blob,) = blob_files(engine)
    blob.write_bytes(b"no compiled model")
    with caplog.at_level(logging.WARNING), OPENVINO.open(engine, engine_info(engine).options) as x:
        found = next(iter(x.infer(feeds()).values()))
    np.testing.assert_array_equal(found, answer_without_blobs(engine))
    assert any(str(blob) in x.getMessage() for x in caplog.records)


def of_table(folder: Path, table: list[float]) -> Any:
    """A compiled model of a table of three buckets."""
    text = f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[2] timestep, float[2] x) => (float[2] y)
        <float[3] table = {{{", ".join(map(str, table))}}}, float steps = {{334}}> {{
            of = Div (timestep, steps)
            bucket = Cast <to = 7> (of)
            scale = Gather (table, bucket)
            y = Mul (x, scale)
        }}
    """
    onnx.save(onnx.parser.parse_model(text), folder / "table.onnx")
    return openvino.Core().compile_model(folder / "table.onnx", "CPU")


class Written:
    """A compiled model that writes another one."""

    def __init__(self, compiled: Any, other: Any) -> None:
        self.inputs, self.export_model = compiled.inputs, other.export_model
        self.create_infer_request = compiled.create_infer_request


@pytest.mark.parametrize("bucket", [0, 1, 2])
def test_a_blob_with_other_scales_in_one_bucket_is_refused(tmp_path: Path, bucket: int) -> None:
    table = [1.0, 2.0, 3.0]
    right = of_table(tmp_path, table)
    table[bucket] = 9.0
    wrong, path = of_table(tmp_path, table), tmp_path / "x.blob"
    blobs.write_blob(lambda: Written(right, right), path, {})
    with pytest.raises(ValueError, match="bits"):
        blobs.write_blob(lambda: Written(right, wrong), path, {})


def test_what_was_compiled_is_gone_before_its_blob_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, read = of_table(tmp_path, [1, 2, 3]), blobs._read
    held: list[weakref.ref[Written]] = []

    def compile_model() -> Written:
        made = Written(compiled, compiled)
        held.append(weakref.ref(made))
        return made

    def read_alone(*arguments: Any) -> Any:
        assert held[0]() is None
        return read(*arguments)

    monkeypatch.setattr(blobs, "_read", read_alone)
    blobs.write_blob(compile_model, tmp_path / "x.blob", {})
    assert held


def build(proto: onnx.ModelProto, folder: Path, **options: Any) -> None:
    folder.mkdir()
    chosen = EngineOptions(threads=1, **options)
    build_engine(OPENVINO, ir.from_proto(proto), folder, chosen, "cd" * 32)


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), ValueError("other bits"), OSError(errno.EIO, "input")]
)
def test_where_no_blob_can_be_kept_the_engine_is_built_without_and_a_line_says_so(
    mini_proto: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def fail(compile_model: object, path: Path, config: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(openvino_backend, "write_blob", fail)
    with caplog.at_level(logging.WARNING):
        build(mini_proto, tmp_path / "engine")
    assert not blob_files(tmp_path / "engine")
    assert len(answer(tmp_path / "engine")) == BATCH
    (line,) = [x.getMessage() for x in caplog.records if x.name == openvino_backend.__name__]
    assert str(error) in line


def test_a_full_disk_ends_the_build(
    mini_proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(openvino_backend, "write_blob", fail)
    with pytest.raises(OSError, match="No space"):
        build(mini_proto, tmp_path / "engine")


def test_where_openvino_marks_no_constants_no_blob_is_kept(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "_BESIDE", "AnotherAttribute")
    qd.build_engine(workspace)
    assert not blob_files(workspace / "engines" / "openvino")


def test_a_blob_that_is_gone_when_it_is_needed_is_compiled_instead(
    engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, (blob,) = answer_without_blobs(engine), blob_files(engine)
    with caplog.at_level(logging.WARNING), open_engine(OPENVINO, engine) as runner:
        blob.unlink()
        np.testing.assert_array_equal(next(iter(runner.infer(feeds()).values())), expected)
    assert any(str(blob) in x.getMessage() for x in caplog.records)


def in_memory(blob: Path) -> bool:
    return str(blob) in Path("/proc/self/maps").read_text()


@needs_maps
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("pattern", [LOWERED, BLOBS])
def test_an_engine_that_another_build_replaced_runs_what_it_has_and_opens_no_more(
    engine: Path, pattern: str, prepared: bool
) -> None:
    with open_engine(OPENVINO, engine) as runner:
        first = runner.infer(feeds()) if prepared else None
        for path in engine.glob(pattern):
            other = path.with_name("other")
            other.write_bytes(path.read_bytes())
            other.replace(path)
        for batch in (BATCH, BATCH + 1):
            if first is not None and batch == BATCH:
                np.testing.assert_equal(runner.infer(feeds()), first)
            else:
                with refused(engine, "open it again", error=QuestDeployError):
                    runner.infer(feeds(batch))


def test_a_batch_that_is_not_kept_open_has_no_blob_in_memory(engine: Path) -> None:
    (blob,) = blob_files(engine)
    with open_engine(OPENVINO, engine) as runner:
        runner.infer(feeds())
        assert in_memory(blob)
        for batch in range(3, 3 + openvino_backend.KEPT_SHAPES):
            runner.infer(feeds(batch))
        assert not in_memory(blob)


def opened_ahead() -> None:
    """Wait for what is being opened in the background."""
    openvino_backend._AHEAD.submit(int).result()


@needs_maps
def test_a_prepared_engine_has_opened_its_blob_before_it_runs_and_does_not_again(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, (blob,) = answer_without_blobs(engine), blob_files(engine)
    with open_engine(OPENVINO, engine) as runner:
        assert not in_memory(blob)
        runner.prepare()
        opened_ahead()
        assert in_memory(blob)
        monkeypatch.setattr(openvino_backend, "open_blob", None)
        np.testing.assert_array_equal(next(iter(runner.infer(feeds()).values())), expected)


@needs_maps
@pytest.mark.parametrize("waits", [False, True])
def test_what_was_prepared_leaves_memory_where_other_shapes_are_run(
    engine: Path, *, waits: bool
) -> None:
    (blob,) = blob_files(engine)
    with open_engine(OPENVINO, engine) as runner:
        runner.prepare()
        if waits:
            opened_ahead()
        runner.infer(feeds(3))
        opened_ahead()
        assert not in_memory(blob)
        runner.infer(feeds())
        assert in_memory(blob)


def test_a_prepared_engine_whose_blob_cannot_be_read_is_compiled(engine: Path) -> None:
    expected, (blob,) = answer_without_blobs(engine), blob_files(engine)
    blob.write_bytes(b"no compiled model")
    with OPENVINO.open(engine, engine_info(engine).options) as runner:
        runner.prepare()
        np.testing.assert_array_equal(next(iter(runner.infer(feeds()).values())), expected)


def test_a_float_graph_with_weights_of_8_bits_is_asked_whether_fusing_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
        <ir_version: 10, opset_import: ["": 20]>
        g (float[2, 4] x) => (float[2, 4] y)
        <int8[4, 4] codes = {1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4}, float s = {0.5}> {
            w = DequantizeLinear (codes, s)
            y = MatMul (x, w)
        }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / LOWERED)
    fused: list[bool] = []

    def compile_graph(*arguments: object, fuse: bool) -> Any:
        fused.append(fuse)
        return openvino.Core().compile_model(tmp_path / LOWERED, "CPU")

    monkeypatch.setattr(openvino_backend, "fusing_crashes", lambda graph: True)
    monkeypatch.setattr(openvino_backend, "compile_graph", compile_graph)
    with OPENVINO.open(tmp_path, EngineOptions()) as runner:
        runner.infer({"x": np.ones((2, 4), np.float32)})
    assert fused == [False]


@pytest.mark.parametrize("batches", [(), (0,)])
def test_none_are_kept_where_none_are_asked_for_and_sizes_leave_them_out(
    mini_proto: onnx.ModelProto, engine: Path, tmp_path: Path, batches: tuple[int, ...]
) -> None:
    folder = tmp_path / "none"
    build(mini_proto, folder, compiled_batch=batches)
    assert not blob_files(folder)
    options = engine_info(engine).options
    assert file_bytes(folder, options) == file_bytes(engine, options)


def test_sizes_count_a_blob_that_holds_the_weights(
    mini_proto: onnx.ModelProto, tmp_path: Path
) -> None:
    folder = tmp_path / "engine"
    build(mini_proto, folder, compiled_weights=True)
    files = [path for path in folder.iterdir() if path.name != ENGINE_FILE]
    assert blob_files(folder)
    expected = sum(path.stat().st_size for path in files)
    assert file_bytes(folder, engine_info(folder).options) == expected


def test_no_batch_beside_others_is_refused() -> None:
    with refused("--compiled-batch", 0):
        EngineOptions(compiled_batch=(0, 2))


def test_the_machine_that_built_an_engine_is_not_asked_again_what_it_computes_exactly(
    engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(exactness, "measured", lambda backend: asked.append(1) or exactness.EXACT)
    answer(engine)
    assert not asked
    monkeypatch.setattr(exactness, "processor_name", lambda: "another processor")
    answer(engine)
    assert asked


def test_loading_an_engine_reads_its_own_files_and_none_that_it_was_made_from(
    workspace: Path,
) -> None:
    for name in (CALIBRATED, TRAJECTORIES, "unet.onnx.data"):
        (workspace / name).unlink()
    with EngineUNet.load(Workspace.open(workspace), "openvino") as unet:
        states = np.zeros((2, 24, 128))
        assert unet.predict(np.zeros((2, 8, 8, 8)), 5, encoder_hidden_states=states).shape[0] == 2


def test_an_engine_whose_record_is_another_ones_is_refused(workspace: Path) -> None:
    record = workspace / "engines" / "openvino" / ENGINE_FILE
    reseal(record, lambda content: content["options"].update(threads=3))
    with refused(record, "build-engine --backend openvino"):
        EngineUNet.load(Workspace.open(workspace), "openvino")


def test_a_graph_without_usual_shapes_is_compiled_for_what_it_meets(tmp_path: Path) -> None:
    text = """
        <ir_version: 10, opset_import: ["": 20]>
        g (float[n, 4] sample) => (float[n, 4] y) { y = Add (sample, sample) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / LOWERED)
    with OPENVINO.open(tmp_path, EngineOptions()) as runner:
        assert runner.infer({"sample": np.ones((3, 4), np.float32)})["y"].sum() == 24
