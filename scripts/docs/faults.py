"""Writes the tables of docs/faults.md from what `make fuzz` and `make kills` kept.

python -m scripts.docs.faults
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "faults.md"
RESULTS = ROOT / "scripts" / "bench" / "results" / "faults.json"
CAMPAIGNS = {
    "damaged files": ("kind of file", ("message", "same", "read", "wrong")),
    "kills": ("command", ("killed", "one message", "was done", "wrong")),
    "full disks": ("command", ("writes", "one message", "wrong")),
}
"""By campaign, what a row is about and the outcomes, as the tests call them."""


def table(name: str, campaign: dict[str, Any]) -> str:
    """A campaign's date and a row for each thing that was tried, the sum first."""
    subject, outcomes = CAMPAIGNS[name]
    total = sum((Counter(each) for each in campaign["counts"].values()), Counter[str]())
    rows = [[f"{name}, {campaign['date']}", *outcomes], ["---", *["---:"] * len(outcomes)]]
    for label, counts in ((f"**every {subject}**", total), *campaign["counts"].items()):
        rows.append([label, *(str(counts.get(outcome, 0)) for outcome in outcomes)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(text: str, results: dict[str, Any]) -> str:
    """The page with the tables of these results."""
    tables = "\n\n".join(table(name, results[name]) for name in CAMPAIGNS if name in results)
    return re.sub(
        r"(?s)(<!-- outcomes -->\n\n).*(\n\n<!-- end)", lambda m: m[1] + tables + m[2], text
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))
