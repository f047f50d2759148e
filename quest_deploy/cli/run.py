"""`quest-deploy run`: every stage in order, skipping those whose inputs have not changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.cli import benchmark, build_engine, calibrate, evaluate, export, finetune, generate, reference, verify
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
from quest_deploy.engine.backends import BACKENDS, get_backend
from quest_deploy.engine.base import EngineOptions
from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from quest_deploy.workspace import Workspace


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
        str | None, typer.Option(help=calibrate.METHOD_HELP, show_default=f"the workspace's, or {calibrate.DEFAULT_METHOD}")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help=f"Backends to verify and benchmark: {', '.join(BACKENDS)}; may be repeated.", show_default=DEFAULT_BACKEND),
    ] = None,
    build_only: Annotated[list[str] | None, typer.Option(help="Backends to build for, without running; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of calibration and finetuning.", show_default="the workspace's, or 0")] = None,
    as_json: JsonOption = False,
) -> None:
    """Go from the FP32 model to verified, benchmarked engines and a picture; goes on where it was interrupted.

    What was calibrated or finetuned with options of its own keeps them.
    """
    console = Console(as_json=as_json)
    backends = list(dict.fromkeys(backend or [DEFAULT_BACKEND]))
    for name in (*backends, *(build_only or [])):
        get_backend(name).check_build(EngineOptions())
    for name in backends:
        get_backend(name).check_run(EngineOptions())
    choices = SchemeChoices(bits, buckets, granularity, attention_bits, softmax_bits, split_shortcuts)
    calibrate.CalibrateOptions(method=method or calibrate.DEFAULT_METHOD)  # refused before a workspace is made
    chosen = ModelChoices(model, revision, random_weights, tuple(lora or ()))
    opened = create_workspace(workspace, chosen, choices, split_shortcuts=method == calibrate.QDIFF)
    results: dict[str, Any] = {"workspace": str(opened.root)}

    def show(stage: str, details: dict[str, Any], text: str) -> None:
        results[stage] = details
        if not as_json:
            print(f"\n== {stage}\n{text}", flush=True)

    details = calibrate.calibrate_stage(opened, console, _calibration(opened, method, seed), reuse=True)
    show("calibrate", details, calibrate.describe(opened, details))
    details = finetune.finetune_stage(opened, console, _finetuning(opened, seed), reuse=True)
    show("finetune", details, finetune.describe(opened, details))
    details = export.export_stage(opened, console, reuse=True)
    show("export", details, export.describe(opened, details))
    details = reference.reference_stage(opened, console, reuse=True)
    show("reference", details, reference.describe(opened, details))
    for name in dict.fromkeys((*backends, *(build_only or []))):
        details = build_engine.build_engine_stage(opened, console, name, EngineOptions(), reuse=True)
        show(f"build-engine {name}", details, build_engine.describe(opened, details))
    for name in backends:
        details = verify.verify_stage(opened, console, name, reuse=True)
        show(f"verify {name}", details, verify.describe(details))
        verify.require_passed(details)
        details = benchmark.benchmark_stage(opened, console, name, reuse=True)
        show(f"benchmark {name}", details, benchmark.describe(details))
    main = backends[0]
    if opened.source.random_weights:
        console.note("generate, evaluate: left out, random weights draw nothing")
    else:
        details = generate.generate_stage(opened, console, main, reuse=True)
        show(f"generate {main}", details, details["picture"])
        details = evaluate.evaluate_stage(opened, console, main, reuse=True)
        show(f"evaluate {main}", details, evaluate.describe(details))
    console.result(results, "", "== summary", _summary(results, backends))


def _calibration(workspace: Workspace, method: str | None, seed: int | None) -> calibrate.CalibrateOptions:
    """The options that the workspace was calibrated with, if it was, but for those that are given."""
    options = workspace.options_of("calibrate") | ({} if seed is None else {"seed": seed})
    if method not in (None, options.get("method")):
        options |= {"method": method, "reconstruction": {}}
    try:
        prompts = None if options.get("prompts") is None else tuple(options["prompts"])
        return calibrate.CalibrateOptions(**{**options, "prompts": prompts})
    except TypeError as e:
        raise InputError(f"{workspace.root}: calibrated with options that are unknown here ({e}); run `quest-deploy calibrate`") from e


def _finetuning(workspace: Workspace, seed: int | None) -> dict[str, Any]:
    """The options that the workspace was finetuned with, if it was, but for the seed that is given."""
    options = {name: tuple(x) if isinstance(x, list) else x for name, x in workspace.options_of("finetune").items()}
    return options | ({} if seed is None else {"seed": seed})


def _summary(results: dict[str, Any], backends: list[str]) -> str:
    main = backends[0]
    evaluated = results.get(f"evaluate {main}")
    lines = [] if evaluated is None else [evaluate.summary(evaluated)]
    for name in backends:
        verified, timed = results[f"verify {name}"], results[f"benchmark {name}"]
        codes, different = (sum(b[key] for b in verified["buckets"]) for key in ("codes", "mismatches"))
        speed = ", ".join(f"{ratio:.2f}x FP32 at batch {batch}" for batch, ratio in timed["speedup_over_fp32"].items())
        lines.append(f"{name}: verification PASSED ({codes} codes, {different} at rounding ties differ)")
        lines.append(f"{name}: speed {speed}; files {timed['size_ratio_to_fp32']:.2f}x smaller than FP32")
    graph = results["export"]
    lines.append(f"graph: {size(graph['bytes'])} for {size(graph['fp32_weight_bytes'])} of FP32 weights")
    if f"generate {main}" in results:
        lines.append(f"picture: {results[f'generate {main}']['picture']}")
    return "\n".join(lines)
