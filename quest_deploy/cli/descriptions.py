"""What each stage reports, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.workspace import (
    CALIBRATED,
    CHECKPOINT,
    ENGINES,
    GRAPH,
    IMAGES,
    PARTS,
    REFERENCE,
    REPORTS,
    SENSITIVITY_REPORT,
)
from quest_deploy.cli.console import in_float, table
from quest_deploy.files import size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.cli.console import Console
    from quest_deploy.stages.results import (
        Benchmark,
        BuiltEngine,
        BuiltParts,
        Calibration,
        Evaluation,
        Export,
        ExportedParts,
        Finetuning,
        Folding,
        Generation,
        Import,
        Reference,
        Report,
        Sensitivity,
        Verification,
    )
    from quest_deploy.stages.run import Run

LISTED = 12
"""Of the most sensitive layers."""


def describe(workspace: Workspace, stage: str) -> str:
    """Return what a finished stage reports, in words; ``stage`` as the manifest calls it."""
    details = workspace.stages[stage].details
    return _DESCRIPTIONS[stage.partition("/")[0]](workspace, details)


def report(console: Console, workspace: Workspace, stage: str, backend: str | None = None) -> None:
    """Print what a finished stage reports."""
    name = f"{stage}/{backend}" if backend else stage
    details = workspace.stages[name].details
    console.result({"workspace": str(workspace.root), **details}, describe(workspace, name))


def calibration(workspace: Workspace, details: Calibration) -> str:
    """Describe the result of `calibrate`."""
    return (
        f"{workspace.model} at {workspace.scheme.name}: {details['layers']} layers read "
        f"{details['sites']} tensors, each with "
        f"{details['buckets']} activation scales\n"
        f"4-bit share: {details['weights_at_4_bits']:.1%} of the weights, "
        f"{details['macs_at_4_bits']:.1%} of the multiply-adds\n"
        + (
            f"{details['branches']} layers with branches of rank {workspace.scheme.low_rank}\n"
            if "branches" in details
            else ""
        )
        + f"{workspace.path(CALIBRATED)} ({size(details['checkpoint_bytes'])})"
    )


def imported(workspace: Workspace, details: Import) -> str:
    """Describe the result of `import`."""
    lines = [
        f"{details['layers']} layers, {details['sites']} quantized tensors, each with "
        f"{details['buckets']} sets of scales, "
        f"at {workspace.scheme.name}",
        f"{workspace.path(CALIBRATED)} ({size(details['checkpoint_bytes'])})",
        *in_float(details["in_float"], details["sites"]),
    ]
    if details["in_float"]:
        lines.append("--recalibrate chooses scales that do not")
    return "\n".join(lines)


def folding(workspace: Workspace, details: Folding) -> str:
    """Describe the result of `lora`."""
    return (
        f"{workspace.model} at {workspace.scheme.name}: {named_loras(workspace.source.to_json())}\n"
        f"{details['changed_layers']} layers changed, the rest and all activation scales are those "
        f"of {details['base']} ({details['method']})\n"
        f"{workspace.path(CALIBRATED)} ({size(details['checkpoint_bytes'])})"
    )


def named_loras(content: Mapping[str, Any]) -> str:
    """The LoRAs of a model's source, with their weights."""
    named = ", ".join(f"{lora['path']} at {lora['weight']:g}" for lora in content["loras"])
    return f"LoRAs {named or 'none'}"


def sensitivity(workspace: Workspace, details: Sensitivity) -> str:
    """The most sensitive layers and the kinds of layers as tables, and what stage 2 of finetuning
    would train.
    """
    from quest_deploy.calibration.sensitivity import SENSITIVE_SHARE  # needs torch

    layers, selected = details["layers"], details["selected"]
    worst = [
        [
            x["layer"],
            x["group"],
            f"{x['mse']:.1e}",
            f"{x['relative_mse']:.1e}",
            "yes" if x["layer"] in selected else "",
        ]
        for x in sorted(layers, key=lambda layer: -layer["mse"])[:LISTED]
    ]
    total = sum(x["mse"] for x in layers) or 1.0
    groups: dict[str, list[float]] = {}
    for x in layers:
        groups.setdefault(x["group"], []).append(x["mse"])
    kinds = [
        [group, str(len(errors)), f"{sum(errors):.1e}", f"{sum(errors) / total:.1%}"]
        for group, errors in sorted(groups.items(), key=lambda item: -sum(item[1]))
    ]
    return "\n".join(
        [
            f"{len(layers)} layers, each quantized alone, {details['samples']} samplings; the "
            "worst:",
            table(["layer", "kind", "e-MSE", "relative", "picked"], worst),
            "",
            table(["kind", "layers", "summed e-MSE", "share"], kinds),
            "",
            f"picked for stage 2: {len(selected)} layers, which make {SENSITIVE_SHARE:.0%} of the "
            "error of all but time_emb_proj and products, every bucket counting the same",
            f"{workspace.path(REPORTS, SENSITIVITY_REPORT)}, "
            f"{workspace.path(IMAGES, 'sensitivity.png')}",
        ]
    )


