"""Measure the toolchain at Stable Diffusion 1.5's size, and diffusion transformers at theirs;
writes docs/sd15/table.md from scripts/bench/results/sd15.json, which it adds to.

    python -m scripts.bench.bench_sd15 [--workspace DIR] [--again STEP] [--only STEP]

The UNet is stable-diffusion-v1-5's with random weights: neither size nor time depends on them, and
no image of it means anything. It is calibrated to W4A4 in 20 buckets by min-max, q, k, v and
softmax at 8 bits; a second workspace leaves attention in float. Both sides of each ratio are
measured in one run of one step. What a step measured is kept at once, so that an interrupted run
goes on with the next.

A transformer, PixArt-Sigma or Stable Diffusion 3.5 medium, has random weights too and all of its
layers; it is calibrated to W4A4 in 2 buckets on samples of 32x32, which its export does not depend
on. To be timed PixArt-Sigma is calibrated in 20 buckets, with attention at 8 bits. FLUX.1-dev is
too large to be calibrated here: its graph is made of its shapes (export_shapes.py).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.artifacts.workspace import (
    CALIBRATED,
    CHECKPOINT,
    GRAPH,
    MANIFEST,
    REFERENCE_STATE,
    versions,
)
from quest_deploy.backends.base import processor_name
from quest_deploy.files import atomic_file, read_json, write_json
from quest_deploy.models.registry import ARCHITECTURES
from scripts.bench.cost import cost_of

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent
MINMAX = ("--method", "minmax", "--samples", "1", "--batch", "1", "--guidance", "1")
ALL_BUCKETS = (*MINMAX, "--steps", "20")
CALIBRATION = ("--model", "sd15", "--random-weights", "--bits", "w4a4", *ALL_BUCKETS)
SIDE = 32
"""Of a transformer's samples."""
FEW = (*MINMAX, "--steps", "2", "--buckets", "2")
QUANTIZED_ATTENTION = ("--attention-bits", "8", "--softmax-bits", "8")
TRANSFORMERS, TIMED, SHAPED = ("pixart-sigma", "sd35-medium"), "pixart-sigma", "flux-dev"
"""The models that are exported, the one that is timed, and the one of which shapes are exported."""
EXPORT, SPEED = "export-", "openvino-"
"""What the steps of transformers are called, before the model."""
TIMED_SIDE = 64
"""Of samples that are timed: images of 512 pixels."""
BATCH, THREADS, RUNS = "2", "2", "11"
MEGA = 1e6


@dataclass(frozen=True)
class Line:
    """One line of the table: a figure, the other side it was measured beside, their ratio, and what
    was aimed at.
    """

    what: str
    ours: str
    other: str = ""
    ratio: str = ""
    aim: str = ""


def quest_deploy(*arguments: str) -> dict[str, Any]:
    """Run a command of quest-deploy and return what it prints as JSON; its progress goes on to the
    terminal.
    """
    command = [sys.executable, "-m", "quest_deploy", *arguments, "--json"]
    print(" ".join(command[2:]), flush=True)
    result: dict[str, Any] = json.loads(
        subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True).stdout
    )
    if "error" in result:
        raise SystemExit(result["error"])
    return result


