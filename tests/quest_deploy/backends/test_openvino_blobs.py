"""Compiled forms of an engine, which open it without compiling, to the same bits."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest

import quest_deploy as qd
from quest_deploy.artifacts.reference import load_reference
from quest_deploy.artifacts.workspace import CALIBRATED, TRAJECTORIES, Workspace
from quest_deploy.backends import exactness
from quest_deploy.backends.base import ENGINE_FILE, LOWERED, build_engine, engine_info, open_engine
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.backends.openvino import backend as openvino_backend
from quest_deploy.backends.openvino import blobs
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.evaluation.benchmark import file_bytes
from quest_deploy.verification.checks.end_to_end import check_end_to_end
from quest_deploy.verification.checks.engine import CheckedEngine
from tests.helpers import refused, reseal
from tests.quest_deploy.support import flip_byte

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx

OPENVINO = get_backend("openvino")
BATCH = 2


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


def forms(folder: Path) -> list[Path]:
    return sorted(folder.glob(blobs.PATTERN))


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


def test_an_engine_opens_from_its_form_to_the_bits_that_compiling_gives(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = engine_info(built).options
    shapes = tuple((name, value.shape) for name, value in feeds().items())
    compiled = openvino_backend.compile_graph(built / LOWERED, options, shapes)
    request = compiled.create_infer_request()
    expected = next(iter(request.infer(feeds()).values())).copy()
    monkeypatch.setattr(openvino_backend, "compile_graph", None)
    np.testing.assert_array_equal(answer(built), expected)


def test_verification_holds_where_the_whole_engine_is_opened_from_its_form(
    mini_engines: Callable[[str], Path], mini_reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mini_engines("openvino")
    monkeypatch.setattr(openvino_backend, "compile_graph", None)
    checked = CheckedEngine(OPENVINO, engine_info(folder).options, folder)
    errors = check_end_to_end(checked, load_reference(mini_reference)[0])
    assert max(error.max() for error in errors) < 1e-3


def test_a_batch_that_has_no_form_is_compiled(engine: Path) -> None:
    assert len(answer(engine, 3)) == 3


def test_a_form_takes_the_weights_from_the_file_beside_the_graph(workspace: Path) -> None:
    engine = workspace / "engines" / "openvino"
    data, (form,) = engine / f"{LOWERED}.data", forms(engine)
    inputs, options = emoji_feeds(), engine_info(engine).options

    def found() -> np.ndarray:
        with OPENVINO.open(engine, options) as runner:
            return next(iter(runner.infer(inputs).values()))

    opened = found()
    content = form.read_bytes()
    form.unlink()
    np.testing.assert_array_equal(opened, found())
    form.write_bytes(content)
    data.write_bytes(bytes(data.stat().st_size))
    assert not np.array_equal(opened, found())


def test_a_form_that_holds_the_weights_gives_the_same_bits_and_needs_no_other_file(
    workspace: Path,
) -> None:
    engine = workspace / "engines" / "openvino"
    inputs = emoji_feeds()
    with OPENVINO.open(engine, engine_info(engine).options) as runner:
        expected = next(iter(runner.infer(inputs).values()))
    small = forms(engine)[0].stat().st_size
    qd.build_engine(workspace, compiled_weights=True)
    (form,) = forms(engine)
    data = engine / f"{LOWERED}.data"
    assert form.stat().st_size > small + data.stat().st_size
    data.write_bytes(bytes(data.stat().st_size))
    with OPENVINO.open(engine, engine_info(engine).options) as runner:
        np.testing.assert_array_equal(next(iter(runner.infer(inputs).values())), expected)


def test_every_form_is_hashed_and_a_changed_one_refused(engine: Path) -> None:
    (form,) = forms(engine)
    assert form.name in engine_info(engine).files
    flip_byte(form)
    with refused(form):
        answer(engine)


def test_on_another_processor_the_graph_is_compiled_and_a_line_says_so(
    engine: Path, elsewhere: None, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answer_without_forms(engine)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(answer(engine), expected)
    (line,) = [x.getMessage() for x in caplog.records if x.name == blobs.__name__]
    assert "build-engine" in line


def answer_without_forms(folder: Path) -> np.ndarray:
    lone = folder.with_name("lone")
    shutil.copytree(folder, lone)
    for form in forms(lone):
        form.unlink()
    with OPENVINO.open(lone, engine_info(folder).options) as runner:
        return next(iter(runner.infer(feeds()).values()))


def test_a_form_that_the_runtime_cannot_read_is_compiled_instead_and_a_line_says_so(
    engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (form,) = forms(engine)
    form.write_bytes(b"no compiled model")
    with caplog.at_level(logging.WARNING), OPENVINO.open(engine, engine_info(engine).options) as x:
        found = next(iter(x.infer(feeds()).values()))
    np.testing.assert_array_equal(found, answer_without_forms(engine))
    assert any(str(form) in x.getMessage() for x in caplog.records)


def test_a_form_that_gives_other_bits_is_not_kept(
    mini_proto: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(blobs, "_same", lambda ours, theirs: False)
    with caplog.at_level(logging.WARNING):
        build_engine(
            OPENVINO, ir.from_proto(mini_proto), tmp_path, EngineOptions(threads=1), "cd" * 32
        )
    assert not forms(tmp_path)
    assert any(x.name == blobs.__name__ for x in caplog.records)


def test_none_are_kept_where_none_are_asked_for_and_sizes_leave_them_out(
    mini_proto: onnx.ModelProto, engine: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "none"
    folder.mkdir()
    options = EngineOptions(threads=1, compiled_batch=())
    build_engine(OPENVINO, ir.from_proto(mini_proto), folder, options, "cd" * 32)
    assert not forms(folder)
    assert file_bytes(folder) == file_bytes(engine)


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
