"""`quest-deploy run`: every stage in order, skipping those whose inputs have not changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.backends.registry import BACKENDS
from quest_deploy.cli.console import Console
from quest_deploy.cli.descriptions import describe, summary
from quest_deploy.cli.options import (
    METHOD_HELP,
    AttentionBitsOption,
    BitsOption,
    BucketsOption,
    GranularityOption,
    JsonOption,
    LoraOption,
    ModelOption,
    RandomWeightsOption,
    RevisionOption,
    SoftmaxBitsOption,
    SplitShortcutsOption,
    WorkspaceOption,
    given,
)
from quest_deploy.stages import api
from quest_deploy.stages.options import DEFAULT_BACKEND, CalibrateOptions

if TYPE_CHECKING:
    from quest_deploy.artifacts.workspace import Workspace


def run(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    revision: RevisionOption = None,
    random_weights: RandomWeightsOption = False,
    lora: LoraOption = None,
    bits: BitsOption = None,
    buckets: BucketsOption = None,
    granularity: GranularityOption = None,
    attention_bits: AttentionBitsOption = None,
    softmax_bits: SoftmaxBitsOption = None,
    split_shortcuts: SplitShortcutsOption = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=METHOD_HELP,
            show_default=f"the workspace's, or {CalibrateOptions.method}",
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Backends to verify and benchmark: {', '.join(BACKENDS)}; may be repeated.",
            show_default=DEFAULT_BACKEND,
        ),
    ] = None,
    build_only: Annotated[
        list[str] | None,
        typer.Option(help="Backends to build for, without running; may be repeated."),
    ] = None,
    if_available: Annotated[
        bool,
        typer.Option(
            "--if-available",
            help="Leave out, by name, the backends that this machine lacks, unless it lacks all.",
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(help="Of calibration and finetuning.", show_default="the workspace's, or 0"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Go from the FP32 model to verified, benchmarked engines and a picture; goes on where it was
    interrupted.

    What was calibrated or finetuned with options of its own keeps them. An engine that fails its
    verification is neither benchmarked nor drawn with; the others are, and the exit code is 1.
    """
    chosen, console = given(locals()), Console(as_json=as_json)

    def show(opened: Workspace, stage: str, details: Any) -> None:
        if not as_json:
            print(f"\n== {stage}\n{describe(opened, stage.replace(' ', '/'))}", flush=True)

    ended = api.run(**chosen, on_result=show, progress=console)
    results = {
        "workspace": str(ended.workspace.root),
        "left_out": ended.backends.left_out,
        "failed": ended.failed,
        **ended.results,
    }
    console.result(results, "", "== summary", summary(ended))
    if ended.failed:
        # After the result, which --json keeps one value.
        console.note(f"error: {'; '.join(ended.failed.values())}")
        raise typer.Exit(1)
