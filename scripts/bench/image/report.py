"""The page: a table for each kind of machine, and who is ahead of whom, from the figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scripts.bench.image.limits import SIDE
from scripts.bench.image.prepare import PROMPT
from scripts.bench.image.quality import CALIBRATION_SAMPLES, STEPS
from scripts.bench.image.rows import rows_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from scripts.bench.image.rows import Row

    Figures = Mapping[str, Any]
    """Of one machine, what ``__main__`` keeps in its file."""

GIB, MB, TERA = 2**30, 1e6, 1e12
NONE = "-"
SAME = 0.03
"""What times differ by from one run to the next."""
COLUMNS = (
    "program",
    "first image, cold, s",
    "text encoder, s",
    "UNet, a step, s",
    "UNet, all, s",
    "VAE, s",
    "image, s",
    "peak, GiB",
    "disk, MB",
    "error of predictions",
    "emoji PSNR, dB",
    "SSIM",
)
LIMIT_COLUMNS = (
    "ours",
    "a step, s",
    "convolutions and linears, s",
    "attention, s",
    "the rest, s",
    "attention at the peak, s",
    "limit, s",
    "peak, 10^12 multiply-adds a second",
    "step beside the limit",
)


def page(machines: Iterable[Figures]) -> str:
    """Each machine's table, with what it was measured on, and the answer."""
    lines = [
        "# Whole images on a CPU",
        "",
        "Written by `make bench-image`; `scripts/bench/image` says how each figure is measured.",
        "",
    ]
    for machine in machines:
        lines += [f"## {machine['processor']} ({machine['instructions']})", ""]
        lines += [*_about(machine), "", *_table(machine), "", *_remarks(machine), ""]
        lines += [*answer(machine), "", *_limits(machine)]
    return "\n".join(lines)


def measured(machine: Figures, row: Row) -> dict[str, Any] | None:
    """The figures of a row; None where there are none."""
    entry = machine["rows"].get(row.name, {})
    found: dict[str, Any] | None = entry.get("figures")
    return found


def _about(machine: Figures) -> list[str]:
    """What was drawn, when, and by which versions."""
    entries = [x for x in machine["rows"].values() if "figures" in x]
    if not entries:
        return ["Nothing is measured yet."]
    asked = entries[0]["definition"]
    dates = sorted({entry["date"] for entry in entries})
    packages = sorted(
        {
            f"{name} {version}"
            for entry in entries
            for name, version in entry["figures"]["versions"].items()
        }
    )
    measured_on = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return [
        f"Stable Diffusion 1.5 with random weights at {asked['width']}x{asked['height']} (size "
        f"`{asked['size']}`), {asked['steps']} steps, guidance {asked['guidance']}, batch 1, "
        f"“{PROMPT}”; {asked['threads']} threads, a process for each row, one after the other, "
        "files in the system's cache. What is not said to be in bf16 computes in FP32 beside the "
        "integers. The cold image is counted from the start of its process: our engines were "
        "compiled when they were built, as far as OpenVINO keeps that; the others compile when "
        "they open, as they do unless a user gives them a cache. The rest is of a second image in "
        f"the same process, of which {asked['warm_steps']} steps are drawn and all count as their "
        "median; peak is the process's, of both images. The error is the relative L2 distance of "
        "the UNet's predictions from torch's FP32, on the same inputs, with random weights. Ours "
        f"and NNCF's are calibrated on the same {asked['buckets']} inputs, ours by min-max, a "
        "bucket for each; NNCF's by its defaults (means of the inputs' minima and maxima, and for "
        "INT8 SmoothQuant and bias correction). PSNR and SSIM are of the trained embedded model's "
        "images beside its FP32's: random weights say nothing of images. It is calibrated for them "
        f"on {CALIBRATION_SAMPLES} samplings of {STEPS} steps, ours and NNCF's on the same, and "
        "not finetuned.",
        "",
        f"Measured {measured_on}, with {', '.join(packages)}.",
    ]


def _table(machine: Figures) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in rows_of(machine["instructions"]):
        if (found := measured(machine, row)) is not None:
            lines.append(f"| {' | '.join([row.label, *_cells(machine, row, found)])} |")
    return lines


