"""Reads a page as a browser's parser has it, for the tests of the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = frozenset({"br", "col", "img", "input", "link", "meta", "wbr"})


@dataclass(eq=False, repr=False)
class Element:
    """A tag with its attributes, its parents' tags, and the text inside."""

    tag: str
    attributes: dict[str, str]
    parents: tuple[Element, ...]
    pieces: list[str]
    first: int
    end: int = 0

    @property
    def id(self) -> str | None:
        return self.attributes.get("id")

    @property
    def text(self) -> str:
        return "".join(self.pieces[self.first : self.end])


@dataclass(eq=False, repr=False)
class Page(HTMLParser):
    """All elements of a page in order; raises AssertionError where a tag is not closed."""

    content: str
    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[Element] = []
        self._pieces: list[str] = []  # all text of the page
        self.feed(self.content)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(
            tag, {k: v or "" for k, v in attrs}, tuple(self._open), self._pieces, len(self._pieces)
        )
        assert len(element.attributes) == len(attrs), (tag, attrs)
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        element = self._open.pop()
        assert element.tag == tag, (element.tag, tag, self.getpos())
        element.end = len(self._pieces)

    def handle_data(self, data: str) -> None:
        self._pieces.append(data)

    def all(self, *tags: str) -> list[Element]:
        """The elements of these tags, in order."""
        return [element for element in self.elements if element.tag in tags]

    def section(self, name: str) -> str:
        """A section's text."""
        (found,) = (each for each in self.all("section") if each.id == name)
        return " ".join(found.text.split())

    def data(self, section: str) -> list[Any]:
        """The JSON values that a section holds for the script."""
        return [
            json.loads(script.text)
            for script in self.all("script")
            if script.attributes.get("type") == "application/json"
            and section in [each.id for each in script.parents]
        ]
