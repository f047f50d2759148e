"""Writes the table of an engine's options in docs/backends.md from their declarations.

python -m scripts.docs.options
"""

from __future__ import annotations

import re
from pathlib import Path

from quest_deploy.backends.options import EngineOption, declared_options
from quest_deploy.backends.registry import BACKENDS
from quest_deploy.stages.arguments import BuildEngineArguments

PAGE = Path(__file__).parents[2] / "docs" / "backends.md"


def taken(option: EngineOption, backend: str) -> str:
    """Whether a backend takes an option, and if not all of it, why."""
    if option.backends and backend not in option.backends:
        no = "ignored" if option.ignored else "no"
        return ": ".join(filter(None, (no, option.reasons.get(backend))))
    for place, choices in option.limits.items():
        name, _, provider = place.partition(" ")
        if name == backend:
            listed = ", ".join(f"`{each}`" for each in choices)
            return f"{listed} (`{provider}`)" if provider else listed
    return "yes"


def table(options: type = BuildEngineArguments) -> str:
    """A row for each option, a column for each backend."""
    rows = [["option", "what it sets", *(f"`{name}`" for name in BACKENDS)]]
    rows.append(["---"] * len(rows[0]))
    for each, option in declared_options(options):
        cells = (taken(option, name) for name in BACKENDS)
        rows.append([f"`{each.flag}`", option.help or "", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(text: str) -> str:
    """The page with the table of now."""
    return re.sub(
        r"(?s)(<!-- options -->\n\n).*(\n\n<!-- end)", lambda m: m[1] + table() + m[2], text
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