def _cells(machine: Figures, row: Row, found: Mapping[str, Any]) -> list[str]:
    times = ("first_image_s", "text_encoder_s", "unet_step_s", "unet_s", "vae_s", "image_s")
    quality = machine["quality"].get(row.quality, {})
    return [
        *(f"{found[name]:.2f}" for name in times),
        f"{found['peak_bytes'] / GIB:.2f}",
        f"{found['bytes'] / MB:.0f}",
        _number(found["error"], ".1e"),
        _number(quality.get("psnr"), ".1f"),
        _number(quality.get("ssim"), ".3f"),
    ]


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else f"{value:{form}}"


def _remarks(machine: Figures) -> list[str]:
    """What the reader must know of rows, and why others have no figures."""
    lines, missing = [], dict[str, list[str]]()
    for row in rows_of(machine["instructions"]):
        entry = machine["rows"].get(row.name, {})
        if "figures" not in entry:
            missing.setdefault(entry.get("reason", "not run yet"), []).append(row.label)
        elif row.remark:
            lines.append(f"- {row.label}: {row.remark}.")
    return [
        *lines,
        *(f"- Not measured: {'; '.join(rows)}: {reason}." for reason, rows in missing.items()),
    ]


def _limits(machine: Figures) -> list[str]:
    """Ours beside the least that the kernels allow; nothing where that is not measured."""
    found = machine.get("limits", {})
    rows = [row for row in rows_of(machine["instructions"]) if row.ours and row.quality in found]
    if not rows:
        return []
    lines = [
        "A step beside its limit: the convolutions' and linears' own time, and attention's "
        f"products at the rate of one product of {SIDE}x{SIDE} by {SIDE}x{SIDE}, in what they are "
        "in. "
        "Medians of runs of the engine alone, profiled, which have no other parts of a step.",
        "",
        f"| {' | '.join(LIMIT_COLUMNS)} |",
        f"|{'---|' * len(LIMIT_COLUMNS)}",
    ]
    for row in rows:
        each = found[row.quality]
        seconds = ("step_s", "layers_s", "attention_s", "other_s", "attention_at_peak_s", "limit_s")
        cells = [
            *(f"{each[name]:.2f}" for name in seconds),
            f"{each['peak'] / TERA:.2f}",
            f"{each['step_s'] / each['limit_s']:.2f}x",
        ]
        lines.append(f"| {' | '.join([_name(row), *cells])} |")
    return [*lines, ""]


def answer(machine: Figures) -> list[str]:
    """Who is ahead of whom, by the time of a whole image, and at which error of the UNet: our
    fastest row of 8 bits, weights of 7 among them, and where that errs more than the other program,
    our fastest that does not.
    """
    rows = rows_of(machine["instructions"])
    found = {row: figures for row in rows if (figures := measured(machine, row)) is not None}
    ours = {row: figures for row, figures in found.items() if row.ours}
    if not ours or len(ours) == len(found):
        return ["Nothing to compare yet."]
    of_8_bits = [row for row in ours if row.name.startswith(("ours-w7a8", "ours-w8a8"))]
    fastest = min(of_8_bits or ours, key=lambda row: ours[row]["image_s"])
    lines = [
        f"Our fastest of 8 bits is {_name(fastest)}: an image in "
        f"{ours[fastest]['image_s']:.1f} s, error {_number(ours[fastest]['error'], '.1e')}. Times "
        f"within {SAME:.0%} are called the same."
    ]
    for row, figures in found.items():
        if row.ours:
            continue
        error = figures["error"]
        as_exact = [] if error is None else [x for x in ours if ours[x]["error"] <= error]
        text = f"- {row.label} ({figures['image_s']:.1f} s, error {_number(error, '.1e')}): "
        text += _against(ours[fastest], figures, fastest)
        if fastest not in as_exact and error is not None:
            best = min(as_exact, key=lambda x: ours[x]["image_s"], default=None)
            text += "; " + (
                "none of ours errs as little"
                if best is None
                else f"at no larger error, {_against(ours[best], figures, best)}"
            )
        elif error is None:
            text += "; errors are not compared"
        lines.append(f"{text}.")
    return [lines[0], "", *lines[1:]]


def _against(ours: Mapping[str, Any], other: Mapping[str, Any], row: Row) -> str:
    ratio = other["image_s"] / ours["image_s"]
    same = 1 / (1 + SAME) <= ratio <= 1 + SAME
    side = "as fast" if same else "ahead of it" if ratio > 1 else "behind it"
    memory = ours["peak_bytes"] / other["peak_bytes"]
    return f"{_name(row)} is {side}, {ratio:.2f}x as fast with {memory:.2f}x its memory"


def _name(row: Row) -> str:
    return row.label.removeprefix("ours, ")
