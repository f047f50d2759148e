"""The pipeline on one page: the stages from a diffusion model to a judged engine, and what each
reads and writes.

A stage's options are in ``options.py``, its work in the module of its name, how all of them run in
``stage.py``. ``run.py`` goes through them in order; ``api.py`` has a function for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.workspace import (
    CALIBRATED,
    CHECKPOINT,
    ENGINES,
    FINETUNE_STATE,
    GRAPH,
    IMAGES,
    PARTS,
    RECONSTRUCT_STATE,
    REFERENCE,
    REFERENCE_STATE,
    REPORT_PAGE,
    REPORTS,
    SENSITIVITY_REPORT,
    TRAJECTORIES,
)
from quest_deploy.stages.options import (
    BenchmarkOptions,
    BuildEngineOptions,
    BuildPartsOptions,
    CalibrateOptions,
    EngineStageOptions,
    EvaluateOptions,
    ExportOptions,
    ExportPartsOptions,
    FinetuneOptions,
    GenerateOptions,
    ImportOptions,
    LoraOptions,
    RecordsOptions,
    SensitivityOptions,
    StageOptions,
)
from quest_deploy.stages.stage import DEPLOYED, FINISHED, Stage

if TYPE_CHECKING:
    from quest_deploy.stages.results import (
        Benchmark,
        BuiltEngine,
        BuiltParts,
        Calibration,
        Evaluation,
        Export,
        ExportedParts,
        Finetuning,
        Folding,
        Generation,
        Import,
        Reference,
        Report,
        Sensitivity,
        Verification,
    )

CALIBRATE: Stage[CalibrateOptions, Calibration] = Stage(
    "calibrate",
    CalibrateOptions,
    writes=(TRAJECTORIES, CALIBRATED),
    state=(RECONSTRUCT_STATE,),
    long=True,
)
IMPORT: Stage[ImportOptions, Import] = Stage(
    "import", ImportOptions, writes=(TRAJECTORIES, CALIBRATED)
)
LORA: Stage[LoraOptions, Folding] = Stage("lora", LoraOptions, writes=(TRAJECTORIES, CALIBRATED))
SENSITIVITY: Stage[SensitivityOptions, Sensitivity] = Stage(
    "sensitivity",
    SensitivityOptions,
    reads=(CALIBRATE,),
    writes=(f"{REPORTS}/{SENSITIVITY_REPORT}", f"{IMAGES}/sensitivity.png"),
)
FINETUNE: Stage[FinetuneOptions, Finetuning] = Stage(
    "finetune",
    FinetuneOptions,
    reads=(CALIBRATE,),
    writes=(CHECKPOINT,),
    state=(FINETUNE_STATE,),
    long=True,
)
EXPORT: Stage[ExportOptions, Export] = Stage(
    "export", ExportOptions, reads=(DEPLOYED,), writes=(GRAPH, f"{GRAPH}.data")
)
REFERENCE_RECORDS: Stage[RecordsOptions, Reference] = Stage(
    "reference",
    RecordsOptions,
    reads=(DEPLOYED,),
    writes=(f"{REFERENCE}/*",),
    state=(REFERENCE_STATE,),
)
BUILD_ENGINE: Stage[BuildEngineOptions, BuiltEngine] = Stage(
    "build-engine", BuildEngineOptions, reads=(EXPORT,), writes=(f"{ENGINES}/*/*",)
)
EXPORT_PARTS: Stage[ExportPartsOptions, ExportedParts] = Stage(
    "export-parts", ExportPartsOptions, writes=(f"{PARTS}/*/*",), alone=True
)
BUILD_PARTS: Stage[BuildPartsOptions, BuiltParts] = Stage(
    "build-parts", BuildPartsOptions, reads=(EXPORT_PARTS,), writes=(f"{PARTS}/*/*/*",)
)
VERIFY: Stage[EngineStageOptions, Verification] = Stage(
    "verify",
    EngineStageOptions,
    reads=(BUILD_ENGINE, REFERENCE_RECORDS),
    writes=(f"{REPORTS}/verify-*.json",),
)
BENCHMARK: Stage[BenchmarkOptions, Benchmark] = Stage(
    "benchmark",
    BenchmarkOptions,
    reads=(EXPORT, BUILD_ENGINE),
    writes=(f"{REPORTS}/benchmark-*.json",),
)
GENERATE: Stage[GenerateOptions, Generation] = Stage(
    "generate", GenerateOptions, reads=(BUILD_ENGINE,), writes=(f"{IMAGES}/*.png",)
)
EVALUATE: Stage[EvaluateOptions, Evaluation] = Stage(
    "evaluate",
    EvaluateOptions,
    reads=(DEPLOYED, BUILD_ENGINE),
    writes=(f"{REPORTS}/evaluate-*.json", f"{IMAGES}/compare-*.png", f"{IMAGES}/evaluate-*/*.png"),
)
REPORT: Stage[StageOptions, Report] = Stage(
    "report", StageOptions, reads=(FINISHED,), writes=(f"{REPORTS}/{REPORT_PAGE}",)
)

STAGES: tuple[Stage[Any, Any], ...] = (
    CALIBRATE,
    IMPORT,
    LORA,
    SENSITIVITY,
    FINETUNE,
    EXPORT,
    REFERENCE_RECORDS,
    BUILD_ENGINE,
    EXPORT_PARTS,
    BUILD_PARTS,
    VERIFY,
    BENCHMARK,
    GENERATE,
    EVALUATE,
    REPORT,
)
"""In the order in which they can run."""
