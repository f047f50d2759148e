from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.importers.settings import ImportSettings, Source
from tests.helpers import refused

ALL = {
    "timesteps": [900, 100],
    "weight_bits": 4,
    "activation_bits": 4,
    "first_last_bits": 8,
    "softmax_bits": 16,
    "symmetric": False,
}


@pytest.mark.parametrize("name", ALL)
def test_nothing_that_the_file_does_not_say_is_guessed(name: str) -> None:
    given = {**ALL, name: None}
    with refused(f"--{name.replace('_', '-')}"):
        ImportSettings.gather(Source.QUEST, given, None)


def test_options_go_before_a_side_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({**ALL, "weight_bits": 8}))
    settings = ImportSettings.gather(Source.QUEST, {"activation_bits": 8, "symmetric": None}, path)
    assert (settings.weight_bits, settings.activation_bits, settings.timesteps) == (
        8,
        8,
        (900.0, 100.0),
    )
    path.write_text(json.dumps({**ALL, "wait_bits": 8}))
    with refused("wait_bits"):
        ImportSettings.gather(Source.QUEST, {}, path)


@pytest.mark.parametrize(
    ("source", "change", "facts"),
    [
        (Source.QUEST, {"timesteps": [100, 900]}, "timesteps 100.0 900.0"),
        (Source.QUEST, {"timesteps": [900, 900]}, "timesteps 900.0"),
        (Source.QUEST, {"timesteps": []}, "timesteps quest"),
        (Source.QDIFF, {}, "timesteps qdiff"),
        (Source.QUEST, {"timesteps": ["a"]}, "timesteps"),
        (Source.QUEST, {"timesteps": [10**400, 5]}, "timesteps"),
        (Source.QUEST, {"timesteps": [float("nan"), 5]}, "timesteps"),
        (Source.QUEST, {"timesteps": [900, -5]}, "timesteps"),
        (Source.QUEST, {"weight_bits": 3}, "weight_bits"),
        (Source.QUEST, {"symmetric": 1}, "symmetric"),
        (Source.QUEST, {"context_tokens": 0}, "context_tokens"),
    ],
)
def test_wrong_settings_are_refused(source: Source, change: dict[str, Any], facts: str) -> None:
    with refused(*facts.split()):
        ImportSettings.gather(source, {**ALL, **change}, None)


@pytest.mark.parametrize(
    ("quantizer", "symmetric", "expected"),
    [
        ("middle_block.0.in_layers.2.act_quantizer", False, (0, 15)),
        ("middle_block.0.in_layers.2.act_quantizer", True, (-8, 7)),
        ("input_blocks.0.0.act_quantizer", False, (0, 255)),
        ("out.2.act_quantizer", True, (-257, 256)),
        ("a.attn1.act_quantizer_w", False, (0, 65535)),
        ("a.attn1.act_quantizer_w", True, (-32768, 32767)),
        ("a.attention.smv_matmul.act_quantizer_w", True, (0, 65535)),
    ],
)
def test_clamps_are_the_official_ones_even_where_those_are_odd(
    quantizer: str, symmetric: bool, expected: tuple[int, int]
) -> None:
    assert (
        ImportSettings.gather(Source.QUEST, {**ALL, "symmetric": symmetric}, None).code_range(
            quantizer
        )
        == expected
    )


@pytest.mark.parametrize(
    ("source", "expected"), [(Source.QUEST, (-257, 256)), (Source.QDIFF, (-128, 127))]
)
def test_quest_overrides_the_first_layers_levels_even_at_the_same_bits(
    source: Source, expected: tuple[int, int]
) -> None:
    timesteps = ALL["timesteps"] if source is Source.QUEST else ()
    given = {**ALL, "timesteps": timesteps, "activation_bits": 8, "symmetric": True}
    assert (
        ImportSettings.gather(source, given, None).code_range("input_blocks.0.0.act_quantizer")
        == expected
    )
