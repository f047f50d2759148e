"""`quest-deploy run`: every stage in order, skipping those whose inputs have not changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.backends.base import EngineOptions
from quest_deploy.backends.registry import BACKENDS, get_backend
from quest_deploy.cli import (
    benchmark,
    build_engine,
    calibrate,
    evaluate,
    export,
    finetune,
    generate,
    reference,
    verify,
)
from quest_deploy.cli.console import Console, size
from quest_deploy.cli.options import (
    DEFAULT_BACKEND,
    AttentionBitsOption,
    BitsOption,
    BucketsOption,
    GranularityOption,
    JsonOption,
    LoraOption,
    ModelChoices,
    ModelOption,
    RandomWeightsOption,
    RevisionOption,
    SchemeChoices,
    SoftmaxBitsOption,
    SplitShortcutsOption,
    WorkspaceOption,
    create_workspace,
)
from quest_deploy.errors import InputError

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
            help=calibrate.METHOD_HELP,
            show_default=f"the workspace's, or {calibrate.DEFAULT_METHOD}",
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
    console = Console(as_json=as_json)
    lacking: dict[str, str] | None = {} if if_available else None
    backends = _available(backend or [DEFAULT_BACKEND], lacking, runs=True)
    built = _available([*backends, *(build_only or [])], lacking, runs=False)
    if not backends:
        raise InputError(
            "this machine has none of the backends to verify: "
            f"{'; '.join((lacking or {}).values())}"
        )
    choices = SchemeChoices(
        bits, buckets, granularity, attention_bits, softmax_bits, split_shortcuts
    )
    calibrate.CalibrateOptions(
        method=method or calibrate.DEFAULT_METHOD
    )  # refused before a workspace is made
    chosen = ModelChoices(model, revision, random_weights, tuple(lora or ()))
    opened = create_workspace(workspace, chosen, choices, split_shortcuts=method == calibrate.QDIFF)
    results: dict[str, Any] = {
        "workspace": str(opened.root),
        "left_out": lacking or {},
        "failed": {},
    }

    def show(stage: str, details: dict[str, Any], text: str) -> None:
        results[stage] = details
        if not as_json:
            print(f"\n== {stage}\n{text}", flush=True)

    details = calibrate.calibrate_stage(
        opened, console, _calibration(opened, method, seed), reuse=True
    )
    show("calibrate", details, calibrate.describe(opened, details))
    details = finetune.finetune_stage(opened, console, _finetuning(opened, seed), reuse=True)
    show("finetune", details, finetune.describe(opened, details))
    details = export.export_stage(opened, console, reuse=True)
    show("export", details, export.describe(opened, details))
    details = reference.reference_stage(opened, console, reuse=True)
    show("reference", details, reference.describe(opened, details))
    for name in built:
        details = build_engine.build_engine_stage(
            opened, console, name, EngineOptions(), reuse=True
        )
        show(f"build-engine {name}", details, build_engine.describe(opened, details))
    passed: list[str] = []
    for name in backends:
        details = verify.verify_stage(opened, console, name, reuse=True)
        show(f"verify {name}", details, verify.describe(details))
        if not details["passed"]:
            results["failed"][name] = verify.failure(details)
            continue
        passed.append(name)
        details = benchmark.benchmark_stage(opened, console, name, reuse=True)
        show(f"benchmark {name}", details, benchmark.describe(details))
    if opened.source.random_weights:
        console.note("generate, evaluate: left out, random weights draw nothing")
    elif passed:
        details = generate.generate_stage(opened, console, passed[0], reuse=True)
        show(f"generate {passed[0]}", details, details["picture"])
        details = evaluate.evaluate_stage(opened, console, passed[0], reuse=True)
        show(f"evaluate {passed[0]}", details, evaluate.describe(details))
    else:
        console.note("generate, evaluate: left out, no engine passed its verification")
    console.result(results, "", "== summary", _summary(results, backends))
    if results["failed"]:
        console.note(
            f"error: {'; '.join(results['failed'].values())}"
        )  # after the result, which --json keeps one value
        raise typer.Exit(1)


def _available(names: list[str], lacking: dict[str, str] | None, *, runs: bool) -> list[str]:
    """Those of the backends ``names`` that can build here, and run where ``runs``, each once.

    Why the others cannot goes into ``lacking``; where that is None, it is raised as the InputError
    that an unknown name always is.
    """
    available = []
    for name in dict.fromkeys(names):
        backend = get_backend(name)
        try:
            backend.check_build(EngineOptions())
            if runs:
                backend.check_run(EngineOptions())
        except InputError as e:
            if lacking is None:
                raise
            lacking[name] = str(e)
        else:
            available.append(name)
    return available


def _calibration(
    workspace: Workspace, method: str | None, seed: int | None
) -> calibrate.CalibrateOptions:
    """The options that the workspace was calibrated with, if it was, but for those that are
    given.
    """
    options = workspace.options_of("calibrate") | ({} if seed is None else {"seed": seed})
    if method not in (None, options.get("method")):
        options |= {"method": method, "reconstruction": {}}
    try:
        prompts = None if options.get("prompts") is None else tuple(options["prompts"])
        return calibrate.CalibrateOptions(**{**options, "prompts": prompts})
    except TypeError as e:
        raise InputError(
            f"{workspace.root}: calibrated with options that are unknown here ({e}); run "
            "`quest-deploy calibrate`"
        ) from e


def _finetuning(workspace: Workspace, seed: int | None) -> dict[str, Any]:
    """The options that the workspace was finetuned with, if it was, but for the seed that is
    given.
    """
    options = {
        name: tuple(x) if isinstance(x, list) else x
        for name, x in workspace.options_of("finetune").items()
    }
    return options | ({} if seed is None else {"seed": seed})


def _summary(results: dict[str, Any], backends: list[str]) -> str:
    lines = [
        evaluate.summary(details)
        for stage, details in results.items()
        if stage.startswith("evaluate ")
    ]
    for name in backends:
        if name in results["failed"]:
            lines.append(f"{name}: verification FAILED: {results['failed'][name]}")
            continue
        verified, timed = results[f"verify {name}"], results[f"benchmark {name}"]
        codes, different = (
            sum(b[key] for b in verified["buckets"]) for key in ("codes", "mismatches")
        )
        speed = ", ".join(
            f"{ratio:.2f}x FP32 at batch {batch}"
            for batch, ratio in timed["speedup_over_fp32"].items()
        )
        lines.append(
            f"{name}: verification PASSED ({codes} codes, {different} at rounding ties differ)"
        )
        lines.append(
            f"{name}: speed {speed}; files {timed['size_ratio_to_fp32']:.2f}x smaller than FP32"
        )
    lines += [f"{name}: left out: {reason}" for name, reason in results["left_out"].items()]
    graph = results["export"]
    lines.append(
        f"graph: {size(graph['bytes'])} for {size(graph['fp32_weight_bytes'])} of FP32 weights"
    )
    lines += [
        f"picture: {details['picture']}"
        for stage, details in results.items()
        if stage.startswith("generate ")
    ]
    if len(results["failed"]) == len(backends):
        lines.append("picture, Frechet distance: left out, no engine passed its verification")
    return "\n".join(lines)