def finetuning(workspace: Workspace, details: Finetuning) -> str:
    """Describe the result of `finetune`."""
    loss = (
        ""
        if details["final_loss"] is None
        else f", loss over the last 50: {details['final_loss']:.4f}"
    )
    checkpoint = f"{workspace.path(CHECKPOINT)} ({size(details['checkpoint_bytes'])})"
    return (
        f"{details['steps']} steps, the last run took {details['seconds']:.0f} "
        f"s{loss}\n{checkpoint}"
    )


def export(workspace: Workspace, details: Export) -> str:
    """Describe the result of `export`."""
    weights = size(details["fp32_weight_bytes"])
    return "\n".join(
        [
            f"{workspace.path(GRAPH)} ({size(details['bytes'])}; the layers' weights alone are "
            f"{weights} in FP32)",
            f"method {details['method']}, {details['layers']} layers, "
            f"{details['sites']} quantized tensors with {details['buckets']} scales each",
            *in_float(
                details.get("float_sites", {}), details["sites"]
            ),  # records of earlier versions have none
        ]
    )


def reference(workspace: Workspace, details: Reference) -> str:
    """Describe the result of `reference`."""
    records, measured = details["records"], details["measured_records"]
    within = "" if measured == records else f" (measured in {measured} of {records} records)"
    return (
        f"{workspace.path(REFERENCE)}: {records} records cover {details['buckets']} buckets "
        f"and {details['sites']} of {details['all_sites']} quantized tensors "
        f"({size(details['bytes'])})\n"
        "last-bit differences alone change this model's output by up to "
        f"{details['largest_sensitivity']:.1%}{within}"
    )


def described_hardware(hardware: Mapping[str, Any]) -> str:
    """What an engine runs on, by its record."""
    return ", ".join(
        value if isinstance(value, str) else "compute capabilities " + " ".join(value)
        for value in hardware.values()
    )


def built_engine(workspace: Workspace, details: BuiltEngine) -> str:
    """Describe the result of `build-engine`."""
    files = ", ".join(f"{name} {size(count)}" for name, count in details["files"].items())
    how = {
        "plugin": ", quantized by the plugin",
        "native": ", quantized natively",
        "gathered": ", quantized by gathered scales",
    }.get(details.get("quantize", ""), "")
    made = "built"
    if (refit := details.get("refit")) is not None:
        made = (
            f"{refit['weights']} weights changed in a copy of {refit['workspace']}'s, which took "
            f"{refit['seconds']:.1f} s,"
        )
    return (
        f"{workspace.path(ENGINES, details['backend'])}, {made} in {details['seconds']:.1f} s "
        f"for {described_hardware(details['hardware'])}{how}\n{files}"
    )


def exported_parts(workspace: Workspace, details: ExportedParts) -> str:
    """Describe the result of `export-parts`."""
    lines = [f"{workspace.path(PARTS)}, weights in {details['weights']}"]
    lines += [f"{name} {size(count)}" for name, count in details["parts"].items()]
    lines += [f"{name} is left out: {why}" for name, why in details["left_out"].items()]
    return "\n".join(lines)


def built_parts(workspace: Workspace, details: BuiltParts) -> str:
    """Describe the result of `build-parts`."""
    parts = ", ".join(f"{name} {size(count)}" for name, count in details["parts"].items())
    return (
        f"{workspace.path(PARTS)}, built in {details['seconds']:.1f} s for {details['backend']} on "
        f"{described_hardware(details['hardware'])}, in {details['dtype']}\n{parts}"
    )


