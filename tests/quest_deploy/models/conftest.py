from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from quest_deploy.models.loading import load_model, resolve_source

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from quest_deploy.models.pipeline_model import PipelineModel


@pytest.fixture
def models(pipelines: Callable[[str], Path]) -> Callable[[str], PipelineModel]:
    return lambda name: load_model(resolve_source(str(pipelines(name))))


@pytest.fixture
def changed(pipelines: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a small pipeline, one of its files changed."""

    def copied(name: str, file: str, **changes: Any) -> Path:
        folder = shutil.copytree(pipelines(name), tmp_path / name, dirs_exist_ok=True)
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    return copied
