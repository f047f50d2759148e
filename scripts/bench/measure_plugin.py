"""Measure the plugins' kernels on this machine's GPU; writes docs/plugin/table.md and
scripts/bench/results/plugin.json.

    python -m scripts.bench.measure_plugin [--build FOLDER] [--repeats N] [--results FILE]

Builds trt_plugins/ for the GPU that is here, compares the kernels with their scalar references on
it, under compute-sanitizer too where that is installed, and then times them at Stable Diffusion
1.5's activation shapes, batch 2 and 16. Each kernel is timed beside a copy that moves as many
bytes, both in turn, L2 flushed before every launch, medians; trt_plugins/measure/measure.cu says
more. What is aimed at is 90% of the copy's bandwidth. With --results nothing is measured: the table
is written from what `measure` printed elsewhere.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from quest_deploy.backends.cuda import gpu_compute_capability, gpu_count
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import atomic_file, read_json, write_json

ROOT = Path(__file__).parents[2]
AIM = 0.9
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
COLUMNS = (
    "kernel",
    "site",
    "shape",
    "type",
    "formats",
    "MB",
    "kernel us",
    "copy us",
    "of the copy's bandwidth",
    "apart us",
)


def require_tools() -> None:
    """Raise InputError where something is missing that the measurement cannot do without."""
    if gpu_count() == 0:
        raise InputError(
            "the kernels are measured on an NVIDIA GPU, and this machine has none; run this script "
            "on one that has"
        )
    for program in ("cmake", "nvcc"):
        if shutil.which(program) is None:
            raise InputError(
                f"the kernels are built by {program}, which is not on the path; install it, or "
                "CUDA's toolkit"
            )


def run(*command: str | Path) -> str:
    """Return what the program prints; raise QuestDeployError where it fails."""
    words = [str(word) for word in command]
    print(" ".join(words), file=sys.stderr, flush=True)
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise QuestDeployError(f"{' '.join(words)} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def build(folder: Path) -> Path:
    """Build the kernels and their programs for this GPU and return the folder."""
    architecture = f"-DCMAKE_CUDA_ARCHITECTURES={gpu_compute_capability()}"
    run(
        "cmake",
        "-S",
        ROOT / "trt_plugins",
        "-B",
        folder,
        "-DCMAKE_BUILD_TYPE=Release",
        architecture,
    )
    run("cmake", "--build", folder, "--parallel", "--target", "measure", "kernel_test")
    return folder


def check(folder: Path) -> list[str]:
    """Compare the kernels with their references on the GPU; return the tools of compute-sanitizer
    that found nothing either.
    """
    test = folder / "tests" / "kernel_test"
    if "no GPU is here" in run(test):
        raise QuestDeployError(
            f"{test} finds no GPU, though the driver shows one; is the driver as new as the CUDA "
            "toolkit?"
        )
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return []
    for tool in SANITIZER_TOOLS:
        run(sanitizer, "--tool", tool, "--error-exitcode", "9", test)
    return list(SANITIZER_TOOLS)


def measure(folder: Path, repeats: int, sanitized: list[str]) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(run(folder / "measure", str(repeats)))
    return {"compute_sanitizer": sanitized, **figures}


def bandwidth_ratio(line: dict[str, Any]) -> float:
    """The kernel's bandwidth over the copy's: both move the same bytes."""
    return float(line["copy_us"] / line["kernel_us"])


def cells(line: dict[str, Any]) -> list[str]:
    batch, outer, channels, inner = line["shape"]
    shape = f"{batch}x{channels}x{inner}" if outer == 1 else f"{batch}x{outer}x{channels}"
    apart = f"{line['apart_us']:.1f}" if "apart_us" in line else ""
    return [
        line["kernel"],
        line["site"],
        shape,
        line["type"],
        line["formats"],
        f"{line['bytes'] / 1e6:.1f}",
        f"{line['kernel_us']:.1f}",
        f"{line['copy_us']:.1f}",
        f"{bandwidth_ratio(line):.0%}",
        apart,
    ]


def summary(results: dict[str, Any]) -> str:
    """How many of the lines reach the aim, by batch."""
    parts = []
    for batch in sorted({line["shape"][0] for line in results["lines"]}):
        ratios = sorted(
            bandwidth_ratio(line) for line in results["lines"] if line["shape"][0] == batch
        )
        reached = sum(ratio >= AIM for ratio in ratios)
        parts.append(
            f"batch {batch}: {reached} of {len(ratios)} lines reach {AIM:.0%} of the copy's "
            f"bandwidth; median {ratios[len(ratios) // 2]:.0%}, least {ratios[0]:.0%}"
        )
    return "; ".join(parts)


def table(results: dict[str, Any]) -> str:
    sanitized = ", ".join(results.get("compute_sanitizer", [])) or "not run"
    reached = summary(results)
    return "\n".join(
        [
            "# The plugins' kernels",
            "",
            "Written by `scripts/bench/measure_plugin.py`, which says how each figure is "
            "measured. A kernel and a copy of as many bytes, in",
            f"turn, L2 flushed before each launch, medians of {results['repeats']}. For GEGLU, "
            "`apart` is the same by two kernels,",
            "GEGLU and then TimestepQuantize.",
            "",
            f"Measured on: {results['device']} (compute capability "
            f"{results['compute_capability']}),",
            f"{results['date']}, CUDA {results['cuda_runtime']}, driver {results['cuda_driver']}.",
            f"compute-sanitizer: {sanitized}.",
            "",
            f"{reached[0].upper()}{reached[1:]}.",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---|" * len(COLUMNS),
            *("| " + " | ".join(cells(line)) + " |" for line in results["lines"]),
            "",
        ]
    )


def show(results: dict[str, Any]) -> None:
    shown = Table(*COLUMNS)
    for line in results["lines"]:
        shown.add_row(*cells(line))
    console = Console()
    console.print(shown)
    console.print(summary(results))


def main(
    build_folder: Annotated[Path, typer.Option("--build", help="Where to build.")] = ROOT
    / "trt_plugins"
    / "build"
    / "measure",
    docs: Annotated[Path, typer.Option(help="Where the table goes.")] = ROOT / "docs" / "plugin",
    json_file: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = Path(
        __file__
    ).parent
    / "results"
    / "plugin.json",
    repeats: Annotated[int, typer.Option(min=1)] = 51,
    results_file: Annotated[
        Path | None,
        typer.Option("--results", help="What `measure` printed elsewhere; nothing is run."),
    ] = None,
) -> None:
    """Measure the kernels, print the table and write it."""
    try:
        if results_file is not None:
            results = read_json(results_file)
        else:
            require_tools()
            build(build_folder)
            results = measure(build_folder, repeats, check(build_folder))
        with atomic_file(docs / "table.md") as temporary:
            temporary.write_text(table(results))
    except QuestDeployError as e:
        print(f"error: {e}", file=sys.stderr)
        raise typer.Exit(e.exit_code) from e
    write_json(json_file, results)
    show(results)
    print(docs / "table.md")


if __name__ == "__main__":
    typer.run(main)
