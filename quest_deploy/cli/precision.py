"""How `inspect` and `benchmark` print what precision layers run in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.console import table
from quest_deploy.files import size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.evaluation.precision import LayerPrecision, PrecisionReport


def describe(report: PrecisionReport, *, layers: bool) -> str:
    """A table of the kinds of layers, or of all ``layers``, then the shares, the sizes and the
    warnings.
    """
    summary = report.summary()
    return "\n".join([_all(report) if layers else _kinds(report), *describe_summary(summary)])


def describe_summary(summary: dict[str, Any]) -> list[str]:
    """The lines that tell a summary's shares, sizes and warnings."""
    shares = ", ".join(f"{share:.1%} in {kind}" for kind, share in summary["shares"].items())
    asked = f"multiply-adds: {summary['asked_int8_share']:.1%} asked to run on integers"
    return [
        asked + (f"; run {shares}" if shares and not summary["unavailable"] else ""),
        *(
            [f"what they run in is not known here: {summary['unavailable']}"]
            if summary["unavailable"]
            else []
        ),
        describe_sizes(summary["sizes"]),
        *(f"warning: {warning}" for warning in summary["warnings"]),
    ]


def describe_sizes(sizes: dict[str, Any]) -> str:
    """The sizes in words."""
    engine = "" if sizes["engine"] is None else f"engine {size(sizes['engine'])}, its "
    return (
        f"{engine}graph {size(sizes['graph'])}, {sizes['fp16'] / sizes['graph']:.2f}x smaller than "
        f"FP16 ({size(sizes['fp16'])}); "
        f"the codes alone, and all else in FP16, take {size(sizes['ideal'])}"
    )


def _kinds(report: PrecisionReport) -> str:
    groups: dict[tuple[str, str, str], list[LayerPrecision]] = {}
    for layer in report.layers:
        groups.setdefault((layer.group, layer.bits, layer.runs_in or ""), []).append(layer)
    total = sum(layer.macs for layer in report.layers) or 1
    rows = [
        [
            group,
            str(len(layers)),
            bits,
            f"{sum(x.macs for x in layers) / total:.1%}",
            *_runs_in(report, runs_in),
        ]
        for (group, bits, runs_in), layers in groups.items()
    ]
    return table(
        [
            "kind of layer",
            "layers",
            "bits asked for",
            "multiply-adds",
            *_runs_in(report, "runs in"),
        ],
        rows,
    )


def _all(report: PrecisionReport) -> str:
    rows = [
        [x.name, x.operator, x.bits, str(x.macs), *_runs_in(report, x.runs_in or "")]
        for x in report.layers
    ]
    return table(
        ["layer", "operator", "bits asked for", "multiply-adds", *_runs_in(report, "runs in")], rows
    )


def _runs_in(report: PrecisionReport, cell: str) -> Iterable[str]:
    return [cell] if report.shares else []
