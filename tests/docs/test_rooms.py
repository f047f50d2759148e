"""scripts/docs/architecture.py: the rooms and their imports, read from the code."""

from __future__ import annotations

import sys
from graphlib import CycleError
from pathlib import Path

import pytest

from scripts.docs import architecture


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages of the real ones' names, which Python finds first."""
    monkeypatch.syspath_prepend(tmp_path)
    for package in ("exporters", "quest_deploy"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    for name, text in {
        "exporters/__init__.py": '"""Graphs."""\nfrom quest_deploy.low import x\n',
        "quest_deploy/__init__.py": "from quest_deploy.high import y\n",
        "quest_deploy/high/__init__.py": "",
        "quest_deploy/high/a.py": "import exporters.b\n\ndef f():\n    from quest_deploy import low\n",
        "quest_deploy/low/__init__.py": "if TYPE_CHECKING:\n    from quest_deploy.high import a\n",
        "quest_deploy/alone.py": "import numpy\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_imports_in_functions_count_and_those_for_types_do_not(tree: Path) -> None:
    assert architecture.read_imports() == {
        "alone": set(),
        "exporters": {"low"},
        "high": {"exporters", "low"},
        "low": set(),
    }


def test_a_room_stands_above_what_it_imports_and_implied_arrows_are_left_out(tree: Path) -> None:
    graph = architecture.read_imports()
    assert architecture.floors_of(graph) == {"alone": 0, "low": 0, "exporters": 1, "high": 2}
    assert architecture.without_implied(graph)["high"] == {"exporters"}


def test_rooms_that_import_each_other_have_no_floors(tree: Path) -> None:
    (tree / "quest_deploy" / "low" / "b.py").write_text("from quest_deploy.high.a import f\n")
    with pytest.raises(CycleError):
        architecture.picture(architecture.read_imports())


def test_an_arrow_over_several_floors_passes_between_the_rooms() -> None:
    graph = {"top": {"middle", "far"}, "middle": {"low"}, "low": set(), "far": set()}
    layers, pieces = architecture.layers_of(graph)
    assert layers == [["top"], ["middle", "top>far>1"], ["far", "low"]]
    assert ("top", "top>far>1") in pieces
    assert ("top>far>1", "far") in pieces


def test_the_page_and_its_picture_are_up_to_date() -> None:
    """`make docs-pages` writes them."""
    rooms = architecture.read_imports()
    assert architecture.PICTURE.read_text() == architecture.picture(rooms)
    text = architecture.PAGE.read_text()
    assert text == architecture.page(rooms, text)
    assert "| `quest_deploy/cli/` | " in text