def verification(details: Verification) -> str:
    """The details as a table, a verdict, and what is wrong."""
    rows = [
        [
            str(b["bucket"]),
            f"{b['timestep']:g}",
            str(b["sites"]),
            str(b["codes"]),
            str(b["mismatches"]),
            str(b["unexplained"]),
            f"{b['layer_error']:.1e}",
            f"{b['segment_error']:.1e}",
            f"{b['end_to_end_error']:.1e}",
        ]
        for b in details["buckets"]
    ]
    header = [
        "bucket",
        "timestep",
        "tensors",
        "codes",
        "differ",
        "unexplained",
        "worst layer",
        "worst segment",
        "end to end",
    ]
    codes, mismatches = (sum(b[key] for b in details["buckets"]) for key in ("codes", "mismatches"))
    lines = [
        table(header, rows),
        _coverage(details["coverage"]),
        f"{len(details['layers'])} layers: {codes} codes compared, {mismatches} differ, "
        f"{sum(b['unexplained'] for b in details['buckets'])} of them unexplained by a rounding "
        "tie "
        "(allowed: 0)",
        f"worst layer {max(x['error'] for x in details['layers']):.1e} (allowed: "
        f"{details['layer_tolerance']:.0e})",
        _segments(details["segments"]),
        f"worst end to end {max(b['end_to_end_error'] for b in details['buckets']):.1e} "
        f"(allowed: {details['end_to_end_tolerance']:.1e}, twice the model's own sensitivity to "
        "last-bit differences)",
        *(
            []
            if details["end_to_end_informative"]
            else ["end to end is not informative for this model: layers and segments decide"]
        ),
        *(f"problem: {problem}" for problem in details["problems"][:10]),
        f"verification on {details['backend']}: {'PASSED' if details['passed'] else 'FAILED'}",
    ]
    return "\n".join(lines)


def _coverage(coverage: dict[str, Any]) -> str:
    fewest, most, unchecked = (
        coverage["fewest_buckets"],
        coverage["most_buckets"],
        coverage["unchecked"],
    )
    line = (
        f"checked {coverage['sites']} of {coverage['all_sites']} quantized tensors and "
        f"{coverage['layers']} of "
        f"{coverage['all_layers']} layers, each in "
        f"{fewest if fewest == most else f'{fewest} to {most}'} of "
        f"{coverage['all_buckets']} buckets"
    )
    if not unchecked:
        return line
    return (
        f"{line}; unchecked, as the reference's records had no room: "
        f"{', '.join(unchecked[:3])}{', ...' * (len(unchecked) > 3)}"
    )


def _segments(segments: list[dict[str, Any]]) -> str:
    worst = max(segments, key=lambda x: x["error"] / x["tolerance"])
    line = (
        f"{len(segments)} segments between layers, what rounding alone does to each allowed for: "
        "the nearest to its limit, before "
        f"{worst['segment']}, {worst['error']:.1e} (allowed: {worst['tolerance']:.0e})"
    )
    vague = [x["segment"] for x in segments if not x["informative"]]
    if not vague:
        return line
    return (
        f"{line}; {len(vague)} of them say nothing, since rounding alone changes them so much: "
        f"before {', '.join(vague[:3])}"
    )


def benchmark(workspace: Workspace, details: Benchmark) -> str:
    """The details as tables, and the ratios in words."""
    from quest_deploy.cli import speed  # slow to import

    return speed.benchmark(workspace, details)


def generation(details: Generation) -> str:
    """Describe the result of `generate`."""
    pictures = details.get("pictures", [details["picture"]])
    return (
        f"{details['picture']}: {details['images']} images"
        if len(pictures) == 1
        else "\n".join(pictures)
    )


