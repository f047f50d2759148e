"""What a campaign found, kept for the page that tells it: `make docs-pages` writes docs/faults.md."""

from __future__ import annotations

import json
import time

from scripts.docs.faults import RESULTS


def keep(campaign: str, counts: dict[str, dict[str, int]], wrong: list[str]) -> None:
    """Replace what was kept of a campaign: how often each outcome was seen, by what was tried, and
    what should not have been.
    """
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    content[campaign] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "counts": {name: dict(sorted(each.items())) for name, each in counts.items()},
        "wrong": wrong,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
