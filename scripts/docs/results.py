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
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import quest_deploy as qd
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.backends.registry import get_backend
from quest_deploy.cli import speed
from quest_deploy.cli.console import discard_output
from quest_deploy.cli.precision import describe_summary
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.evaluation.report_page.facts import system
from quest_deploy.files import atomic_file, size
from quest_deploy.stages import FINETUNE
from quest_deploy.stages import run as pipeline
from quest_deploy.stages.arguments import RunArguments
from quest_deploy.stages.options import BenchmarkOptions

if TYPE_CHECKING:
    from quest_deploy.stages.results import Benchmark

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "results"
SITE = ROOT / "mkdocs.yml"
NAV, ENTRY = "  - Measured:\n", "      - results/README.md\n"
"""Where the index of the site lists the page."""
BENCHMARK = BenchmarkOptions(batch=(1, 2), runs=20, static=False, pipeline=True)
"""What `--run` times: a third engine may not fit."""
BACKENDS = {
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "tensorrt-rtx": "TensorRT-RTX",
    "tensorrt": "TensorRT",
}
"""As the report's page calls them."""
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
        *(_benchmark(cast("Benchmark", details)) for details in of["benchmark"]),
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


def _named(name: str) -> str:
    """A backend's name as the report's page has it; that of another contestant as it is."""
    return BACKENDS.get(name, name)


def _verification(details: dict[str, Any]) -> str:
    codes, differ, unexplained = (
        sum(b[key] for b in details["buckets"]) for key in ("codes", "mismatches", "unexplained")
    )
    verdict, backend = "passed" if details["passed"] else "FAILED", _named(details["backend"])
    return (
        f"Verification on {backend}: {verdict}; {codes:,} codes compared, {differ} "
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
    return _table([title, *map(_named, results)], rows)


def _shown(key: str, value: float | None, form: str) -> str:
    """A value; no PSNR means no difference, and no SSIM images that are too small for it."""
    if value is None:
        return "same" if key == "psnr" else "none"
    return form.format(value)


def _benchmark(details: Benchmark) -> str:
    backend, summary = _named(details["backend"]), details["precision"]
    found = [
        _table(*speed.timings(f"UNet on {backend}", details)),
        _table(*speed.footprints(f"Engine for {backend}", details)),
        f"On {backend}, a gain above 1x being faster or smaller:",
        "\n".join(f"- {x}" for x in [*speed.sizes(details), *describe_summary(summary)]),
    ]
    if "pipeline" in details:
        whole = details["pipeline"]
        title = f"Whole images on {backend}, {speed.drawings(whole)}"
        found.append(_table(*speed.image_times(title, whole)))
    return "\n\n".join(found)


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
    parser.add_argument("--bits", help="of --run; w4a8 by default")
    parser.add_argument("--backend", help="of --run; openvino by default")
    chosen = parser.parse_args()
    if (chosen.run is None) == (chosen.workspace is None):
        parser.error("expected either --workspace or --run")
    try:
        if chosen.backend is not None:
            get_backend(chosen.backend)
        if chosen.run is None and (chosen.bits or chosen.backend):
            parser.error(
                "--bits, --backend: expected with --run alone; all that is in a workspace is shown"
            )
        workspace = (
            Workspace.open(chosen.workspace)
            if chosen.run is None
            else run(chosen.run, chosen.bits or "w4a8", chosen.backend or "openvino")
        )
        if chosen.write:
            write(workspace)
            SITE.write_text(listed(SITE.read_text(encoding="utf-8")), encoding="utf-8")
        print(tables(workspace), flush=True)
    except BrokenPipeError:
        discard_output()
        sys.exit(1)
    except QuestDeployError as e:
        _tell(f"error: {e}")
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
