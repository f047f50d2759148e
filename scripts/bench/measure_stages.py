"""Measure what the stages cost, by the size of the model; writes docs/cost/ from
scripts/bench/results/stages.json, which it adds to.

    python -m scripts.bench.measure_stages [--size SIZE ...] [--again SIZE] [--folder DIR]
    python -m scripts.bench.measure_stages --size sd15 --latents 64 --json FILE --docs DIR

The second line is the toolchain at the size that `make bench-sd15` measures. All sizes have random
weights, W4A4 in as many buckets, attention at 8 bits, and samples as large: those of Stable
Diffusion 1.5 and of narrower ones of its structure, and SDXL's. Each stage is a command in a
process of its own; a step is one run of the engine on two samples. What a stage cost is kept at
once, so that an interrupted run goes on with the next.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure

from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.reference import load_reference
from quest_deploy.artifacts.workspace import CALIBRATED, ENGINES, REFERENCE, versions
from quest_deploy.backends.base import open_engine, processor_name
from quest_deploy.backends.registry import get_backend
from quest_deploy.files import atomic_file, read_json, write_json
from scripts.bench.cost import cost_of

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent
ARCHITECTURES = ROOT / "quest_deploy" / "models" / "architectures"
BACKEND, STEPS = "openvino", 3
RECORDED = 32
"""The largest samples of the reference, as `make bench-sd15` has them."""
CALL = "from scripts.bench import measure_stages as m; m.run_step()"


@dataclass(frozen=True)
class Size:
    """A model of ``architecture``, with other widths of its levels if given."""

    architecture: str
    widths: tuple[int, ...] | None = None


SIZES = {
    "tiny": Size("sd15", (64, 128, 256, 256)),
    "half": Size("sd15", (160, 320, 640, 640)),
    "sd15": Size("sd15"),
    "sdxl": Size("sdxl"),
}


def commands(
    workspace: Path, model: Path, latents: int, buckets: int, method: str
) -> dict[str, list[str]]:
    """The stages in order, each the arguments of Python."""
    program = ["-m", "quest_deploy"]
    of_workspace = ("-w", str(workspace))
    calibration = (
        *("--model", str(model), "--random-weights", "--bits", "w4a4", "--method", method),
        *("--attention-bits", "8", "--softmax-bits", "8", "--buckets", str(buckets)),
        *("--steps", str(buckets), "--samples", "1", "--batch", "1", "--guidance", "1"),
    )
    recorded = ("--sample-size", str(min(latents, RECORDED)), "--megabytes", "500")
    return {
        "calibrate": [*program, "calibrate", *calibration, *of_workspace],
        "export": [*program, "export", *of_workspace],
        "build-engine": [*program, "build-engine", "--backend", BACKEND, *of_workspace],
        "reference": [*program, "reference", *recorded, *of_workspace],
        "verify": [*program, "verify", "--backend", BACKEND, *of_workspace],
        "step": ["-c", CALL, str(workspace)],
    }


def run_step() -> None:
    """Print the median of a few runs of the engine, {"step_seconds", "step_cpu_seconds"}."""
    workspace = Path(sys.argv[1])
    inputs = load_reference(workspace / REFERENCE)[0][0].inputs
    spent = []
    with open_engine(get_backend(BACKEND), workspace / ENGINES / BACKEND) as runner:
        runner.infer(inputs)
        for _ in range(STEPS):
            start = time.perf_counter(), time.process_time()
            runner.infer(inputs)
            spent.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    seconds, cpu_seconds = map(statistics.median, zip(*spent, strict=True))
    print(json.dumps({"step_seconds": seconds, "step_cpu_seconds": cpu_seconds}))


def model_folder(size: Size, folder: Path, latents: int) -> Path:
    """The configurations of ``size``, without weights, for samples of ``latents``."""
    shutil.copytree(ARCHITECTURES / size.architecture, folder, dirs_exist_ok=True)
    path = folder / "unet" / "config.json"
    config = {**read_json(path), "sample_size": latents}
    if size.widths is not None:
        config["block_out_channels"] = size.widths
    path.write_text(json.dumps(config))
    return folder


def weights_of(workspace: Path) -> int:
    """How many weights the quantized layers have."""
    layers = load_checkpoint(workspace / CALIBRATED).layers.values()
    return sum(layer.codes.size for layer in layers)


def costs(results: dict[str, Any], stage: str) -> tuple[list[int], list[float], list[float]]:
    """Of each size that ``stage`` was measured at: its weights, the processor's seconds, and the
    peak memory in GiB.
    """
    found = [
        (entry["weights"], entry["stages"][stage])
        for entry in results.values()
        if stage in entry["stages"]
    ]
    return (
        [weights for weights, _ in found],
        [cost.get("step_cpu_seconds", cost["cpu_seconds"]) for _, cost in found],
        [cost["peak_gib"] for _, cost in found],
    )


def growth(weights: list[int], values: list[float]) -> str:
    """The power of the weights that ``values`` grow with, from the first size to the last."""
    if len(weights) < 2:
        return ""
    power = np.log(values[-1] / values[0]) / np.log(weights[-1] / weights[0])
    return f"{power:.2f}"


def table(results: dict[str, Any], settings: dict[str, Any]) -> str:
    """The page, of all that was measured."""
    stages = [stage for entry in results.values() for stage in entry["stages"]]
    machines = sorted({f"{entry['processor']}, {entry['date']}" for entry in results.values()})
    millions = [f"{entry['weights'] / 1e6:.0f}" for entry in results.values()]
    lines = [
        "# Cost against size",
        "",
        "Written by `scripts/bench/measure_stages.py`, which says how each figure is measured.",
        f"Samples {settings['latents']}x{settings['latents']}, W4A4, {settings['method']}, "
        f"{settings['buckets']} buckets, as many steps of one sampling.",
        f"Measured on: {'; '.join(machines)}.",
        "",
        "Processor seconds / peak memory in GiB; the last column says with which powers of the "
        "weights both grow.",
        "",
        f"| stage | {' | '.join(results)} | growth |",
        f"|---|{'---|' * len(results)}---|",
        f"| million weights | {' | '.join(millions)} |  |",
    ]
    for stage in dict.fromkeys(stages):
        weights, seconds, memory = costs(results, stage)
        cells = dict(zip(weights, zip(seconds, memory, strict=True), strict=True))
        shown = [
            f"{cells[x['weights']][0]:.1f} / {cells[x['weights']][1]:.2f}"
            if x["weights"] in cells
            else "not measured"
            for x in results.values()
        ]
        powers = f"{growth(weights, seconds)} / {growth(weights, memory)}"
        lines.append(f"| {stage} | {' | '.join(shown)} | {powers} |")
    return "\n".join([*lines, "", "![Cost against size](cost.svg)", ""])


def plot(results: dict[str, Any], path: Path) -> None:
    """Both axes logarithmic; grey lines grow with the weights."""
    figure = Figure((9, 4), layout="constrained")
    stages = dict.fromkeys(stage for entry in results.values() for stage in entry["stages"])
    panels = figure.subplots(1, 2)
    for axes, index, label in zip(panels, (1, 2), ("processor s", "peak GiB"), strict=True):
        for stage in stages:
            found = costs(results, stage)
            axes.plot(found[0], found[index], "o-", label=stage)
            ideal = [found[index][0] * x / found[0][0] for x in found[0]]
            axes.plot(found[0], ideal, color="lightgrey", zorder=0)
        axes.set(xscale="log", yscale="log", xlabel="weights", ylabel=label)
    panels[0].legend(fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})


def main(
    size: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(SIZES)}; may be repeated.")
    ] = None,
    again: Annotated[
        list[str] | None, typer.Option(help="Measure this size again; may be repeated.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the workspaces go.")] = Path("quest-out/cost"),
    latents: Annotated[int, typer.Option(help="Height and width of the samples.")] = 32,
    buckets: int = 20,
    method: str = "minmax",
    docs: Annotated[Path, typer.Option(help="Where table and plot go.")] = ROOT / "docs" / "cost",
    kept: Annotated[Path, typer.Option("--json", help="What was measured.")] = SCRIPTS
    / "results"
    / "stages.json",
) -> None:
    """Measure every stage of each size that was not measured yet; write the table and the plot."""
    chosen = size or list(SIZES)
    for name in (*chosen, *(again or ())):
        if name not in SIZES:
            raise typer.BadParameter(f"unknown size {name!r}: expected one of {', '.join(SIZES)}")
    settings = {"latents": latents, "buckets": buckets, "method": method}
    known = read_json(kept) if kept.exists() else {"settings": settings, "sizes": {}}
    if known["settings"] != settings:
        raise typer.BadParameter(f"{kept} is of {known['settings']}; give another --json")
    results: dict[str, Any] = {name: known["sizes"].get(name) for name in SIZES}
    for name in chosen:
        workspace = folder / name
        if name in (again or ()):
            results[name] = None
            shutil.rmtree(workspace, ignore_errors=True)
        entry = results[name] or {
            "processor": processor_name(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "versions": versions(),
            "stages": {},
        }
        model = model_folder(SIZES[name], folder / f"{name}-model", latents)
        for stage, command in commands(workspace, model, latents, buckets, method).items():
            if stage in entry["stages"]:
                continue
            entry["stages"][stage] = cost_of(*command)
            entry["weights"] = weights_of(workspace)
            results[name] = entry
            sizes = {key: value for key, value in results.items() if value is not None}
            write_json(kept, {"settings": settings, "sizes": sizes})
    sizes = {name: entry for name, entry in results.items() if entry is not None}
    docs.mkdir(parents=True, exist_ok=True)
    with atomic_file(docs / "table.md") as temporary:
        temporary.write_text(table(sizes, settings))
    plot(sizes, docs / "cost.svg")
    print(docs / "table.md")


if __name__ == "__main__":
    typer.run(main)
