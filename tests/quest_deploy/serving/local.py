"""A package's pipeline without a server: its models on onnxruntime, called as Triton would call
them. Import by its full name.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from quest_deploy.serving.triton.layout import MODELS
from quest_deploy.serving.triton.plans import FLOAT_INPUTS

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    Arrays = dict[str, np.ndarray]


def load_generation(package: Path) -> ModuleType:
    """The package's ``generation.py`` as a module."""
    spec = importlib.util.spec_from_file_location(
        "generation", package / MODELS / "pipeline" / "1" / "generation.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["generation"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class LocalPipeline:
    """Draws what ``pipeline`` draws.

    Args:
        half: whether the models' float inputs and outputs are rounded to float16, as where they are
            configured so.
    """

    def __init__(
        self, package: Path, *, max_steps: int = 100, max_size: int = 64, half: bool = False
    ) -> None:
        self.generation = load_generation(package)
        limits = self.generation.Limits(max_steps, max_size)
        self.generator = self.generation.Generator(package / MODELS / "pipeline" / "1", limits)
        self._package, self._half = package, half
        self._sessions: dict[str, ort.InferenceSession] = {}

    def draw(self, **request: Any) -> np.ndarray:
        """The image, uint8 [H, W, C]."""
        types = self.generation.DTYPES
        inputs = {name: np.asarray([[value]], types[name]) for name, value in request.items()}
        (job,) = self.generator.jobs(inputs)
        image: np.ndarray = asyncio.run(
            self.generator.draw(job, self.infer, lambda done, total: None)
        )
        return image

    async def infer(self, model: str, inputs: Arrays) -> Arrays:
        """Run a model of the package."""
        path = self._package / MODELS / model / "1" / "model.onnx"
        if model not in self._sessions:
            self._sessions[model] = self._session(path)
        session = self._sessions[model]
        ranks = {value.name: len(value.shape) for value in session.get_inputs()}
        rounded = {
            name: value if name in FLOAT_INPUTS else self._rounded(value)
            for name, value in inputs.items()
        }
        feeds = {name: value.reshape(value.shape[: ranks[name]]) for name, value in rounded.items()}
        outputs = session.run(None, feeds)
        return {
            value.name: self._rounded(output)
            for value, output in zip(session.get_outputs(), outputs, strict=True)
        }

    def _session(self, path: Path) -> ort.InferenceSession:
        """As the stand-in of ``backends_cpu`` opens it."""
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        settings.add_session_config_entry("session.qdqisint8allowed", "1")
        return ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])

    def _rounded(self, value: np.ndarray) -> np.ndarray:
        return (
            value.astype(np.float16).astype(np.float32)
            if self._half and value.dtype == np.float32
            else value
        )
