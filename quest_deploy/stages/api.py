"""The commands as functions: ``import quest_deploy as qd; workspace = qd.calibrate("sd15")``.

A command's options are its function's parameters, by the same names, with Python's values in place
of text: the fields of a dataclass in ``arguments.py``. Those that work on a workspace take it open,
as its folder, or find it by ``model`` and ``bits`` as the commands do. ``progress`` is called with
a phase, the steps done and their number, which ``print`` can show; messages go to the logger
``quest_deploy``. What a user can mend raises :class:`quest_deploy.errors.InputError`.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.backends.options import EngineOptions
from quest_deploy.errors import InputError
from quest_deploy.files import absolute, atomic_file, read_bounded
from quest_deploy.finetuning.distributed import is_main_process
from quest_deploy.importers.settings import ImportSettings, Source
from quest_deploy.models.loading import load_model
from quest_deploy.models.residuals import check_unrecorded
from quest_deploy.options import declared, takes
from quest_deploy.progress import no_progress, progress_of
from quest_deploy.serving.triton.options import TritonOptions
from quest_deploy.stages import (
    BENCHMARK,
    BUILD_ENGINE,
    BUILD_PARTS,
    CALIBRATE,
    EVALUATE,
    EXPORT,
    EXPORT_PARTS,
    FINETUNE,
    GENERATE,
    IMPORT,
    LORA,
    REFERENCE_RECORDS,
    REPORT,
    SENSITIVITY,
    VERIFY,
)
from quest_deploy.stages import run as pipeline
from quest_deploy.stages.arguments import (
    BenchmarkArguments,
    BuildEngineArguments,
    BuildPartsArguments,
    CalibrateArguments,
    ClientArguments,
    EvaluateArguments,
    ExportArguments,
    ExportPartsArguments,
    FinetuneArguments,
    GenerateArguments,
    ImageRequest,
    ImportArguments,
    LoraArguments,
    PackageArguments,
    ReferenceArguments,
    ReportArguments,
    RunArguments,
    ScheduleArguments,
    SensitivityArguments,
    VerifyArguments,
)
from quest_deploy.stages.options import (
    AUTO,
    QDIFF,
    BuildEngineOptions,
    CalibrateOptions,
    ExportOptions,
    FinetuneOptions,
    ImportOptions,
    ReferenceOptions,
    StageOptions,
)
from quest_deploy.stages.workspaces import method_name

if TYPE_CHECKING:
    from quest_deploy.evaluation.inspection import Inspection
    from quest_deploy.progress import Display, Progress
    from quest_deploy.stages.results import (
        Benchmark,
        BuiltEngine,
        BuiltParts,
        DrawnImage,
        Evaluation,
        Export,
        ExportedParts,
        Finetuning,
        Generation,
        Reference,
        Report,
        Schedule,
        Sensitivity,
        Verification,
    )
    from quest_deploy.stages.run import Run

RTX_IS_NO_PLAN = (
    "this workspace's tensorrt-rtx engine is left out: it is no plan of TensorRT, "
    "and Triton's TensorRT backend cannot load it"
)
NO_PLAN = (
    "no plan: this workspace has no tensorrt engine, so the package serves from its ONNX files, "
    "with the stand-in backend on a CPU; "
    "on the GPU machine, run `quest-deploy build-engine --backend tensorrt` and package again"
)
MOST_IMAGE_BYTES, IMAGE_EXPECTED = 2**25, "expected an image"
logger = logging.getLogger(__name__)


@takes(CalibrateArguments)
def calibrate(chosen: CalibrateArguments) -> Workspace:
    """Quantize the FP32 model by calibration alone (PTQ); return its workspace, a new one where
    there is none.
    """
    opened = chosen.opened(
        split_shortcuts=chosen.method == QDIFF, check=chosen.of(CalibrateOptions).check_source
    )
    CALIBRATE.run(opened, chosen.of(CalibrateOptions), chosen.progress)
    return opened


@takes(SensitivityArguments)
def sensitivity(chosen: SensitivityArguments) -> Sensitivity:
    """Measure how much each layer hurts when it alone is quantized, and pick the layers for the
    sensitive stage of finetuning.
    """
    return chosen.run(SENSITIVITY)


@takes(FinetuneArguments)
def finetune(chosen: FinetuneArguments) -> Finetuning | None:
    """Finetune the calibrated model with QuEST; resume where it was interrupted. The layers are
    glob patterns, or "auto" for those that :func:`sensitivity` picked.

    Returns:
        None in the further processes of a distributed run, which compute and write nothing.
    """
    opened, options = chosen.opened(), chosen.of(FinetuneOptions)
    if options.layers == AUTO:
        options = replace(options, layers=opened.require("sensitivity").details["selected"])
    if not is_main_process():
        FINETUNE.module.join(opened, options)
        return None
    return FINETUNE.run(opened, options, chosen.progress)


@takes(ImportArguments)
def import_checkpoint(chosen: ImportArguments) -> Workspace:
    """Import a checkpoint of the official QuEST or Q-Diffusion code; return its workspace.

    What the file does not say must be given, here or in ``settings``, a JSON file.
    """
    checkpoint, unet = Path(chosen.checkpoint), Path(chosen.unet)
    for path in (checkpoint, unet):
        if not path.is_file():
            raise InputError(f"{path} does not exist")
    said = {
        "timesteps": chosen.timesteps and list(chosen.timesteps),
        "weight_bits": chosen.weight_bits,
        "activation_bits": chosen.activation_bits,
        "first_last_bits": chosen.first_last_bits,
        "softmax_bits": chosen.softmax_bits,
        "symmetric": chosen.symmetric,
        "context_tokens": chosen.context_tokens,
    }
    options = ImportOptions(
        checkpoint=checkpoint,
        unet=unet,
        settings=ImportSettings.gather(Source(chosen.source), said, chosen.settings),
        recalibrate=chosen.recalibrate,
        samples=chosen.samples,
        seed=chosen.seed,
    )
    opened: Workspace = IMPORT.module.import_checkpoint(
        None if chosen.workspace is None else Path(chosen.workspace), options, chosen.progress
    )
    return opened


@takes(LoraArguments)
def lora(chosen: LoraArguments) -> Workspace:
    """Fold LoRAs into the integer weights of a workspace's checkpoint, the finetuned one if there
    is one; return a new workspace, whose activation scales are those of the first.
    """
    made: Workspace = LORA.module.fold_loras(
        chosen.opened(), chosen.lora, chosen.output, chosen.progress
    )
    return made


@takes(ExportArguments)
def export(chosen: ExportArguments) -> Export:
    """Export the checkpoint as a portable ONNX graph; calibrate one where there is none. A
    workspace that is given alone must be there.
    """
    opened = chosen.opened() if chosen.describes_a_new_one else chosen.found()
    if opened.checkpoint_stage == "calibrate":
        logger.warning(
            "no finetuned checkpoint in this workspace: exporting a calibrated one (%s), which is "
            "less accurate",
            method_name(opened),
        )
        if "calibrate" not in opened.stages:
            for kind, wanted in chosen.added_inputs.items():
                if wanted:  # refused before hours of calibration
                    model = load_model(opened.source)
                    model.network.residuals(model.config, kind)
                    check_unrecorded(opened.scheme, kind)
            CALIBRATE.run(opened, CalibrateOptions(), chosen.progress)
    return EXPORT.run(opened, chosen.of(ExportOptions), chosen.progress)


@takes(ReferenceArguments)
def reference(chosen: ReferenceArguments) -> Reference:
    """Save the fake-quantized torch model's inputs and outputs, per layer and end to end, for every
    bucket.
    """
    opened = chosen.opened()
    options = pipeline.as_exported(opened, chosen.of(ReferenceOptions))
    return REFERENCE_RECORDS.run(opened, options, chosen.progress)


@takes(BuildEngineArguments)
def build_engine(chosen: BuildEngineArguments) -> BuiltEngine:
    """Build an engine from the exported graph, or refit another's with its weights; see
    :class:`quest_deploy.backends.options.EngineOptions`. Sizes are in bytes.
    """
    options = BuildEngineOptions(
        backend=chosen.backend, engine=chosen.of(EngineOptions), refit_from=chosen.refit_from
    )
    return BUILD_ENGINE.run(chosen.opened(), options, chosen.progress)


@takes(ExportPartsArguments)
def export_parts(chosen: ExportPartsArguments) -> ExportedParts:
    """Export text encoders and VAE as graphs for :func:`build_parts` and packages."""
    return chosen.run(EXPORT_PARTS)


@takes(BuildPartsArguments)
def build_parts(chosen: BuildPartsArguments) -> BuiltParts:
    """Build engines of the exported parts, which ``load_pipeline`` and ``generate`` then use."""
    return chosen.run(BUILD_PARTS)


@takes(VerifyArguments)
def verify(chosen: VerifyArguments) -> Verification:
    """Compare an engine with the fake-quantized model; the result's ``passed`` says whether it
    computes the same.
    """
    return chosen.run(VERIFY)


@takes(BenchmarkArguments)
def benchmark(chosen: BenchmarkArguments) -> Benchmark:
    """Time the engine against FP32 and against static scales, on the same backend."""
    return chosen.run(BENCHMARK)


@takes(GenerateArguments)
def generate(chosen: GenerateArguments) -> Generation:
    """Draw PNG pictures with the engine."""
    return chosen.run(GENERATE)


@takes(EvaluateArguments)
def evaluate(chosen: EvaluateArguments) -> Evaluation:
    """Judge FP32, the fake-quantized models and the engine: how near their images come
    to FP32's, and how well the embedded model's show what they were asked for.
    """
    return chosen.run(EVALUATE)


@takes(ReportArguments)
def report(chosen: ReportArguments) -> Report:
    """Write a page that shows the workspace: one HTML file that loads nothing from elsewhere."""
    opened = chosen.opened()
    if chosen.output is None:
        return REPORT.run(opened, StageOptions(), chosen.progress)
    if absolute(chosen.output).is_relative_to(os.path.realpath(opened.root)):
        raise InputError(
            f"--output {chosen.output}: expected a place outside the workspace, whose files the "
            "manifest knows; without --output the page is written into it"
        )
    with opened.reading():
        written: Report = REPORT.module.write(opened, chosen.output)
        return written


@takes(RunArguments)
def run(chosen: RunArguments) -> Run:
    """Go from the FP32 model to verified, benchmarked engines and a picture; go on where it was
    interrupted.

    What was calibrated, finetuned or exported with options of its own keeps them; what ``lora``
    made is none of the first two. An engine that fails its verification is neither benchmarked nor
    drawn with. ``on_result`` is called after each stage, with its name and its backend's, and its
    result.
    """
    backends = pipeline.available(
        chosen.backend, chosen.build_only, if_available=chosen.if_available
    )
    opened = chosen.opened(split_shortcuts=chosen.method == QDIFF)
    given = {} if chosen.seed is None else {"seed": chosen.seed}
    if given or chosen.method is not None:
        opened.check_not_folded()
    options = {
        "calibrate": pipeline.calibration(opened, given, chosen.method),
        "finetune": pipeline.kept(FINETUNE, opened, given),
        "export": pipeline.kept(EXPORT, opened, {}),
        "reference": pipeline.as_exported(opened, ReferenceOptions()),
    }
    return pipeline.run(opened, backends, options, chosen.progress, chosen.on_result)


@takes(ScheduleArguments)
def schedule(chosen: ScheduleArguments) -> Schedule:
    """Write a scheduler's steps as a table, which the C++ runtime denoises by."""
    opened = chosen.opened()
    written: Schedule = import_module("quest_deploy.stages.schedule").write_schedule(
        opened, chosen.scheduler, chosen.steps, chosen.output, chosen.height, chosen.width
    )
    return written


