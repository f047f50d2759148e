from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.exactness import EXACT_ANYWHERE, kernel_needs
from quest_deploy.backends import exactness
from quest_deploy.serving.triton.models import lower_network
from tests.helpers import WITH_VNNI, refused
from tests.quest_deploy.processors.packages import RefusedError, stand_in


def lowered(model: ir.Model, folder: Path, processor: str) -> ir.Model:
    """The UNet's graph as a package made with ``processor`` has it; what belongs to it is written
    into ``folder``.
    """
    folder.mkdir(exist_ok=True)
    return lower_network(model, folder, processor)


@pytest.mark.parametrize("processor", ["native", "any"])
def test_a_packages_cpu_half_loads_here_and_is_refused_where_its_products_saturate(
    mini_proto: onnx.ModelProto, tmp_path: Path, processor: str
) -> None:
    loaded = stand_in()
    lowered(ir.from_proto(mini_proto), tmp_path, processor)
    loaded._check_processor(tmp_path)
    with np.load(tmp_path / "probe.npz") as arrays:
        saturated = {
            name: np.clip(x, -(2**15), 2**15 - 1) if name.startswith("exact.") else x
            for name, x in arrays.items()
        }
    np.savez(tmp_path / "probe.npz", **saturated)
    with pytest.raises(RefusedError):
        loaded._check_processor(tmp_path)


def test_a_package_for_any_processor_needs_only_what_holds_on_each(
    mini_proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exactness, "measured", lambda _: WITH_VNNI)
    assert EXACT_ANYWHERE.short_of(
        kernel_needs(lowered(ir.from_proto(mini_proto), tmp_path / "native", "native"))
    )
    assert not EXACT_ANYWHERE.short_of(
        kernel_needs(lowered(ir.from_proto(mini_proto), tmp_path / "any", "any"))
    )


def test_without_onnxruntime_a_package_is_refused_and_the_extra_named(
    mini_proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exactness.measured.cache_clear()
    monkeypatch.setattr(exactness.metadata, "version", mock.Mock(side_effect=PackageNotFoundError))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with refused("onnxruntime"):
        lowered(ir.from_proto(mini_proto), tmp_path, "native")
