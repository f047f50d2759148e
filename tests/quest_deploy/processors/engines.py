"""Run in a process of its own, on whatever processor it sees: builds and verifies a model's
engines, and prints what it found as JSON.

    python tests/quest_deploy/processors/engines.py GRAPH REFERENCE BACKEND

By the answers that the engine is built with: "asked", the runtime's own; "any", what holds on any
processor; "lie", that all is exact.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from exporters.exactness import EXACT
from exporters.graph_info import load_graph
from quest_deploy.backends.base import build_engine
from quest_deploy.backends.cpu import CpuBackend
from quest_deploy.backends.exactness import ask
from quest_deploy.backends.options import ANY_PROCESSOR, EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.verification.checks import verify_engine


def main(graph: Path, reference: Path, name: str) -> dict[str, Any]:
    """The runtime's answers, and the problems that verification finds in each engine."""
    backend = get_backend(name)
    assert isinstance(backend, CpuBackend)
    answers = ask(backend)
    problems = {}
    for answer, exactness in (("asked", answers), ("any", None), ("lie", EXACT)):
        options = EngineOptions(
            threads=1, processor=ANY_PROCESSOR if exactness is None else "native"
        )
        told = mock.patch("quest_deploy.backends.exactness.measured", return_value=exactness)
        with tempfile.TemporaryDirectory() as folder, told:
            build_engine(backend, load_graph(graph), Path(folder), options, "0" * 64)
            with mock.patch("quest_deploy.backends.exactness.check_kernels"):
                problems[answer] = verify_engine(backend, options, Path(folder), reference).problems
    return {"levels": dict(answers.levels), "problems": problems}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
