"""The workspaces that are damaged here are those of the other tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.quest_deploy.conftest import chain, mini_chain, mini_emoji, workspace

__all__ = ["campaign_of", "chain", "mini_chain", "mini_emoji", "workspace"]

CampaignOf = Callable[..., dict[str, list[dict[str, Any]]]]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def campaign_of(tmp_path_factory: pytest.TempPathFactory) -> CampaignOf:
    """Runs a campaign, a module of this package, in a process of its own on a workspace; its rows,
    by command.
    """

    def run(
        module: str, source: Path, *options: str, **environment: str
    ) -> dict[str, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp(module)
        printed = folder / "rows"
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        program = [sys.executable, "-m", f"tests.faults.{module}", source, folder / "place"]
        with printed.open("w") as stream:
            subprocess.run(
                [*program, *options], check=True, stdout=stream, env={**os.environ, **own}
            )
        rows: dict[str, list[dict[str, Any]]] = {}
        for line in printed.read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row["command"], []).append(row)
        return rows

    return run
