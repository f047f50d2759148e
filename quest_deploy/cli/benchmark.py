"""`quest-deploy benchmark`: the engine against FP32 and against static scales, on the same backend,
in one run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import command, opened
from quest_deploy.stages import api
from quest_deploy.stages.arguments import BenchmarkArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(BenchmarkArguments)
def benchmark(chosen: dict[str, Any], console: Console) -> None:
    """Time the engine against FP32 and against static scales, on the same backend."""
    api.benchmark(**chosen, progress=console)
    report(console, opened(chosen), "benchmark", chosen["backend"])
