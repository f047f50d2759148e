from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from exporters.exactness import EXACT_ANYWHERE, SAFE, Exactness
from quest_deploy.backends import exactness
from quest_deploy.backends.base import build_engine, engine_info, open_engine
from quest_deploy.backends.cpu import CpuBackend
from quest_deploy.backends.options import ANY_PROCESSOR, EngineOptions
from quest_deploy.backends.registry import get_backend
from tests.helpers import WITH_VNNI, refused, reseal

CPU_BACKENDS = ("onnxruntime", "openvino")
each_cpu = pytest.mark.parametrize("backend", CPU_BACKENDS)


@pytest.fixture
def build(
    mini_proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Builds the mini model's engine on a machine that gives these answers."""

    def built(backend: str, answers: Exactness, **options: str) -> Path:
        monkeypatch.setattr(exactness, "measured", lambda _: answers)
        folder = tmp_path / backend
        folder.mkdir()
        build_engine(
            get_backend(backend),
            ir.from_proto(mini_proto),
            folder,
            EngineOptions(threads=1, **options),
            "cd" * 32,
        )  # type: ignore[arg-type]
        return folder

    return built


@each_cpu
def test_an_engine_is_refused_where_its_products_saturate_with_the_command_that_builds_it_again(
    backend: str, build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(backend, WITH_VNNI)
    assert EXACT_ANYWHERE.short_of(engine_info(folder).kernels or {})
    open_engine(get_backend(backend), folder).close()
    monkeypatch.setattr(exactness, "processor_name", lambda: "another processor")
    monkeypatch.setattr(exactness, "measured", lambda _: EXACT_ANYWHERE)
    with refused(f"build-engine --backend {backend}"):
        open_engine(get_backend(backend), folder)


@each_cpu
def test_an_engine_for_any_processor_opens_where_signed_products_saturate(
    backend: str, build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(backend, WITH_VNNI, processor=ANY_PROCESSOR)
    monkeypatch.setattr(exactness, "measured", lambda _: EXACT_ANYWHERE)
    open_engine(get_backend(backend), folder).close()


@each_cpu
def test_an_engine_for_any_processor_is_refused_where_even_small_weights_are_inexact(
    backend: str, build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(backend, WITH_VNNI, processor=ANY_PROCESSOR)
    monkeypatch.setattr(exactness, "measured", lambda _: Exactness())
    with refused(f"build-engine --backend {backend}"):
        open_engine(get_backend(backend), folder)


@each_cpu
def test_the_record_holds_what_the_machine_answered(
    backend: str, build: Callable[..., Path]
) -> None:
    assert engine_info(build(backend, WITH_VNNI)).exact_integers == WITH_VNNI.levels


@each_cpu
def test_an_engine_whose_record_does_not_say_what_it_needs_is_refused(
    backend: str, build: Callable[..., Path]
) -> None:
    folder = build(backend, WITH_VNNI)
    reseal(folder / "engine.json", lambda content: content.pop("kernels"))
    with refused("build-engine"):
        open_engine(get_backend(backend), folder)


def test_a_gpus_engine_depends_on_no_answer_and_takes_no_processor() -> None:
    for name in ("tensorrt", "tensorrt-rtx"):
        assert get_backend(name).answers(EngineOptions()) == {}
        with refused("--processor"):
            get_backend(name).check_options(EngineOptions(processor=ANY_PROCESSOR))
    assert get_backend("onnxruntime").answers(EngineOptions(provider="cuda")) == {
        "exact_integers": {}
    }


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that were asked, in order; the answers are kept in ``tmp_path``."""
    calls: list[str] = []

    def answer(backend: CpuBackend) -> Exactness:
        calls.append(backend.name)
        return Exactness({"linear uint8 x int8": SAFE})

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(exactness, "ask", answer)
    exactness.measured.cache_clear()
    yield calls
    exactness.measured.cache_clear()


def again(backend: str) -> Exactness:
    """What another process would find."""
    exactness.measured.cache_clear()
    runtime = get_backend(backend)
    assert isinstance(runtime, CpuBackend)
    return exactness.measured(runtime)


def test_an_answer_is_kept_by_runtime_and_asked_again_for_another_version_or_instruction_set(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert again("openvino").levels == again("openvino").levels == {"linear uint8 x int8": SAFE}
    assert asked == ["openvino"]
    again("onnxruntime")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    again("openvino")
    monkeypatch.setattr(exactness.metadata, "version", lambda _: "0.0")
    again("openvino")
    monkeypatch.setattr(exactness, "cpu_flags", lambda: ("avx2",))
    again("openvino")
    monkeypatch.setattr(exactness, "_told_by_cpuid", list)
    again("openvino")
    monkeypatch.setattr(exactness, "_exporters_digest", lambda: "another probe")
    again("openvino")
    assert asked == ["openvino", "onnxruntime", *["openvino"] * 5]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"key": 3}',
        '{"key": {}}',
        '{"key": {"a": []}}',
        '{"key": {"a": 127.0}}',
        json.dumps({"key": {"linear": 1000}}),
    ],
)
def test_a_damaged_answer_is_asked_again(asked: list[str], tmp_path: Path, content: str) -> None:
    again("openvino")
    (file,) = (tmp_path / "quest-deploy").iterdir()
    file.write_text(content.replace("key", next(iter(json.loads(file.read_text())))))
    assert again("openvino").levels == {"linear uint8 x int8": SAFE}
    assert asked == ["openvino", "openvino"]


def test_where_nothing_can_be_kept_every_process_asks(asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "quest-deploy").write_text("a file in the folder's place")
    again("openvino")
    again("openvino")
    assert asked == ["openvino", "openvino"]