def doctor() -> dict[str, Any]:
    """Return what this machine can build and run, and what to install for the rest, as a JSON
    value.
    """
    found: dict[str, Any] = import_module("quest_deploy.backends.machine").machine()
    return found


@takes(PackageArguments)
def package(chosen: PackageArguments) -> dict[str, Any]:
    """Write a package that serves the model into the folder ``triton``; see
    :class:`quest_deploy.serving.triton.options.TritonOptions`.
    """
    opened, options = chosen.opened(), chosen.of(TritonOptions)
    with opened.reading(), progress_of(chosen.progress, "package") as shown:
        write_package = import_module("quest_deploy.serving.triton.package").write_package
        details: dict[str, Any] = write_package(
            opened, chosen.triton, options, shown, chosen.controlnet
        )
    if not details["plan"]:
        if "build-engine/tensorrt-rtx" in opened.stages:
            logger.info(RTX_IS_NO_PLAN)
        logger.info(NO_PLAN)
    return details


def inspect(
    path: Workspace | Path | str, *, progress: Progress | Display = no_progress
) -> Inspection:
    """Return what a workspace, a checkpoint, a graph or an engine holds, as a JSON value, and what
    the layers of a graph or an engine run in.
    """
    found: Inspection = import_module("quest_deploy.evaluation.inspection").inspect(
        path.root if isinstance(path, Workspace) else Path(path), progress
    )
    return found


@takes(ClientArguments)
def client(chosen: ClientArguments) -> DrawnImage:
    """Ask a server started by a package's serve.py for an image, and write it as a PNG file; None
    for what the server chooses. An interruption cancels it there too.
    """
    request: dict[str, Any] = {}
    for name in declared(ImageRequest):
        if (value := getattr(chosen, name)) is not None:
            is_file = isinstance(value, Path)
            request[name] = (
                read_bounded(value, MOST_IMAGE_BYTES, IMAGE_EXPECTED) if is_file else value
            )
    started = time.monotonic()
    with progress_of(chosen.progress, "client") as shown:
        drawn = import_module("quest_deploy.serving.client").request_image(
            chosen.url, request, shown, chosen.timeout
        )
    seconds = time.monotonic() - started
    with atomic_file(chosen.output) as temporary:
        temporary.write_bytes(drawn.png)
    return {
        "url": chosen.url,
        "picture": str(chosen.output),
        "seed": drawn.seed,
        "seconds": seconds,
    }
