"""`quest-deploy build-engine`: lower the graph for a backend and compile it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quest_deploy.backends.base import (
    DTYPES,
    HARDWARE_COMPATIBILITY_LEVELS,
    NATIVE_PROCESSOR,
    PROFILING_VERBOSITIES,
    QUANTIZE,
)
from quest_deploy.cli.console import Console
from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import (
    BackendOption,
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    given,
    parse_budget,
    parse_pool_limit,
    parse_sample_size,
    parse_tactic_sources,
)
from quest_deploy.stages import api
from quest_deploy.stages.options import DEFAULT_BACKEND
from quest_deploy.stages.workspaces import open_workspace


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
    chosen, console = (
        given(
            locals(),
            sample_size=lambda sizes: [parse_sample_size(size) for size in sizes],
            pool_limit=parse_pool_limit,
            weight_streaming_budget=parse_budget,
            tactic_sources=parse_tactic_sources,
        ),
        Console(as_json=as_json),
    )
    api.build_engine(**chosen, progress=console)
    report(console, open_workspace(workspace, model, bits), "build-engine", backend)
