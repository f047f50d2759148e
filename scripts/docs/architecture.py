"""Draws docs/architecture.svg from the code's imports, and writes the table of rooms in
docs/architecture.md from their docstrings.

A room is a package of quest_deploy/, a module beside them, or exporters/. Imports inside functions
count, imports for type checking do not. A room stands one floor above the highest room that it
imports. An arrow that follows from others (a imports b, b imports c, a imports c) is left out.

    python scripts/docs/architecture.py
"""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

from grimp import build_graph

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = PAGE.with_suffix(".svg")
WIDTH, BOX_WIDTH, BOX_HEIGHT, FLOOR = 960, 130, 36, 80
"""Pixels: the picture, a room, and from one floor to the next."""

Graph = dict[str, set[str]]
"""The rooms that each room imports."""


def read_imports() -> Graph:
    """Which rooms each room imports, itself left out; those on Python's path."""
    code = build_graph(
        "quest_deploy", "exporters", exclude_type_checking_imports=True, cache_dir=None
    )
    modules = code.find_children("quest_deploy") - {"quest_deploy.__main__"} | {"exporters"}
    for module in modules:
        code.squash_module(module)
    return {
        _room(module): {
            _room(below)
            for below in modules & code.find_modules_directly_imported_by(module) - {module}
        }
        for module in modules
    }


def _room(module: str) -> str:
    return module.removeprefix("quest_deploy.")


def source_of(room: str) -> Path:
    """The file whose docstring says what a room holds."""
    path = ROOT / room if room == "exporters" else ROOT / "quest_deploy" / room
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def floors_of(graph: Graph) -> dict[str, int]:
    """The floor of each room, 0 at the bottom; raise CycleError where rooms import each other."""
    floors: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        floors[room] = 1 + max((floors[below] for below in graph[room]), default=-1)
    return floors


def without_implied(graph: Graph) -> Graph:
    """The graph without the arrows that follow from others."""
    reached: Graph = {}
    for room in TopologicalSorter(graph).static_order():
        reached[room] = graph[room].union(*(reached[below] for below in graph[room]))
    return {
        room: targets - {t for other in targets for t in reached[other]}
        for room, targets in graph.items()
    }


def layers_of(graph: Graph) -> tuple[list[list[str]], list[tuple[str, str]]]:
    """Return what stands on each floor, the highest first, and the arrows from each to the next.

    An arrow over several floors is one of several pieces, which meet in points named "a>b>floor".
    """
    floors = floors_of(graph)
    pieces: list[tuple[str, str]] = []
    layers: list[list[str]] = [[] for _ in range(max(floors.values()) + 1)]
    for room in sorted(graph):
        layers[floors[room]].append(room)
        for below in sorted(graph[room]):
            points = [f"{room}>{below}>{floor}" for floor in range(floors[below] + 1, floors[room])]
            for floor, point in enumerate(points, floors[below] + 1):
                layers[floor].append(point)
            pieces += pairwise([room, *reversed(points), below])
    return layers[::-1], pieces


def picture(rooms: Graph) -> str:
    """The rooms as an SVG drawing, the highest floor first."""
    layers, arrows = layers_of(without_implied(rooms))
    height, half = FLOOR * len(layers), BOX_HEIGHT // 2
    middles: dict[str, tuple[int, int]] = {}
    for floor, layer in enumerate(layers):
        above = {name: [middles[a][0] for a, b in arrows if b == name] for name in layer}
        layer.sort(key=lambda name: (sum(above[name]) / max(len(above[name]), 1), name))
        for position, name in enumerate(layer):
            x = WIDTH * (2 * position + 1) // (2 * len(layer))
            middles[name] = (x, FLOOR * floor + BOX_HEIGHT)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="14" text-anchor="middle">',
        "<title>The rooms of quest-deploy and what they import</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 0 8 4 0 8z" fill="#678"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for start, end in arrows:
        (x1, y1), (x2, y2) = middles[start], middles[end]
        y1 += half if start in rooms else 0
        y2 -= half if end in rooms else 0
        bend = (y2 - y1) // 2
        head = ' marker-end="url(#head)"' if end in rooms else ""
        lines.append(
            f'<path d="M{x1} {y1}C{x1} {y1 + bend} {x2} {y2 - bend} {x2} {y2}" fill="none" '
            f'stroke="#678"{head}/>'
        )
    for room in sorted(rooms):
        x, y = middles[room]
        lines.append(
            f'<rect x="{x - BOX_WIDTH // 2}" y="{y - half}" width="{BOX_WIDTH}" '
            f'height="{BOX_HEIGHT}" rx="6" fill="#eef3fb" stroke="#456"/>'
            f'<text x="{x}" y="{y + 5}">{escape(room)}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def page(rooms: Graph, text: str) -> str:
    """The page with the first paragraph of each room's docstring in its table."""
    floors = floors_of(rooms)
    rows = ["| room | what it holds |", "|---|---|"]
    for room in sorted(rooms, key=lambda room: (-floors[room], room)):
        source = source_of(room)
        docstring = ast.get_docstring(ast.parse(source.read_text())) or ""
        about = " ".join(docstring.partition("\n\n")[0].split())
        rows.append(f"| `{source.relative_to(ROOT)}` | {about} |")
    table = "\n".join(rows).replace("/__init__.py", "/")
    return re.sub(r"(?s)(<!-- rooms -->\n\n).*(\n\n<!-- end)", lambda m: m[1] + table + m[2], text)


if __name__ == "__main__":
    found = read_imports()
    PICTURE.write_text(picture(found))
    PAGE.write_text(page(found, PAGE.read_text()))
