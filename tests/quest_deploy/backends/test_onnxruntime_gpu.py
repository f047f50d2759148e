"""onnxruntime's GPU providers, where the package, its libraries and the GPU are made up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from exporters.graph_info import save_graph
from exporters.passes.remove_quantization import RemoveQuantization
from quest_deploy.backends.onnxruntime import (
    load_gpu_libraries,
    missing_library,
    open_session,
    providers_of,
)
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.errors import QuestDeployError
from tests.helpers import refused

GPU_PROVIDERS = ("cuda", "tensorrt")
each_provider = pytest.mark.parametrize("provider", GPU_PROVIDERS)


def shared_library(path: Path, *linked: Path) -> Path:
    """An empty one, which needs the ``linked``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f"-Wl,--no-as-needed,-soname,{path.name}"
    needed = [f"{place}" for place in linked]
    source = ["-x", "c", "/dev/null", "-x", "none"]
    subprocess.run(["gcc", "-shared", "-fPIC", name, *source, *needed, "-o", path], check=True)
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """onnxruntime-gpu's folder, whose providers are linked with libraries that are not here, on a
    machine with a GPU.
    """
    for provider, needs in (("cuda", "libcublasLt.so.13"), ("tensorrt", "libnvinfer.so.10")):
        needed = shared_library(tmp_path / "elsewhere" / needs)
        place = tmp_path / "onnxruntime" / "capi" / f"libonnxruntime_providers_{provider}.so"
        shared_library(place, needed)
        needed.unlink()
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    monkeypatch.setattr("onnxruntime.__file__", str(tmp_path / "onnxruntime" / "__init__.py"))
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    load_gpu_libraries.cache_clear()
    return tmp_path / "onnxruntime"


@pytest.mark.parametrize(
    ("provider", "facts"),
    [
        ("cuda", ("libcublasLt.so.13", "'quest-deploy[gpu]'")),
        ("tensorrt", ("libnvinfer.so.10", "'tensorrt<11'")),
    ],
)
def test_a_provider_whose_libraries_are_missing_is_refused_by_their_name(
    package: Path, provider: str, facts: tuple[str, ...]
) -> None:
    with refused(provider, *facts):
        get_backend("onnxruntime").check_run(EngineOptions(provider=provider))
    shared_library(package / "capi" / f"libonnxruntime_providers_{provider}.so")
    get_backend("onnxruntime").check_run(EngineOptions(provider=provider))


@each_provider
def test_a_provider_of_a_gpu_is_refused_where_there_is_none(
    package: Path, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_count", lambda: 0)
    with refused(f"--provider {provider}", "GPU"):
        get_backend("onnxruntime").check_run(EngineOptions(provider=provider))


@each_provider
def test_libraries_that_python_packages_bring_are_loaded_first_and_nothing_is_printed(
    package: Path,
    provider: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tensorrt.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: print("Failed to load libcufft.so.12"))
    for _ in range(2):
        missing_library(provider)
    assert ("tensorrt" in sys.modules) == (provider == "tensorrt")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("libcufft.so.12") == 1
    sys.modules.pop("tensorrt", None)


def test_tensorrt_is_told_of_the_types_that_the_graph_has(
    mini_proto: onnx.ModelProto, tmp_path: Path
) -> None:
    model = ir.from_proto(mini_proto)
    save_graph(
        get_backend("onnxruntime").lower(model, EngineOptions(provider="cuda")),
        tmp_path / "int8.onnx",
    )
    floats = ir.from_proto(mini_proto)
    RemoveQuantization()(floats)
    save_graph(floats, tmp_path / "float.onnx")
    for name, dtype, types in (
        ("int8", "fp16", ("int8", "fp16")),
        ("int8", "fp32", ("int8",)),
        ("float", "bf16", ("bf16",)),
    ):
        options = EngineOptions(provider="tensorrt", dtype=dtype)
        (first, settings), (second, rest) = providers_of(tmp_path / f"{name}.onnx", options)
        assert (first, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
        assert [kind for kind, on in settings.items() if on == "1"] == [
            f"trt_{kind}_enable" for kind in types
        ]
        assert rest["use_tf32"] == "0"


@each_provider
def test_a_session_that_a_gpu_refuses_does_not_run_on_the_cpu_instead(
    provider: str,
    mini_proto: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import onnxruntime

    create = onnxruntime.InferenceSession._create_inference_session

    def refuse(session: onnxruntime.InferenceSession, providers: list[str], *rest: object) -> None:
        if "CPUExecutionProvider" not in providers:
            raise RuntimeError("no kernel image is available")
        create(session, providers, *rest)

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", refuse)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    model = get_backend("onnxruntime").lower(ir.from_proto(mini_proto), EngineOptions())
    save_graph(model, tmp_path / "lowered.onnx")
    with refused("no kernel image is available", error=QuestDeployError):
        open_session(tmp_path / "lowered.onnx", EngineOptions(provider=provider))
    assert capsys.readouterr().out == ""