def evaluation(details: Evaluation) -> str:
    """The details as a table; epsilon-MSE as the mean over the upper and the lower half of the
    buckets.
    """
    results, sampling = details["results"], details["sampling"]
    judged = _judged(details)
    rows = []
    for name, quality in results.items():
        errors = [e for e in quality["epsilon_mse"] if e is not None]
        clean, noisy = errors[: max(1, len(errors) // 2)], errors[len(errors) // 2 :]
        rows.append(
            [
                name,
                *([show(quality[key]) for key, (_, show) in JUDGED.items()] if judged else []),
                _psnr(quality),
                _ssim(quality),
                *(show(quality[key]) for key, (_, show) in PERCEPTUAL.items() if key in quality),
                f"{sum(noisy) / len(noisy):.4f}",
                f"{sum(clean) / len(clean):.4f}",
            ]
        )
    caption = (
        f"{sampling['images']} images, {sampling['steps']}-step {sampling['scheduler']}, "
        f"guidance {sampling['guidance']:g}; PSNR and SSIM to FP32's images"
    )
    titles = [title for title, _ in JUDGED.values()] if judged else []
    others = [title for key, (title, _) in PERCEPTUAL.items() if key in results["FP32"]]
    measures = ["", *titles, "PSNR, dB", "SSIM", *others, "e-MSE, t high", "e-MSE, t low"]
    return "\n".join([caption, table(measures, rows), f"side by side: {details['picture']}"])


def report_page(details: Report) -> str:
    """Describe the result of `report`: the page, and the commands that make what it lacks."""
    commands = dict.fromkeys(x for found in details["missing"].values() for x in found if x)
    return "\n".join(
        [
            f"{details['page']} ({size(details['bytes'])})",
            *(["not in it yet, and made by:"] if commands else []),
            *(f"  {command}" for command in commands),
        ]
    )


def evaluation_summary(details: Evaluation) -> str:
    """The details in a few lines."""
    results = details["results"]

    def told(show: Callable[[dict[str, Any]], str]) -> str:
        return "  ".join(f"{name} {show(quality)}" for name, quality in results.items())

    if not _judged(details):
        lines = [f"PSNR to FP32's images, dB: {told(_psnr)}"]
    else:
        lines = [
            f"Frechet distance (lower is better): {told(lambda x: _number(x['frechet_distance']))}",
            f"prompt nearest of all to its image: {told(lambda x: _share(x['top1']))}",
        ]
    return "\n".join([*lines, f"side by side: {details['picture']}"])


def _judged(details: Evaluation) -> bool:
    return all("frechet_distance" in quality for quality in details["results"].values())


def _number(value: float) -> str:
    return f"{value:.2f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


JUDGED: dict[str, tuple[str, Callable[[float], str]]] = {
    "frechet_distance": ("Frechet distance", _number),
    "top1": ("top 1", _share),
    "top5": ("top 5", _share),
    "feature_distance": ("feature distance", _number),
}
"""What a model's judge says, how it is called in a table, and how it is shown."""
PERCEPTUAL: dict[str, tuple[str, Callable[[float], str]]] = {
    "lpips": ("LPIPS", "{:.3f}".format),
    "clip_score": ("CLIP score", _number),
    "fid": ("FID", _number),
}
"""What is measured where the user names the weights."""


def _psnr(quality: dict[str, Any]) -> str:
    return "same" if quality["psnr"] is None else f"{quality['psnr']:.2f}"


def _ssim(quality: dict[str, Any]) -> str:
    return "none" if quality["ssim"] is None else f"{quality['ssim']:.3f}"


def summary(ended: Run) -> str:
    """How a run ended, in a few lines."""
    from quest_deploy.cli import speed  # slow to import

    results = ended.results
    lines = [
        evaluation_summary(details)
        for stage, details in results.items()
        if stage.startswith("evaluate ")
    ]
    for name, reason in ended.failed.items():
        verified = results.get(f"verify {name}")
        what = "verification FAILED" if verified and not verified["passed"] else "FAILED"
        lines.append(f"{name}: {what}: {reason}")
    for name in ended.passed:
        verified, timed = results[f"verify {name}"], results[f"benchmark {name}"]
        codes, different = (
            sum(b[key] for b in verified["buckets"]) for key in ("codes", "mismatches")
        )
        lines += [
            f"{name}: verification PASSED ({codes} codes, {different} at rounding ties differ)",
            f"{name}: speed {speed.speeds(timed)}; {speed.files(timed)}",
        ]
    lines += [f"{name}: left out: {reason}" for name, reason in ended.backends.left_out.items()]
    graph = results["export"]
    lines.append(
        f"graph: {size(graph['bytes'])} for {size(graph['fp32_weight_bytes'])} of FP32 weights"
    )
    lines += [
        f"picture: {details['picture']}"
        for stage, details in results.items()
        if stage.startswith("generate ")
    ]
    if not ended.passed:
        lines.append("pictures, evaluation: left out, no engine passed its verification")
    lines.append(f"report: {results['report']['page']}")
    return "\n".join(lines)


_DESCRIPTIONS: dict[str, Callable[[Workspace, Any], str]] = {
    "calibrate": calibration,
    "import": imported,
    "lora": folding,
    "sensitivity": sensitivity,
    "finetune": finetuning,
    "export": export,
    "reference": reference,
    "build-engine": built_engine,
    "export-parts": exported_parts,
    "build-parts": built_parts,
    "verify": lambda _, details: verification(details),
    "benchmark": benchmark,
    "generate": lambda _, details: generation(details),
    "evaluate": lambda _, details: evaluation(details),
    "report": lambda _, details: report_page(details),
}