def script(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run one of the scripts beside this one and return what it writes as JSON."""
    target = folder / f"{name}.json"
    command = [sys.executable, "-m", f"scripts.bench.{name}", *arguments, "--json", str(target)]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)
    result: dict[str, Any] = read_json(target)
    return result


def ensure_graph(workspace: Path, *attention: str) -> None:
    """Calibrate and export ``workspace`` where it has no graph."""
    if not (workspace / MANIFEST).exists() or not (
        (workspace / CALIBRATED).exists() or (workspace / CHECKPOINT).exists()
    ):
        quest_deploy("calibrate", *CALIBRATION, *attention, "-w", str(workspace))
    if not (workspace / GRAPH).exists():
        quest_deploy("export", "-w", str(workspace))


def measure_export(workspace: Path, folder: Path) -> dict[str, Any]:
    return script("measure_export", folder, str(workspace))


def measure_transformer(workspace: Path, folder: Path) -> dict[str, Any]:
    """Calibrate the transformer that ``folder`` is called after, and measure its export."""
    name = folder.name.removeprefix(EXPORT)
    calibration = calibrate_transformer(name, folder, *FEW)
    exports = script("measure_export", folder, str(folder / "workspace"), "--buckets", "0")
    return {**exports, "calibration": calibration}


def calibrate_transformer(name: str, folder: Path, *options: str) -> dict[str, Any]:
    """Calibrate the transformer ``name`` in ``folder`` / "workspace"; what that took."""
    model = folder / name
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(ARCHITECTURES / name, model)
    path = model / "transformer" / "config.json"
    write_json(path, {**read_json(path), "sample_size": SIDE})
    shutil.rmtree(folder / "workspace", ignore_errors=True)
    command = ("calibrate", "--model", str(model), "--random-weights", "--bits", "w4a4", *options)
    return cost_of("-m", "quest_deploy", *command, "-w", str(folder / "workspace"))


def measure_shapes(workspace: Path, folder: Path) -> dict[str, Any]:
    """Export the shapes of the model that ``folder`` is called after; the graph is not kept."""
    name, target = folder.name.removeprefix(EXPORT), folder / "graph"
    try:
        return cost_of("-m", "scripts.bench.export_shapes", name, str(target))
    finally:
        shutil.rmtree(target, ignore_errors=True)


def measure_transformer_speed(workspace: Path, folder: Path) -> dict[str, Any]:
    """Time the transformer that ``folder`` is called after on OpenVINO."""
    own = folder / "workspace"
    if not (own / GRAPH).exists():
        name = folder.name.removeprefix(SPEED)
        calibrate_transformer(name, folder, *ALL_BUCKETS, *QUANTIZED_ATTENTION)
        quest_deploy("export", "-w", str(own))
    rivals = ("--rival", "fp32", "--rival", "nncf int8", "--rival", "static scales")
    sizes = ("--dtype", "fp32", "--sample-size", str(TIMED_SIDE))
    return compare_openvino(own / GRAPH, folder, *sizes, *rivals)


def measure_tensorrt(workspace: Path, folder: Path) -> dict[str, Any]:
    sizes = ("--dtype", "fp16", "--max-batch", "8", "--sample-size", "64", "--sample-size", "96")
    return script("measure_tensorrt_build", folder, str(workspace / GRAPH), *sizes)


def measure_openvino(workspace: Path, folder: Path) -> dict[str, Any]:
    return compare_openvino(workspace / GRAPH, folder)


def compare_openvino(graph: Path, folder: Path, *options: str) -> dict[str, Any]:
    usual = ("--batch", BATCH, "--threads", THREADS, "--runs", RUNS)
    return script("compare_openvino", folder, str(graph), *usual, *options)


def measure_openvino_float(workspace: Path, folder: Path) -> dict[str, Any]:
    float_attention = workspace.with_name(f"{workspace.name}-float-attention")
    ensure_graph(float_attention)
    return measure_openvino(float_attention, folder)


def measure_onnxruntime(workspace: Path, folder: Path) -> dict[str, Any]:
    quest_deploy(
        "build-engine", "--backend", "onnxruntime", "--threads", THREADS, "-w", str(workspace)
    )
    choices = ("--batch", BATCH, "--runs", "3", "--warmup", "1", "--no-static")
    return quest_deploy("benchmark", "--backend", "onnxruntime", *choices, "-w", str(workspace))


def measure_precision(workspace: Path, folder: Path) -> dict[str, Any]:
    quest_deploy(
        "build-engine", "--backend", "openvino", "--threads", THREADS, "-w", str(workspace)
    )
    figures = quest_deploy("inspect", str(workspace / "engines" / "openvino"))
    return {**figures["precision"], "layers": []}


def measure_verification(workspace: Path, folder: Path) -> dict[str, Any]:
    shutil.rmtree(
        workspace / REFERENCE_STATE, ignore_errors=True
    )  # of an interrupted run, which would take part of the time
    started = time.monotonic()
    quest_deploy("reference", "--sample-size", "32", "--megabytes", "500", "-w", str(workspace))
    referenced = time.monotonic()
    figures = quest_deploy("verify", "--backend", "openvino", "-w", str(workspace))
    spent = {
        "reference_seconds": referenced - started,
        "verify_seconds": time.monotonic() - referenced,
    }
    return {key: figures[key] for key in ("buckets", "coverage", "problems")} | spent


def export_lines(figures: dict[str, Any]) -> list[Line]:
    (ours, *_), wider, ratios = figures["ours"], figures["wider"], figures["summary"]
    return [
        *_cost_lines(figures, "4.5 GB"),
        Line(
            "graph, files",
            f"{ours['bytes'] / MEGA:.1f} MB",
            f"FP32 {figures['plain'][0]['bytes'] / MEGA:.0f} MB",
            f"{ratios['bytes_ratio']:.3f}x",
            "470 MB",
        ),
        Line(
            "graph with 50 buckets, files",
            f"{wider['bytes'] / MEGA:.1f} MB",
            f"20 buckets {ours['bytes'] / MEGA:.1f} MB",
            f"{ratios['wider_bytes_ratio']:.4f}x",
            "1.02x",
        ),
        Line(
            "graph with 50 buckets, nodes",
            str(wider["nodes"]),
            f"20 buckets {ours['nodes']}",
            "",
            "equal",
        ),
    ]


def transformer_lines(figures: dict[str, Any], name: str) -> list[Line]:
    (ours, *_), (plain, *_), cost = figures["ours"], figures["plain"], figures["calibration"]
    lines = [
        *_cost_lines(figures, "6 GB"),
        Line(
            "graph, files",
            f"{ours['bytes'] / MEGA:.1f} MB",
            f"4-bit payload {figures['payload_bytes'] / MEGA:.1f} MB",
            f"{figures['summary']['payload_ratio']:.3f}x",
            "1.1x",
        ),
        Line(
            "graph, files",
            f"{ours['bytes'] / MEGA:.1f} MB",
            f"payload of which nothing is rounded {figures['exact_bytes'] / MEGA:.1f} MB",
            f"{figures['summary']['exact_ratio']:.3f}x",
        ),
        Line(
            "graph, files",
            f"{ours['bytes'] / MEGA:.1f} MB",
            f"FP32 {plain['bytes'] / MEGA:.0f} MB",
            f"{figures['summary']['bytes_ratio']:.3f}x",
        ),
        Line("calibration, processor time", f"{cost['cpu_seconds']:.0f} s"),
        Line("calibration, peak memory", f"{cost['peak_gib']:.2f} GiB"),
    ]
    return [replace(line, what=f"{name}: {line.what}") for line in lines]


def shape_lines(figures: dict[str, Any], name: str) -> list[Line]:
    weights = figures["quantized_weights"] + figures["float_weights"]
    payload = figures["payload_bytes"]
    size = f"{weights / 1e9:.1f} billion weights"
    lines = [
        Line("export", f"{figures['seconds']:.1f} s", size),
        Line("export, processor time", f"{figures['cpu_seconds']:.1f} s"),
        Line(
            "export, peak memory",
            f"{figures['peak_gib']:.2f} GiB",
            f"FP32 weights {4 * weights / 2**30:.1f} GiB",
            "",
            "6 GB",
        ),
        Line(
            "graph, files",
            f"{figures['bytes'] / MEGA:.1f} MB",
            f"4-bit payload {payload / MEGA:.1f} MB",
            f"{figures['bytes'] / payload:.3f}x",
            "1.1x",
        ),
        Line("graph, nodes", str(figures["nodes"])),
    ]
    return [replace(line, what=f"{name}, of its shapes: {line.what}") for line in lines]


def _cost_lines(figures: dict[str, Any], memory: str) -> list[Line]:
    """What an export costs beside a plain one, ``memory`` being what is aimed at."""
    (ours, *_), (plain, *_), ratios = figures["ours"], figures["plain"], figures["summary"]
    return [
        Line(
            "export, the whole command",
            f"{ours['seconds']:.1f} s",
            f"FP32 torch.onnx.export, the call alone {plain['call_seconds']:.1f} s",
            f"{ratios['seconds_ratio']:.2f}x",
            "1.5x",
        ),
        Line(
            "export, process beside process",
            f"{ours['seconds']:.1f} s",
            f"FP32 {plain['seconds']:.1f} s",
            f"{ratios['process_seconds_ratio']:.2f}x",
            "1.5x",
        ),
        Line(
            "export, processor time",
            f"{ours['cpu_seconds']:.1f} s",
            f"the same {plain['call_cpu_seconds']:.1f} s",
            f"{ratios['cpu_seconds_ratio']:.2f}x",
        ),
        Line(
            "export, peak memory",
            f"{ours['peak_gib']:.2f} GiB",
            f"FP32 torch.onnx.export {plain['peak_gib']:.2f} GiB",
            f"{ratios['peak_ratio']:.2f}x",
            memory,
        ),
    ]


def tensorrt_lines(figures: dict[str, Any]) -> list[Line]:
    whole = figures["whole"]
    seconds = f"{whole['seconds']:.0f} s ({whole['processor_seconds']:.0f} s of processor)"
    return [
        Line(
            "tensorrt-rtx engine: FP16, batch 1 to 8, 512 and 768 px, build",
            seconds,
            "",
            "",
            "60 s",
        ),
        Line("the same, peak memory", f"{whole['peak_gib']:.2f} GiB", "", "", "5 GB"),
        Line("the same, engine", f"{whole['engine_bytes'] / MEGA:.0f} MB"),
    ]


def openvino_lines(figures: dict[str, Any], attention: str, **also: str) -> list[Line]:
    """Lines of the engine and each rival; ``also`` are further aims, by the rival."""
    lines = []
    for row in figures["rows"]:
        if row["variant"] == "engine":
            lines.append(
                Line(
                    f"openvino {row['dtype']}, {attention}",
                    f"{row['seconds']:.2f} s",
                    "",
                    f"{row['speedup']:.2f}x FP32",
                )
            )
            continue
        rival = {
            "fp32": "the float model",
            "nncf int8": "NNCF INT8",
            "static scales": "static scales",
        }.get(row["variant"], row["variant"])
        aims = {"nncf int8": "above 1", "static scales": "0.97 or more", "50 buckets": "1", **also}
        lines.append(
            Line(
                f"openvino {row['dtype']}, {attention}",
                "the engine, beside",
                f"{rival} {row['seconds']:.2f} s",
                f"{row['against_engine']:.3f}x as fast",
                aims.get(row["variant"], ""),
            )
        )
    return lines


def error_lines(figures: dict[str, Any]) -> list[Line]:
    errors = {(row["variant"], row["dtype"]): row["error"] for row in figures["rows"]}
    return [
        Line(
            f"openvino {dtype}, relative error against the float model",
            f"{error:.3f}",
            f"NNCF INT8 {errors['nncf int8', dtype]:.3f}",
        )
        for (variant, dtype), error in errors.items()
        if variant == "engine"
    ]


def onnxruntime_lines(figures: dict[str, Any]) -> list[Line]:
    seconds = {timing["engine"]: timing["median_s"] for timing in figures["timings"]}
    precision = figures["precision"]
    return [
        Line(
            "onnxruntime",
            f"{seconds['quantized']:.1f} s",
            f"FP32 {seconds['fp32']:.1f} s",
            f"{figures['speedup_over_fp32'][BATCH]:.2f}x FP32",
        ),
        Line("onnxruntime, multiply-adds in INT8", f"{precision['int8_share']:.1%}"),
    ]


def precision_lines(figures: dict[str, Any]) -> list[Line]:
    sizes = figures["sizes"]
    requested, fell_back = (
        f"asked for {figures['asked_int8_share']:.1%}",
        f"{len(figures['fell_back'])} layers fell back to float",
    )
    return [
        Line(
            "openvino, multiply-adds in INT8",
            f"{figures['int8_share']:.1%}",
            requested,
            "",
            fell_back,
        ),
        Line(
            "openvino engine, files",
            f"{sizes['engine'] / MEGA:.0f} MB",
            f"FP16 {sizes['fp16'] / MEGA:.0f} MB",
            f"{sizes['engine'] / sizes['fp16']:.3f}x",
            f"4-bit ideal {sizes['ideal'] / MEGA:.0f} MB",
        ),
    ]


def verification_lines(figures: dict[str, Any]) -> list[Line]:
    codes, mismatches = (
        sum(bucket[key] for bucket in figures["buckets"]) for key in ("codes", "mismatches")
    )
    coverage = figures["coverage"]
    share = (
        f"{coverage['sites']} of {coverage['all_sites']} tensors, {coverage['layers']} of "
        f"{coverage['all_layers']} layers"
    )
    spent = (
        f"reference {figures['reference_seconds']:.0f} s, verify {figures['verify_seconds']:.0f} s"
    )
    verdict = "FAILED" if figures["problems"] else "PASSED"
    return [
        Line("verify, openvino", verdict, f"{codes} codes, {mismatches} differ; {share}", "", spent)
    ]


@dataclass(frozen=True)
class Step:
    """What is measured at a time, and its lines of the table; ``needs_graph`` of Stable Diffusion
    1.5, or none.
    """

    measure: Callable[[Path, Path], dict[str, Any]]
    lines: Callable[[dict[str, Any]], list[Line]]
    needs_graph: bool = True


STEPS = {
    "export": Step(measure_export, export_lines),
    "tensorrt": Step(measure_tensorrt, tensorrt_lines),
    "openvino": Step(
        measure_openvino,
        lambda figures: [*openvino_lines(figures, "attention at 8 bits"), *error_lines(figures)],
    ),
    "onnxruntime": Step(measure_onnxruntime, onnxruntime_lines),
    "precision": Step(measure_precision, precision_lines),
    "verification": Step(measure_verification, verification_lines),
    "openvino-float-attention": Step(
        measure_openvino_float, lambda figures: openvino_lines(figures, "float attention")
    ),
    **{
        f"{EXPORT}{name}": Step(
            measure_transformer, partial(transformer_lines, name=name), needs_graph=False
        )
        for name in TRANSFORMERS
    },
    f"{EXPORT}{SHAPED}": Step(measure_shapes, partial(shape_lines, name=SHAPED), needs_graph=False),
    f"{SPEED}{TIMED}": Step(
        measure_transformer_speed,
        lambda figures: openvino_lines(
            figures, f"{TIMED} at 512 px, attention at 8 bits", fp32="2 or more"
        ),
        needs_graph=False,
    ),
}


def table(results: dict[str, Any]) -> str:
    """The page: the machine, then the lines of every step that was measured; a step that was not is
    named.
    """
    rows = [
        line
        for name, step in STEPS.items()
        if name in results
        for line in step.lines(results[name]["found"])
    ]
    cells = [(line.what, line.ours, line.other, line.ratio, line.aim) for line in rows]
    machines = sorted({f"{entry['processor']}, {entry['date']}" for entry in results.values()})
    packages = sorted(
        {
            f"{name} {version}"
            for entry in results.values()
            for name, version in entry["versions"].items()
        }
    )
    missing = [name for name in STEPS if name not in results]
    return "\n".join(
        [
            "# Stable Diffusion 1.5 and transformers at full size",
            "",
            "Written by `make bench-sd15`; `scripts/bench/bench_sd15.py` says how each figure is "
            "measured. The UNet has random weights; W4A4,",
            f"20 buckets, latents 64x64; engines at batch {BATCH} with {THREADS} threads, medians, "
            "both sides of a ratio in one run.",
            "The errors are those of 4-bit min-max activations, beside NNCF's 8-bit ones, on "
            "random weights: they say nothing of images. The rows of transformers' exports are of "
            "all their layers, W4A4 in 2 buckets, FLUX.1-dev's in 20; the payload is the layers' "
            "codes, and the float weights in 16 bits; or, where nothing is rounded, those of "
            "PixArt-Sigma in FP32, as it was published, with biases and scales.",
            "",
            f"Measured on: {'; '.join(machines)}.",
            f"With: {', '.join(packages)}.",
            *(["", f"Not measured: {', '.join(missing)}."] if missing else []),
            "",
            "| what | ours | beside | ratio | aim |",
            "|---|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in cells),
            "",
            *profiles(results),
        ]
    )


def profiles(results: dict[str, Any]) -> list[str]:
    """Where openvino spends a forward pass, of ours and of NNCF's."""
    lines = []
    for name in ("openvino", "openvino-float-attention", f"{SPEED}{TIMED}"):
        for row in results[name]["found"]["rows"] if name in results else []:
            if row["variant"] in ("engine", "nncf int8"):
                spent = ", ".join(
                    f"{role} {milliseconds:.0f}" for role, milliseconds in row["profile"].items()
                )
                lines.append(f"- {name}, {row['dtype']}, {row['variant']}: {spent}")
    return (
        ["Milliseconds of the fastest run, by what the nodes do:", "", *lines, ""] if lines else []
    )


def main(
    workspace: Path = Path("quest-out/sd15-w4a4"),
    docs: Annotated[Path, typer.Option(help="Where the table goes.")] = ROOT / "docs" / "sd15",
    kept: Annotated[Path, typer.Option("--json", help="What was measured, by step.")] = SCRIPTS
    / "results"
    / "sd15.json",
    again: Annotated[
        list[str] | None, typer.Option(help="Measure this step again; may be repeated.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Measure no other step than this; may be repeated.")
    ] = None,
) -> None:
    """Measure every step that was not measured yet, and write the table."""
    for name in (*(again or ()), *(only or ())):
        if name not in STEPS:
            raise typer.BadParameter(f"unknown step {name!r}: expected one of {', '.join(STEPS)}")
    results: dict[str, Any] = read_json(kept) if kept.exists() else {}
    results = {name: entry for name, entry in results.items() if name not in (again or ())}
    for name, step in STEPS.items():
        if name in results or (only and name not in only):
            continue
        if step.needs_graph:
            ensure_graph(workspace, *QUANTIZED_ATTENTION)
        folder = workspace.with_name(f"{workspace.name}-measured") / name
        folder.mkdir(parents=True, exist_ok=True)
        figures = step.measure(workspace, folder)
        made = {
            "processor": processor_name(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "versions": versions(),
        }
        results[name] = {**made, "found": figures}
        write_json(kept, results)
    with atomic_file(docs / "table.md") as temporary:
        temporary.write_text(table(results))
    print(docs / "table.md")


if __name__ == "__main__":
    typer.run(main)
