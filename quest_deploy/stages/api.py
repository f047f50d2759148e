"""The commands as functions: ``import quest_deploy as qd; workspace = qd.calibrate("sd15")``.

A command's options are its function's parameters, by the same names, with Python's values in place
of text. Those that work on a workspace take it open, as its folder, or find it by ``model`` and
``bits`` as the commands do. ``progress`` is called with a phase, the steps done and their number,
which ``print`` can show; messages go to the logger ``quest_deploy``. What a user can mend raises
:class:`quest_deploy.errors.InputError`.
"""

from __future__ import annotations

import logging
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quest_deploy.backends.base import EngineOptions
from quest_deploy.errors import InputError
from quest_deploy.files import atomic_file
from quest_deploy.finetuning.distributed import is_main_process
from quest_deploy.importers.settings import ImportSettings, Source
from quest_deploy.progress import no_progress, progress_of
from quest_deploy.serving.triton.options import TritonOptions
from quest_deploy.stages import (
    BENCHMARK,
    BUILD_ENGINE,
    CALIBRATE,
    EVALUATE,
    EXPORT,
    FINETUNE,
    GENERATE,
    IMPORT,
    REFERENCE_RECORDS,
    SENSITIVITY,
    VERIFY,
)
from quest_deploy.stages import run as pipeline
from quest_deploy.stages.options import (
    DEFAULT_BACKEND,
    QDIFF,
    BenchmarkOptions,
    BuildEngineOptions,
    CalibrateOptions,
    EngineStageOptions,
    EvaluateOptions,
    FinetuneOptions,
    GenerateOptions,
    ImportOptions,
    ReferenceOptions,
    SensitivityOptions,
    StageOptions,
)
from quest_deploy.stages.workspaces import (
    ModelChoices,
    SchemeChoices,
    create_workspace,
    method_name,
    open_workspace,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quest_deploy.artifacts.scheme import Granularity
    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.evaluation.inspection import Inspection
    from quest_deploy.progress import Display, Progress
    from quest_deploy.stages.results import (
        Benchmark,
        BuiltEngine,
        DrawnImage,
        Evaluation,
        Export,
        Finetuning,
        Generation,
        Reference,
        Schedule,
        Sensitivity,
        Verification,
    )
    from quest_deploy.stages.run import Run
    from quest_deploy.stages.workspaces import Place

_MAX_PROMPT_BYTES = 2**20
RTX_IS_NO_PLAN = (
    "this workspace's tensorrt-rtx engine is left out: it is no plan of TensorRT, "
    "and Triton's TensorRT backend cannot load it"
)
NO_PLAN = (
    "no plan: this workspace has no tensorrt engine, so the package serves from its ONNX files, "
    "with the stand-in backend on a CPU; "
    "on the GPU machine, run `quest-deploy build-engine --backend tensorrt` and package again"
)
logger = logging.getLogger(__name__)


def calibrate(
    model: str | None = None,
    *,
    workspace: Place = None,
    revision: str | None = None,
    random_weights: bool = False,
    lora: Sequence[str] = (),
    bits: str | None = None,
    buckets: int | None = None,
    granularity: Granularity | None = None,
    attention_bits: str | None = None,
    softmax_bits: str | None = None,
    split_shortcuts: bool | None = None,
    method: str = "mse",
    samples: int | None = None,
    steps: int | None = None,
    batch: int | None = None,
    guidance: float | None = None,
    prompts: Sequence[str] | Path | None = None,
    reconstruction_samples: int | None = None,
    rounding_steps: int | None = None,
    scale_steps: int | None = None,
    reconstruction_batch: int | None = None,
    seed: int = 0,
    progress: Progress | Display = no_progress,
) -> Workspace:
    """Quantize the FP32 model by calibration alone (PTQ); return its workspace, a new one where
    there is none.

    Args:
        model: a name, or the path of a diffusers folder or of a single-file checkpoint.
        prompts: for a text-to-image model; a path is of a file with a prompt a line.
    """
    reconstruction = {
        "samples": reconstruction_samples,
        "rounding_steps": rounding_steps,
        "scale_steps": scale_steps,
        "batch": reconstruction_batch,
    }
    options = CalibrateOptions(
        samples,
        steps,
        method,
        seed,
        {name: value for name, value in reconstruction.items() if value is not None},
        batch,
        guidance,
        _prompts(prompts),
    )
    opened = create_workspace(
        workspace,
        ModelChoices(model, revision, random_weights, tuple(lora)),
        SchemeChoices(bits, buckets, granularity, attention_bits, softmax_bits, split_shortcuts),
        split_shortcuts=method == QDIFF,
    )
    CALIBRATE.run(opened, options, progress)
    return opened


def _prompts(path: Sequence[str] | Path | None) -> tuple[str, ...] | None:
    """The prompts, of a text file one a line; raise InputError where it cannot be read or has
    none.
    """
    if not isinstance(path, Path):
        return None if path is None else tuple(path)
    try:
        if path.stat().st_size > _MAX_PROMPT_BYTES:
            raise InputError(
                f"{path}: expected a file of prompts of at most {_MAX_PROMPT_BYTES} bytes"
            )
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: expected a text file with a prompt a line ({e})") from e
    if prompts := tuple(line.strip() for line in lines if line.strip()):
        return prompts
    raise InputError(f"{path}: expected a prompt a line, and found none")


def sensitivity(
    workspace: Place = None,
    *,
    model: str | None = None,
    bits: str | None = None,
    samples: int = 4,
    batch: int = 32,
    progress: Progress | Display = no_progress,
) -> Sensitivity:
    """Measure how much each layer hurts when it alone is quantized, and pick the layers for the
    sensitive stage of finetuning.
    """
    opened = open_workspace(workspace, model, bits)
    return SENSITIVITY.run(opened, SensitivityOptions(samples, batch), progress)


def finetune(
    workspace: Place = None,
    *,
    model: str | None = None,
    bits: str | None = None,
    stages: Sequence[str] | None = None,
    temporal_layers: Sequence[str] | None = None,
    layers: Sequence[str] | str | None = None,
    carry_temporal: bool | None = None,
    temporal_steps: int | None = None,
    sensitive_steps: int | None = None,
    batch: int | None = None,
    weight_rate: float | None = None,
    scale_rate: float | None = None,
    output_loss: float | None = None,
    block_loss: float | None = None,
    precision: str | None = None,
    seed: int | None = None,
    device: str = "cpu",
    gradient_checkpointing: bool = False,
    target_cache: int = 1024,
    save_every: int = 20,
    progress: Progress | Display = no_progress,
) -> Finetuning | None:
    """Finetune the calibrated model with QuEST; resume where it was interrupted.

    Args:
        layers: glob patterns of the sensitive stage's layers; "auto" for those that
            :func:`sensitivity` picked.

    Returns:
        None in the further processes of a distributed run, which compute and write nothing.
    """
    opened = open_workspace(workspace, model, bits)
    if layers == "auto":
        layers = opened.require("sensitivity").details["selected"]
    options = FinetuneOptions(
        stages=None if stages is None else tuple(stages),
        temporal_layers=None if temporal_layers is None else tuple(temporal_layers),
        sensitive_layers=None if layers is None else tuple(layers),
        carry_temporal=carry_temporal,
        temporal_steps=temporal_steps,
        sensitive_steps=sensitive_steps,
        batch=batch,
        weight_rate=weight_rate,
        scale_rate=scale_rate,
        output_loss=output_loss,
        block_loss=block_loss,
        precision=precision,
        seed=seed or 0,
        device=device,
        gradient_checkpointing=gradient_checkpointing,
        target_cache=target_cache,
        save_every=save_every,
    )
    if not is_main_process():
        FINETUNE.module.join(opened, options)
        return None
    return FINETUNE.run(opened, options, progress)


def import_checkpoint(
    checkpoint: Path | str,
    source: Source | str,
    unet: Path | str,
    *,
    timesteps: Sequence[float] | None = None,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    first_last_bits: int | None = None,
    softmax_bits: int | None = None,
    symmetric: bool | None = None,
    context_tokens: int | None = None,
    settings: Path | None = None,
    recalibrate: bool = False,
    samples: int | None = None,
    seed: int = 0,
    workspace: Path | str | None = None,
    progress: Progress | Display = no_progress,
) -> Workspace:
    """Import a checkpoint of the official QuEST or Q-Diffusion code; return its workspace.

    What the file does not say must be given, here or in ``settings``, a JSON file.
    """
    checkpoint, unet = Path(checkpoint), Path(unet)
    for path in (checkpoint, unet):
        if not path.is_file():
            raise InputError(f"{path} does not exist")
    given = {
        "timesteps": timesteps and list(timesteps),
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "first_last_bits": first_last_bits,
        "softmax_bits": softmax_bits,
        "symmetric": symmetric,
        "context_tokens": context_tokens,
    }
    options = ImportOptions(
        checkpoint,
        unet,
        ImportSettings.gather(Source(source), given, settings),
        recalibrate,
        samples,
        seed,
    )
    opened: Workspace = IMPORT.module.import_checkpoint(
        None if workspace is None else Path(workspace), options, progress
    )
    return opened


def export(
    workspace: Place = None,
    *,
    model: str | None = None,
    revision: str | None = None,
    random_weights: bool = False,
    lora: Sequence[str] = (),
    bits: str | None = None,
    buckets: int | None = None,
    granularity: Granularity | None = None,
    attention_bits: str | None = None,
    softmax_bits: str | None = None,
    split_shortcuts: bool | None = None,
    progress: Progress | Display = no_progress,
) -> Export:
    """Export the checkpoint as a portable ONNX graph; calibrate one where there is none."""
    opened = create_workspace(
        workspace,
        ModelChoices(model, revision, random_weights, tuple(lora)),
        SchemeChoices(bits, buckets, granularity, attention_bits, softmax_bits, split_shortcuts),
    )
    if opened.checkpoint_stage == "calibrate":
        logger.warning(
            "no finetuned checkpoint in this workspace: exporting a calibrated one (%s), which is "
            "less accurate",
            method_name(opened),
        )
        if "calibrate" not in opened.stages:
            CALIBRATE.run(opened, CalibrateOptions(), progress)
    return EXPORT.run(opened, StageOptions(), progress)


def reference(
    workspace: Place = None,
    *,
    model: str | None = None,
    bits: str | None = None,
    seed: int = 0,
    megabytes: int = 1000,
    measured: int | None = None,
    sample_size: tuple[int, int] | None = None,
    progress: Progress | Display = no_progress,
) -> Reference:
    """Save the fake-quantized torch model's inputs and outputs, per layer and end to end, for every
    bucket.
    """
    options = ReferenceOptions(seed, megabytes, measured, sample_size)
    return REFERENCE_RECORDS.run(open_workspace(workspace, model, bits), options, progress)


def build_engine(
    workspace: Place = None,
    *,
    model: str | None = None,
    bits: str | None = None,
    backend: str = DEFAULT_BACKEND,
    provider: str = "cpu",
    threads: int = 0,
    compute_capability: Sequence[str] = (),
    max_batch: int = 16,
    dtype: str = "fp32",
    opt_batch: int | None = None,
    sample_size: Sequence[tuple[int, int]] = (),
    pool_limit: int | None = None,
    refittable: bool = False,
    strip_plan: bool = False,
    timing_cache: Path | None = None,
    version_compatible: bool = False,
    hardware_compatibility_level: str | None = None,
    builder_optimization_level: int | None = None,
    quantize: str = "auto",
    plugins: Path | None = None,
    serialize_plugins: bool = False,
    weight_streaming: bool = False,
    weight_streaming_budget: int | None = None,
    tactic_sources: Sequence[str] | None = None,
    max_num_tactics: int | None = None,
    profiling_verbosity: str = "detailed",
    processor: str = "native",
    verbose: bool = False,
    progress: Progress | Display = no_progress,
) -> BuiltEngine:
    """Build an engine from the exported graph; see
    :class:`quest_deploy.backends.base.EngineOptions`. Sizes are in bytes.
    """
    engine = EngineOptions(
        provider=provider,
        threads=threads,
        compute_capabilities=tuple(compute_capability),
        max_batch=max_batch,
        dtype=dtype,
        opt_batch=opt_batch,
        sample_sizes=tuple(sample_size),
        workspace_limit=pool_limit,
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
        weight_streaming_budget=weight_streaming_budget,
        tactic_sources=None if tactic_sources is None else tuple(tactic_sources),
        max_num_tactics=max_num_tactics,
        profiling_verbosity=profiling_verbosity,
        processor=processor,
        verbose=verbose,
    )
    options = BuildEngineOptions(backend, engine)
    return BUILD_ENGINE.run(open_workspace(workspace, model, bits), options, progress)


def verify(
    workspace: Place = None,
    *,
    model: str | None = None,
    bits: str | None = None,
    backend: str = DEFAULT_BACKEND,
    progress: Progress | Display = no_progress,
) -> Verification:
    """Compare an engine with the fake-quantized model; the result's ``passed`` says whether it
    computes the same.
    """
    options = EngineStageOptions(backend)
    return VERIFY.run(open_workspace(workspace, model, bits), options, progress)


def benchmark(
    workspace: Place = None,
    *,
    model: str | None = None,
    bits: str | None = None,
    backend: str = DEFAULT_BACKEND,
    batch: Sequence[int] = (1, 16),
    runs: int = 50,
    warmup: int = 5,
    static: bool = True,
    progress: Progress | Display = no_progress,
) -> Benchmark:
    """Time the engine against FP32 and against static scales, on the same backend."""
    options = BenchmarkOptions(backend, tuple(batch), runs, warmup, static)
    return BENCHMARK.run(open_workspace(workspace, model, bits), options, progress)


def generate(
    workspace: Place = None,
    *,
    model: str | None = None,
    bits: str | None = None,
    backend: str = DEFAULT_BACKEND,
    prompt: Sequence[str] | None = None,
    negative_prompt: str | None = None,
    labels: str | None = None,
    rows: int | None = None,
    steps: int = 20,
    guidance: float | None = None,
    scheduler: str = "ddim",
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    progress: Progress | Display = no_progress,
) -> Generation:
    """Draw PNG pictures with the engine."""
    options = GenerateOptions(
        backend,
        labels,
        rows,
        steps,
        guidance,
        scheduler,
        seed,
        None if prompt is None else tuple(prompt),
        negative_prompt,
        height,
        width,
    )
    return GENERATE.run(open_workspace(workspace, model, bits), options, progress)


def evaluate(
    workspace: Place = None,
    *,
    model: str | None = None,
    bits: str | None = None,
    backend: str = DEFAULT_BACKEND,
    images: int | None = None,
    steps: int = 20,
    guidance: float | None = None,
    scheduler: str = "ddim",
    seed: int = 2024,
    progress: Progress | Display = no_progress,
) -> Evaluation:
    """Judge FP32, the fake-quantized models and the engine: digits by a classifier, other models by
    their distance from FP32.
    """
    options = EvaluateOptions(backend, images, steps, guidance, scheduler, seed)
    return EVALUATE.run(open_workspace(workspace, model, bits), options, progress)


def run(
    model: str | None = None,
    *,
    workspace: Place = None,
    revision: str | None = None,
    random_weights: bool = False,
    lora: Sequence[str] = (),
    bits: str | None = None,
    buckets: int | None = None,
    granularity: Granularity | None = None,
    attention_bits: str | None = None,
    softmax_bits: str | None = None,
    split_shortcuts: bool | None = None,
    method: str | None = None,
    backend: Sequence[str] = (DEFAULT_BACKEND,),
    build_only: Sequence[str] = (),
    if_available: bool = False,
    seed: int | None = None,
    progress: Progress | Display = no_progress,
    on_result: Callable[[Workspace, str, Any], None] = lambda workspace, stage, result: None,
) -> Run:
    """Go from the FP32 model to verified, benchmarked engines and a picture; go on where it was
    interrupted.

    What was calibrated or finetuned with options of its own keeps them. An engine that fails its
    verification is neither benchmarked nor drawn with.

    Args:
        backend: to verify and benchmark.
        build_only: to build for, without running.
        if_available: leave out the backends that this machine lacks, unless it lacks all.
        on_result: called after each stage, with its name and its backend's, and its result.
    """
    backends = pipeline.available(backend, build_only, if_available=if_available)
    CalibrateOptions(method=method or CalibrateOptions.method)  # refused before a workspace is made
    opened = create_workspace(
        workspace,
        ModelChoices(model, revision, random_weights, tuple(lora)),
        SchemeChoices(bits, buckets, granularity, attention_bits, softmax_bits, split_shortcuts),
        split_shortcuts=method == QDIFF,
    )
    given = {} if seed is None else {"seed": seed}
    return pipeline.run(
        opened,
        backends,
        {
            "calibrate": pipeline.calibration(opened, given, method),
            "finetune": pipeline.kept(FINETUNE, opened, given),
        },
        progress,
        on_result,
    )


def schedule(
    workspace: Place = None,
    *,
    model: str | None = None,
    bits: str | None = None,
    scheduler: str = "ddim",
    steps: int = 20,
    output: Path | None = None,
) -> Schedule:
    """Write a scheduler's steps as a table, which the C++ runtime denoises by."""
    opened = open_workspace(workspace, model, bits)
    written: Schedule = import_module("quest_deploy.stages.schedule").write_schedule(
        opened, scheduler, steps, output
    )
    return written


def package(
    workspace: Place = None,
    *,
    triton: Path,
    model: str | None = None,
    bits: str | None = None,
    max_batch: int | None = None,
    max_steps: int = 100,
    max_size: int | None = None,
    max_images: int = 4,
    max_in_flight: int = 16,
    max_queue: int = 64,
    queue_delay: int = 0,
    io_dtype: str = "fp32",
    plugin_library: Sequence[Path] = (),
    processor: str = "native",
    progress: Progress | Display = no_progress,
) -> dict[str, Any]:
    """Write a package that serves the model into the folder ``triton``; see
    :class:`quest_deploy.serving.triton.options.TritonOptions`.
    """
    options = TritonOptions(
        max_batch,
        max_steps,
        max_size,
        max_images,
        max_in_flight,
        max_queue,
        queue_delay,
        io_dtype,
        tuple(map(str, plugin_library)),
        processor,
    )
    opened = open_workspace(workspace, model, bits)
    with progress_of(progress, "package") as shown:
        write_package = import_module("quest_deploy.serving.triton.package").write_package
        details: dict[str, Any] = write_package(opened, triton, options, shown)
    if not details["plan"]:
        if "build-engine/tensorrt-rtx" in opened.stages:
            logger.info(RTX_IS_NO_PLAN)
        logger.info(NO_PLAN)
    return details


def inspect(path: Path | str, *, progress: Progress | Display = no_progress) -> Inspection:
    """What a workspace, a checkpoint, a graph or an engine holds, as a JSON value, and what the
    layers of a graph or an engine run in.
    """
    found: Inspection = import_module("quest_deploy.evaluation.inspection").inspect(
        Path(path), progress
    )
    return found


def client(
    url: str,
    *,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    label: int | None = None,
    steps: int | None = None,
    scheduler: str | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    output: Path = Path("image.png"),
    timeout: float = 600.0,
    progress: Progress | Display = no_progress,
) -> DrawnImage:
    """Ask a server started by a package's serve.py for an image, and write it as a PNG file; None
    for what the server chooses. An interruption cancels it there too.

    Args:
        url: host and port of its gRPC service.
        timeout: seconds to wait for each step.
    """
    choices = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "label": label,
        "steps": steps,
        "scheduler": scheduler,
        "guidance": guidance,
        "height": height,
        "width": width,
        "seed": seed,
    }
    request = {name: value for name, value in choices.items() if value is not None}
    started = time.monotonic()
    with progress_of(progress, "client") as shown:
        drawn = import_module("quest_deploy.serving.client").request_image(
            url, request, shown, timeout
        )
    seconds = time.monotonic() - started
    with atomic_file(output) as temporary:
        temporary.write_bytes(drawn.png)
    return {"url": url, "picture": str(output), "seed": drawn.seed, "seconds": seconds}
