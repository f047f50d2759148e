from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.stages.evaluate import captions_of


@pytest.mark.parametrize(
    ("name", "prompts", "captions"),
    [
        ("sd", ["a cat", "a dog"], ["a dog", "a cat", "a cat"]),
        ("class-tokens", None, ["1", "0", "2"]),
        ("class-labels", None, ["1", "0", "2"]),
        ("ldm", None, ["", "", ""]),
    ],
)
def test_an_image_is_captioned_with_its_prompt_its_label_or_nothing(
    pipelines: Callable[[str], Path], name: str, prompts: list[str] | None, captions: list[str]
) -> None:
    model = load_model(resolve_source(str(pipelines(name))), prompts)
    # Where a model edits more images than there are prompts, these come again.
    assert captions_of(model, np.asarray([1, 0, 2])) == captions
