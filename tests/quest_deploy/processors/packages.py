"""Run in a process of its own, on whatever processor it sees: loads the models of Triton packages
as their CPU half does, and prints which it refuses, and what onnxruntime computes exactly by the
answers that are kept, as JSON.

    python tests/quest_deploy/processors/packages.py FOLDER...
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from quest_deploy.backends.exactness import measured
from quest_deploy.backends.registry import get_backend
from quest_deploy.serving.triton.layout import FILES


class RefusedError(Exception):
    """Triton's own, which it reports when a model fails to load."""


def stand_in() -> Any:
    """The stand-in for Triton's TensorRT backend, as a module."""
    utils = ModuleType("triton_python_backend_utils")
    utils.TritonModelException = RefusedError  # type: ignore[attr-defined]
    sys.modules["triton_python_backend_utils"] = utils
    path = FILES / "backends_cpu" / "tensorrt" / "model.py"
    spec = importlib.util.spec_from_file_location("stand_in", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(folders: list[Path]) -> dict[str, Any]:
    """The names of the refused folders, and the levels by kernel."""
    refused = []
    for folder in folders:
        try:
            stand_in()._check_processor(folder)
        except RefusedError:
            refused.append(folder.name)
    levels = measured(get_backend("onnxruntime")).levels  # type: ignore[arg-type]
    return {"refused": refused, "levels": dict(levels)}


if __name__ == "__main__":
    print(json.dumps(main([Path(argument) for argument in sys.argv[1:]])))
