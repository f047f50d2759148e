"""What the words after `quest-deploy build-engine`'s options mean."""

from __future__ import annotations

from quest_deploy.backends.options import parse_budget, parse_pool_limit, parse_tactic_sources


def test_sizes_are_bytes_or_units_of_1024() -> None:
    assert [parse_budget(text) for text in ("0", "700", "3K", "5M", "2G")] == [
        0,
        700,
        3 * 2**10,
        5 * 2**20,
        2 * 2**30,
    ]
    assert parse_pool_limit("workspace:2G") == 2 * 2**30


def test_tactic_sources_are_names_each_once_or_none() -> None:
    assert parse_tactic_sources(
        ["jit_convolutions", "edge_mask_convolutions", "jit_convolutions"]
    ) == ("jit_convolutions", "edge_mask_convolutions")
    assert parse_tactic_sources(["none"]) == ()
