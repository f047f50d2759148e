"""What a finished workspace found, as Markdown tables; and docs/results/ from the demo's.

    python -m scripts.docs.results -w quest-out/emoji-w4a4          # prints the tables
    python -m scripts.docs.results -w quest-out/emoji-w4a4 --write  # and writes docs/results/

The same for Stable Diffusion 1.5, on a machine that has its weights and memory for two of its UNets
in FP32; hours on a CPU, and it goes on where it was interrupted:

    python -m scripts.docs.results --run sd15 --bits w4a8 --backend openvino
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import quest_deploy as qd
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.evaluation.report_page.facts import system
from quest_deploy.files import atomic_file, size
from quest_deploy.stages import FINETUNE
from quest_deploy.stages import run as pipeline
from quest_deploy.stages.arguments import RunArguments
from quest_deploy.stages.options import BenchmarkOptions

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "results"
SITE = ROOT / "mkdocs.yml"
NAV, ENTRY = "  - Measured:\n", "      - results/README.md\n"
"""Where the index of the site lists the page."""
BENCHMARK = BenchmarkOptions(batch=(1, 2), runs=20, static=False, pipeline=True)
"""What `--run` times: a third engine may not fit."""
QUALITY = {
    "frechet_distance": ("Fréchet distance", "{:.2f}"),
    "top1": ("prompt nearest of all to its image", "{:.1%}"),
    "psnr": ("PSNR to FP32's images, dB", "{:.2f}"),
    "ssim": ("SSIM to FP32's images", "{:.3f}"),
    "lpips": ("LPIPS to FP32's images", "{:.3f}"),
    "clip_score": ("CLIP score", "{:.2f}"),
    "fid": ("FID", "{:.2f}"),
}
"""What `evaluate` says, as the table calls and shows it."""


def tables(workspace: Workspace) -> str:
    """All that the workspace's stages found, a table each; what has not run, or is out of date, is
    left out.
    """
    up_to_date = [name for name, why in workspace.states().items() if why is None]
    records = {name: workspace.stages[name] for name in up_to_date}
    of = {
        stage: [record.details for name, record in records.items() if name.startswith(f"{stage}/")]
        for stage in ("verify", "evaluate", "benchmark")
    }
    parts = [
        _about(workspace, records),
        *(_verification(details) for details in of["verify"]),
        *(_quality(details) for details in of["evaluate"]),
        *(_speed(details) for details in of["benchmark"]),
        *(_images(details) for details in of["benchmark"] if "pipeline" in details),
    ]
    return "\n\n".join(parts) + "\n"


def _about(workspace: Workspace, records: dict[str, Any]) -> str:
    if missing := {*workspace.checkpoint_inputs} - records.keys():
        raise InputError(
            f"{workspace.root}: expected what `quest-deploy run` makes, and "
            f"{', '.join(sorted(missing))} has not run or is out of date"
        )
    scheme, contents = workspace.scheme, records[workspace.checkpoint_inputs[0]].details
    made = records[workspace.checkpoint_stage].made
    versions = ", ".join(
        f"{name} {made[name]}" for name in ("quest-deploy", "torch") if name in made
    )
    built = (x.details["hardware"] for name, x in records.items() if "build-engine/" in name)
    processors = {x["processor"] for x in built if "processor" in x}
    machine = ", ".join([system(made.get("platform", "")), *sorted(processors)])
    lines = [
        f"{workspace.model} at {scheme.name}, {scheme.buckets} timestep buckets: "
        f"{contents['layers']} layers read {contents['sites']} tensors; "
        f"{contents['weights_at_4_bits']:.1%} of the weights are at 4 bits. Made with {versions}, "
        f"on {machine}."
    ]
    if "export" in records:
        graph = records["export"].details
        lines.append(
            f"The graph takes {size(graph['bytes'])} for {size(graph['fp32_weight_bytes'])} of "
            "FP32 weights."
        )
    return "\n".join(lines)


def _verification(details: dict[str, Any]) -> str:
    codes, differ, unexplained = (
        sum(b[key] for b in details["buckets"]) for key in ("codes", "mismatches", "unexplained")
    )
    verdict = "passed" if details["passed"] else "FAILED"
    return (
        f"Verification on {details['backend']}: {verdict}; {codes:,} codes compared, {differ} "
        f"differ, {unexplained} of them without a rounding tie; worst layer "
        f"{max(x['error'] for x in details['layers']):.1e}, allowed "
        f"{details['layer_tolerance']:.0e}."
    )


def _quality(details: dict[str, Any]) -> str:
    results, sampling = details["results"], details["sampling"]
    rows = [
        [title, *(_shown(key, quality.get(key), form) for quality in results.values())]
        for key, (title, form) in QUALITY.items()
        if any(key in quality for quality in results.values())
    ]
    title = (
        f"{sampling['images']} images, {sampling['steps']} steps of {sampling['scheduler']}, "
        f"guidance {sampling['guidance']:g}"
    )
    return _table([title, *results], rows)


def _shown(key: str, value: float | None, form: str) -> str:
    """A value; no PSNR means no difference, and no SSIM images that are too small for it."""
    if value is None:
        return "same" if key == "psnr" else "none"
    return form.format(value)


def _speed(details: dict[str, Any]) -> str:
    rows = [
        [
            t["engine"],
            str(t["batch"]),
            f"{1e3 * t['median_s']:.2f}",
            f"{1e3 * t['p90_s']:.2f}",
            f"{t['samples_per_s']:.4g}",
        ]
        for t in sorted(details["timings"], key=lambda t: t["batch"])
    ]
    sizes = [
        [f["engine"], size(f["file_bytes"]), size(f["peak_memory_bytes"])]
        for f in details["footprints"]
    ]
    first = f"UNet on {details['backend']}"
    return "\n\n".join(
        [
            _table([first, "batch", "median ms", "p90 ms", "samples/s"], rows),
            _table(["engine", "files", "peak memory"], sizes),
        ]
    )


def _images(details: dict[str, Any]) -> str:
    whole = details["pipeline"]
    engines = whole["engines"]
    rows = [
        [part, *(f"{1e3 * x['parts'][part]:.2f} ms" for x in engines)]
        for part in engines[0]["parts"]
    ]
    rows += [
        [f"one of {engines[0]['unet_calls']} UNet calls"]
        + [f"{1e3 * x['unet_call_s']:.2f} ms" for x in engines],
        ["whole image", *(f"{1e3 * x['total_s']:.2f} ms" for x in engines)],
        ["images/s", *(f"{x['images_per_s']:.4g}" for x in engines)],
        ["peak memory", *(size(x["peak_memory_bytes"]) for x in engines)],
    ]
    first = (
        f"{details['backend']}, {whole['images']} of {whole['height']}x{whole['width']}, "
        f"{whole['steps']} steps of {whole['scheduler']}"
    )
    return _table([first, *(x["engine"] for x in engines)], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def write(workspace: Workspace, folder: Path = FOLDER) -> None:
    """Write the report's page and the tables into ``folder``; raise InputError where the workspace
    is not finished.
    """
    name = f"{workspace.model}-{workspace.scheme.name}"
    text = (
        f"# Results of {name}\n\n[The page that `quest-deploy report` writes]"
        f"({quote(name)}.html), and its tables. `make docs-results` makes both.\n\n"
        f"{tables(workspace)}"
    )
    qd.report(workspace, output=folder / f"{name}.html")
    with atomic_file(folder / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


def listed(site: str) -> str:
    """The text of mkdocs.yml with the page in the index of the site."""
    if ENTRY in site:
        return site
    if NAV not in site:
        raise InputError(f"{SITE}: expected {NAV.strip()!r}; add {ENTRY.strip()!r} by hand")
    return site.replace(NAV, NAV + ENTRY)


def run(model: str, bits: str, backend: str) -> Workspace:
    """Everything for a model, whole images among it; goes on where it was interrupted."""
    workspace = RunArguments(model=model, bits=bits).opened()
    options = {
        "calibrate": pipeline.calibration(workspace, {}, None),
        "finetune": pipeline.kept(FINETUNE, workspace, {}),
        "benchmark": BENCHMARK,
    }
    backends = pipeline.available([backend], (), if_available=False)
    ended = pipeline.run(workspace, backends, options, _tell, lambda *_: None)
    _tell(*ended.failed.values(), ended.results["report"]["page"])
    return workspace


def _tell(*words: object) -> None:
    """What is no table: standard output is ready to paste."""
    print(*words, file=sys.stderr)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-w", "--workspace", type=Path)
    parser.add_argument("--write", action="store_true", help="write docs/results/")
    parser.add_argument("--run", metavar="MODEL", help="run everything for a model first")
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--backend", default="openvino")
    chosen = parser.parse_args()
    if (chosen.run is None) == (chosen.workspace is None):
        parser.error("expected either --workspace or --run")
    try:
        workspace = (
            Workspace.open(chosen.workspace)
            if chosen.run is None
            else run(chosen.run, chosen.bits, chosen.backend)
        )
        print(tables(workspace))
        if chosen.write:
            write(workspace)
            SITE.write_text(listed(SITE.read_text(encoding="utf-8")), encoding="utf-8")
    except QuestDeployError as e:
        _tell(f"error: {e}")
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
