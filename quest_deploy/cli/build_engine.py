"""`quest-deploy build-engine`: lower the graph for a backend and compile it."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.artifacts.workspace import ENGINES, GRAPH
from quest_deploy.backends.base import (
    DTYPES,
    HARDWARE_COMPATIBILITY_LEVELS,
    NATIVE_PROCESSOR,
    PROFILING_VERBOSITIES,
    QUANTIZE,
    EngineOptions,
    build_engine,
)
from quest_deploy.backends.registry import check_options, get_backend
from quest_deploy.cli.console import Console, size
from quest_deploy.cli.options import (
    DEFAULT_BACKEND,
    BackendOption,
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    open_workspace,
    parse_sample_size,
)
from quest_deploy.cli.stage import run_stage
from quest_deploy.errors import InputError
from quest_deploy.files import atomic_folder, sha256_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.cli.console import Update


def build_engine_stage(
    workspace: Workspace,
    console: Console,
    backend: str,
    options: EngineOptions,
    *,
    reuse: bool = False,
) -> dict[str, Any]:
    """Build the engine of ``backend``; writes engines/<backend>/."""
    built_for = get_backend(backend)
    options = built_for.resolve(options)
    built_for.check_build(options)

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        from exporters.graph_info import load_graph

        graph = workspace.path(GRAPH)
        digest = workspace.stages["export"].files[GRAPH]["sha256"]
        started = time.monotonic()
        with atomic_folder(workspace.path(ENGINES, backend)) as folder:
            record = build_engine(built_for, load_graph(graph), folder, options, digest, update)
        files = sorted(workspace.path(ENGINES, backend).iterdir())
        details = {
            "backend": backend,
            "hardware": record.hardware,
            **({"quantize": options.quantize} if backend.startswith("tensorrt") else {}),
            "seconds": time.monotonic() - started,
            "files": {file.name: file.stat().st_size for file in files},
        }
        return files, details

    chosen = dataclasses.asdict(options) | built_for.answers(
        options
    )  # on a machine that answers otherwise, it is built again
    if options.plugins is not None:  # built again, it is another one at the same place
        chosen["plugin_sha256"] = sha256_of(Path(options.plugins))
    return run_stage(
        workspace,
        console,
        f"build-engine/{backend}",
        inputs=("export",),
        options=chosen,
        reuse=reuse,
        work=work,
    )


def parse_pool_limit(text: str) -> int:
    """Bytes from "workspace:2G" (units of 1024: K, M, G); raise InputError for anything else."""
    pool, _, given = text.partition(":")
    found = _bytes(given) if pool == "workspace" else None
    if found is None:
        raise InputError(
            f"--pool-limit: expected workspace:SIZE, such as workspace:2G, not {text!r}"
        )
    return found


def parse_budget(text: str) -> int:
    """Bytes from "2G"; raise InputError for anything else."""
    found = _bytes(text)
    if found is None:
        raise InputError(f"--weight-streaming-budget: expected a size, such as 2G, not {text!r}")
    return found


def _bytes(text: str) -> int | None:
    found = re.fullmatch(r"(\d{1,15})([KMG]?)", text)
    return (
        None
        if found is None
        else int(found[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[found[2]]
    )


def parse_tactic_sources(names: list[str]) -> tuple[str, ...]:
    """The names; "none", which must be alone, is no source at all."""
    if "none" in names and len(names) > 1:
        raise InputError("--tactic-sources none excludes every other")
    return () if names == ["none"] else tuple(dict.fromkeys(names))


def describe(workspace: Workspace, details: dict[str, Any]) -> str:
    """The details in words."""
    files = ", ".join(f"{name} {size(count)}" for name, count in details["files"].items())
    how = {"plugin": ", quantized by the plugin", "native": ", quantized natively"}.get(
        details.get("quantize", ""), ""
    )
    hardware = ", ".join(
        value if isinstance(value, str) else "compute capabilities " + " ".join(value)
        for value in details["hardware"].values()
    )
    return (
        f"{workspace.path(ENGINES, details['backend'])}, built in {details['seconds']:.1f} s "
        f"for {hardware}{how}\n{files}"
    )


def build_engine_command(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    backend: BackendOption = DEFAULT_BACKEND,
    provider: Annotated[
        str, typer.Option(help="onnxruntime's execution provider: cpu, cuda or tensorrt.")
    ] = "cpu",
    threads: Annotated[
        int, typer.Option(min=0, help="CPU threads; 0 lets the backend choose.")
    ] = 0,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="tensorrt-rtx: a GPU to build for, such as 89; may be repeated."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="TensorRT: the largest batch.")] = 16,
    dtype: Annotated[
        str,
        typer.Option(
            help=f"What is computed in besides integers: {', '.join(DTYPES)}; openvino takes fp32 "
            "and bf16."
        ),
    ] = "fp32",
    opt_batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="TensorRT: the batch to tune for.", show_default="2, or the largest batch"
        ),
    ] = None,
    sample_size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE|HEIGHTxWIDTH",
            help="TensorRT: a size of the model's samples, such as 64 for Stable Diffusion's "
            "latents at 512 pixels; may be repeated: "
            "one optimization profile each (tensorrt-rtx: one from the least to the largest).",
            show_default="the model's",
        ),
    ] = None,
    pool_limit: Annotated[
        str | None,
        typer.Option(
            metavar="workspace:SIZE",
            help="TensorRT: the most memory that a layer may use, such as workspace:2G.",
        ),
    ] = None,
    refittable: Annotated[
        bool,
        typer.Option(
            "--refittable",
            help="TensorRT: let the weights be exchanged; tensorrt-rtx needs a GPU for it.",
        ),
    ] = False,
    strip_plan: Annotated[
        bool,
        typer.Option(
            "--strip-plan",
            help="TensorRT: an engine without weights, given them when it is opened; needs a GPU.",
        ),
    ] = False,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="tensorrt: keep the times of kernels in a file, for the next engine.",
        ),
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible", help="tensorrt: an engine that later versions can run."
        ),
    ] = False,
    hardware_compatibility_level: Annotated[
        str | None,
        typer.Option(
            help=f"tensorrt: the GPUs that can run it: {', '.join(HARDWARE_COMPATIBILITY_LEVELS)}."
        ),
    ] = None,
    builder_optimization_level: Annotated[
        int | None, typer.Option(help="tensorrt: how long to look for fast kernels, from 0 to 5.")
    ] = None,
    quantize: Annotated[
        str,
        typer.Option(
            help=f"TensorRT: what quantizes activations: {', '.join(QUANTIZE)}. plugin is "
            "quest::TimestepQuantize, for tensorrt alone; "
            "native is QuantizeLinear; auto takes the plugin where its library is found."
        ),
    ] = "auto",
    plugins: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="tensorrt: the library of the plugin.",
            show_default="QUEST_DEPLOY_PLUGINS in the environment, or trt_plugins/build",
        ),
    ] = None,
    serialize_plugins: Annotated[
        bool,
        typer.Option(
            "--serialize-plugins",
            help="tensorrt: put the plugin's library into the engine; with --version-compatible.",
        ),
    ] = False,
    weight_streaming: Annotated[
        bool,
        typer.Option(
            "--weight-streaming",
            help="TensorRT: let weights stay in the host's memory, fetched while the engine runs.",
        ),
    ] = False,
    weight_streaming_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="TensorRT: weights to keep on the GPU then, such as 2G.",
            show_default="TensorRT's choice",
        ),
    ] = None,
    tactic_sources: Annotated[
        list[str] | None,
        typer.Option(
            help="tensorrt: what kernels may be taken from, such as edge_mask_convolutions, or "
            "none; may be repeated.",
            show_default="TensorRT's choice",
        ),
    ] = None,
    max_num_tactics: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="tensorrt: how many kernels to time for a layer.",
            show_default="TensorRT's choice",
        ),
    ] = None,
    profiling_verbosity: Annotated[
        str,
        typer.Option(
            help="TensorRT: what the engine tells of its layers: "
            f"{', '.join(PROFILING_VERBOSITIES)}; "
            "`quest-deploy inspect` tells what they run in only if it is the first."
        ),
    ] = "detailed",
    processor: Annotated[
        str,
        typer.Option(
            help="CPU backends: native, exact on processors that compute as this one does, or any, "
            "exact on every x86-64 and slower "
            "where that has 8-bit weights."
        ),
    ] = NATIVE_PROCESSOR,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="TensorRT: print all that it logs while it builds.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Build an engine from the exported graph."""
    console = Console(as_json=as_json)
    options = EngineOptions(
        provider=provider,
        threads=threads,
        compute_capabilities=tuple(compute_capability or ()),
        max_batch=max_batch,
        dtype=dtype,
        opt_batch=opt_batch,
        sample_sizes=tuple(parse_sample_size(size) for size in sample_size or ()),
        workspace_limit=None if pool_limit is None else parse_pool_limit(pool_limit),
        refittable=refittable,
        strip_plan=strip_plan,
        timing_cache=None if timing_cache is None else str(timing_cache.resolve()),
        version_compatible=version_compatible,
        hardware_compatibility_level=hardware_compatibility_level,
        builder_optimization_level=builder_optimization_level,
        quantize=quantize,
        plugins=None if plugins is None else str(plugins.resolve()),
        serialize_plugins=serialize_plugins,
        weight_streaming=weight_streaming,
        weight_streaming_budget=None
        if weight_streaming_budget is None
        else parse_budget(weight_streaming_budget),
        tactic_sources=None if tactic_sources is None else parse_tactic_sources(tactic_sources),
        max_num_tactics=max_num_tactics,
        profiling_verbosity=profiling_verbosity,
        verbose=verbose,
        processor=processor,
    )
    get_backend(backend)
    check_options(backend, options)
    opened = open_workspace(workspace, model, bits)
    details = build_engine_stage(opened, console, backend, options)
    console.result({"workspace": str(opened.root), **details}, describe(opened, details))
