"""`quest-deploy verify`: compare an engine with the fake-quantized model, per layer and end to end,
per bucket.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from quest_deploy.artifacts.workspace import ENGINES, REFERENCE, REPORTS
from quest_deploy.backends.base import EngineOptions, engine_options
from quest_deploy.backends.registry import get_backend
from quest_deploy.cli.console import Console, table
from quest_deploy.cli.options import (
    DEFAULT_BACKEND,
    BackendOption,
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    open_workspace,
)
from quest_deploy.cli.stage import run_stage
from quest_deploy.files import write_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.cli.console import Update


def verify_stage(
    workspace: Workspace, console: Console, backend: str, *, reuse: bool = False
) -> dict[str, Any]:
    """Verify the engine of ``backend``; writes reports/verify-<backend>.json."""
    verified = get_backend(backend)
    verified.check_run(EngineOptions())  # at once, before any file is read
    report = workspace.path(REPORTS, f"verify-{backend}.json")

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        from quest_deploy.verification.checks import verify_engine

        engine = workspace.path(ENGINES, backend)
        options = engine_options(verified, engine)
        details = verify_engine(
            verified, options, engine, workspace.path(REFERENCE), update
        ).to_json()
        write_json(report, details)
        return [report], details

    inputs = (f"build-engine/{backend}", "reference")
    return run_stage(
        workspace, console, f"verify/{backend}", inputs=inputs, options={}, reuse=reuse, work=work
    )


def describe(details: dict[str, Any]) -> str:
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
        _describe_coverage(details["coverage"]),
        f"{len(details['layers'])} layers: {codes} codes compared, {mismatches} differ, "
        f"{sum(b['unexplained'] for b in details['buckets'])} of them unexplained by a rounding "
        "tie "
        "(allowed: 0)",
        f"worst layer {max(x['error'] for x in details['layers']):.1e} (allowed: "
        f"{details['layer_tolerance']:.0e})",
        _describe_segments(details["segments"]),
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


def _describe_coverage(coverage: dict[str, Any]) -> str:
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


def _describe_segments(segments: list[dict[str, Any]]) -> str:
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


def verify(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    backend: BackendOption = DEFAULT_BACKEND,
    as_json: JsonOption = False,
) -> None:
    """Verify an engine against the fake-quantized model; exit code 1 if it differs."""
    console = Console(as_json=as_json)
    get_backend(backend)
    opened = open_workspace(workspace, model, bits)
    details = verify_stage(opened, console, backend)
    console.result({"workspace": str(opened.root), **details}, describe(details))
    if not details["passed"]:
        console.note(
            f"error: {failure(details)}"
        )  # beside the report, which --json keeps the only value on standard output
        raise typer.Exit(1)


def failure(details: dict[str, Any]) -> str:
    """What a failed verification comes down to: its first problem."""
    return (
        f"the {details['backend']} engine does not compute the fake-quantized model: "
        f"{details['problems'][0]}"
    )
