from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from quest_deploy.finetuning.layer_sets import LAYER_SETS, select_layers
from tests.helpers import refused

if TYPE_CHECKING:
    from quest_deploy.artifacts.checkpoint import Checkpoint
    from quest_deploy.models.pipeline_model import PipelineModel

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize("family", LAYER_SETS)
def test_the_temporal_layers_are_the_time_embedding_projections(
    mini_checkpoint: Checkpoint, family: str
) -> None:
    chosen = select_layers(mini_checkpoint.layers, LAYER_SETS[family].temporal)
    assert set(chosen) == {
        name for name in mini_checkpoint.layers if name.endswith("time_emb_proj")
    }
    assert chosen


@pytest.mark.parametrize(
    ("family", "included", "excluded"),
    [
        ("unconditional", ["attn1.to_q", "attn1.to_k", "attn1.to_v"], ["ff.net.2"]),
        (
            "class-conditional",
            ["ff.net.0.proj", "ff.net.2", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q"],
            [],
        ),
        ("text-to-image", ["ff.net.0.proj", "ff.net.2"], ["attn1.to_q", "attn2.to_q"]),
    ],
)
def test_the_sensitive_layers_are_those_of_quests_table(
    mini_checkpoint: Checkpoint, family: str, included: list[str], excluded: list[str]
) -> None:
    chosen = set(select_layers(mini_checkpoint.layers, LAYER_SETS[family].sensitive))
    assert {f"{BLOCK}.{name}" for name in included} <= chosen
    assert not chosen & {f"{BLOCK}.{name}" for name in excluded}
    assert not chosen & {
        "conv_in",
        "conv_out",
        "time_embedding.linear_1",
        "down_blocks.0.resnets.0.conv1",
    }


@pytest.mark.parametrize("family", LAYER_SETS)
def test_no_layer_is_in_both_sets(mini_checkpoint: Checkpoint, family: str) -> None:
    temporal, sensitive = (
        select_layers(mini_checkpoint.layers, p)
        for p in (LAYER_SETS[family].temporal, LAYER_SETS[family].sensitive)
    )
    assert not set(temporal) & set(sensitive)


def test_chosen_layers_keep_their_order() -> None:
    assert select_layers(["b.to_q", "c", "a.to_q"], ("*.to_q",)) == ("b.to_q", "a.to_q")


def test_patterns_that_match_nothing_are_an_input_error() -> None:
    with refused("*.to_q"):
        select_layers(["conv_in"], ("*.to_q",))


def test_the_embedded_models_family_has_layer_sets(emoji: PipelineModel) -> None:
    assert emoji.family in LAYER_SETS


def test_where_none_of_the_default_patterns_matches_it_is_said_that_all_are_trained(
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = ("conv_in", "conv_out")
    assert select_layers(names, ("*.to_q", "*.to_k"), or_all=True) == names
    assert [(x.levelname, *x.args) for x in caplog.records] == [("WARNING", "*.to_q, *.to_k", 2)]
