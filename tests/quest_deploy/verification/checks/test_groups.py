from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from quest_deploy.verification.checks.engine import CheckedEngine

READS = {"a": {"x": "key x"}, "b": {"y": "key y"}, "c": {"x": "key x"}, "d": {"z": "key z"}}
GIVES = {"a": "u", "b": "v", "c": "w", "d": "t"}


def groups(
    records: dict[str, tuple[int, ...]],
    reads: dict[str, dict[str, str]] = READS,
    gives: dict[str, str] = GIVES,
    *,
    compiles_as_it_opens: bool = True,
) -> list[list[str]]:
    engine: Any = SimpleNamespace(backend=SimpleNamespace(compile_only_checks=compiles_as_it_opens))
    held: Any = {name: dict.fromkeys(numbers) for name, numbers in records.items()}
    return CheckedEngine.groups(engine, held, reads.__getitem__, gives.__getitem__)


def test_what_the_same_records_hold_is_one_cut() -> None:
    held = {"a": (0, 1), "b": (0,), "c": (0, 1), "d": (0,)}
    assert groups(held) == [["a", "c"], ["b", "d"]]


@pytest.mark.parametrize("first", ["a", "b"])
def test_what_reads_the_value_that_another_gives_is_another_cut(first: str) -> None:
    held = {first: (0,), "b" if first == "a" else "a": (0,)}
    assert len(groups(held, READS | {"b": {"u": "key u"}})) == 2


def test_what_reads_another_tensor_of_the_reference_as_the_same_value_is_another_cut() -> None:
    held = {"a": (0,), "b": (0,)}
    assert groups(held, READS | {"b": {"x": "key y"}}) == [["a"], ["b"]]


def test_what_gives_the_same_value_is_another_cut() -> None:
    assert groups({"a": (0,), "b": (0,)}, gives=GIVES | {"b": "u"}) == [["a"], ["b"]]


def test_each_is_a_cut_of_its_own_where_the_backend_builds_ahead() -> None:
    assert groups({"a": (0,), "c": (0,)}, compiles_as_it_opens=False) == [["a"], ["c"]]
