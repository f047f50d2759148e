from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

import exporters.exactness
from exporters.exactness import EXACT_ANYWHERE, LEVELS, Exactness, kernel_needs
from quest_deploy.backends import exactness
from quest_deploy.serving.triton.package import FILES, TritonOptions, Writer

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

WITH_VNNI = Exactness(dict.fromkeys(EXACT_ANYWHERE.levels, LEVELS[0]))


class RefusedError(Exception):
    """Triton's own, which it reports when a model fails to load."""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in for Triton's TensorRT backend, as a module."""
    utils = ModuleType("triton_python_backend_utils")
    utils.TritonModelException = RefusedError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    spec = importlib.util.spec_from_file_location(
        "stand_in", FILES / "backends_cpu" / "tensorrt" / "model.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lowered(proto: onnx.ModelProto, folder: Path, processor: str) -> ir.Model:
    """The UNet's graph as a package made with ``processor`` has it; what belongs to it is written
    into ``folder``.
    """
    writer: Any = SimpleNamespace(
        options=TritonOptions(processor=processor), _version_folder=lambda _: folder
    )
    folder.mkdir(exist_ok=True)
    return Writer._lowered(writer, ir.from_proto(proto))


def test_a_package_is_refused_where_its_products_saturate(
    mini_proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Any
) -> None:
    monkeypatch.setattr(
        exporters.exactness, "EXACT_ANYWHERE", Exactness()
    )  # so that there is a probe on every processor
    lowered(mini_proto, tmp_path, "native")
    stand_in._check_processor(tmp_path)
    with np.load(tmp_path / "probe.npz") as arrays:
        saturated = {
            name: np.clip(x, -(2**15), 2**15 - 1) if name.startswith("exact.") else x
            for name, x in arrays.items()
        }
    np.savez(tmp_path / "probe.npz", **saturated)
    with pytest.raises(RefusedError, match="--processor any"):
        stand_in._check_processor(tmp_path)


def test_a_package_for_any_processor_is_exact_on_each_and_asks_none(
    mini_proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Any
) -> None:
    monkeypatch.setattr(exactness, "measured", lambda _: WITH_VNNI)
    assert EXACT_ANYWHERE.short_of(kernel_needs(lowered(mini_proto, tmp_path / "native", "native")))
    assert not EXACT_ANYWHERE.short_of(kernel_needs(lowered(mini_proto, tmp_path / "any", "any")))
    assert not (tmp_path / "any" / "probe.onnx").exists()
    stand_in._check_processor(tmp_path / "any")
