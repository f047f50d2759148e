"""Time the engines of every bit-width, each beside FP32's in one run; writes
scripts/bench/results/methods-speed.json, which the comparison's page reads.

    python -m scripts.bench.methods.speed [--again]

Neither speed nor size depends on what the codes are: the model is calibrated on few samples and not
finetuned. `quest-deploy benchmark` runs the engine and the float engine of the same graph in turn.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import quest_deploy as qd
from quest_deploy.artifacts.workspace import versions
from quest_deploy.backends.base import processor_name
from quest_deploy.evaluation.benchmark import FP32, QUANTIZED
from quest_deploy.files import read_json, write_json
from quest_deploy.models.registry import EMBEDDED
from scripts.bench.methods.cells import MAIN_BITS
from scripts.bench.methods.runner import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping

SPEEDS = ROOT / "scripts" / "bench" / "results" / "methods-speed.json"
BACKENDS = ("openvino", "onnxruntime")
BATCHES = (2, 16)
"""One guided image, and eight."""
SAMPLES = 8


def measure(bits: str, folder: Path, *, runs: int, threads: int) -> dict[str, Any]:
    """Make the engines of ``bits`` in ``folder`` and time them.

    Returns:
        By backend: "speedup_over_fp32" by batch, "engine_bytes" and "fp32_bytes".
    """
    workspace = qd.calibrate(EMBEDDED, bits=bits, workspace=folder, samples=SAMPLES)
    qd.export(workspace)
    found = {}
    for backend in BACKENDS:
        qd.build_engine(workspace, backend=backend, threads=threads)
        timed = qd.benchmark(
            workspace, backend=backend, batch=list(BATCHES), runs=runs, static=False
        )
        sizes = {each["engine"]: each["file_bytes"] for each in timed["footprints"]}
        found[backend] = {
            "speedup_over_fp32": timed["speedup_over_fp32"],
            "engine_bytes": sizes[QUANTIZED],
            "fp32_bytes": sizes[FP32],
        }
    return found


def load_speeds(path: Path = SPEEDS) -> Mapping[str, Any] | None:
    """What was measured, {"bits": {bits: {backend: ...}}, ...}; None where nothing was."""
    if not path.exists():
        return None
    found: dict[str, Any] = read_json(path)
    return found


def main(
    runs: Annotated[int, typer.Option(help="Timed runs of each engine.")] = 50,
    threads: Annotated[int, typer.Option(help="Threads of each engine.")] = 1,
    again: Annotated[bool, typer.Option("--again", help="Measure what is measured.")] = False,
    path: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = SPEEDS,
) -> None:
    """Time the engines, once."""
    if path.exists() and not again:
        print(f"{path} is measured; --again measures it again", file=sys.stderr)
        return
    bits = {}
    with tempfile.TemporaryDirectory(prefix="quest-deploy-") as folder:
        for each in MAIN_BITS:
            print(each, file=sys.stderr, flush=True)
            bits[each] = measure(each, Path(folder) / each, runs=runs, threads=threads)
    environment = {"threads": threads, "runs": runs, "processor": processor_name(), **versions()}
    write_json(path, {"model": EMBEDDED, "bits": bits, "environment": environment})


if __name__ == "__main__":
    typer.run(main)
