"""The options of every stage, as its command and its function take them and the manifest records
them.

A stage runs again where its recorded options are not these. What is out of range is refused when
they are made.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from quest_deploy.backends.base import EngineOptions
from quest_deploy.backends.registry import check_options, get_backend
from quest_deploy.errors import InputError
from quest_deploy.files import sha256_of
from quest_deploy.models.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from quest_deploy.importers.settings import ImportSettings

DEFAULT_BACKEND = "openvino"
QDIFF = "qdiff"
METHODS = ("mse", "minmax", "l2.4", QDIFF)
"""How clip ranges are chosen; Q-Diffusion searches with l2.4 and then reconstructs the model's
blocks.
"""
RECONSTRUCTION_OPTIONS = {
    "samples": "--reconstruction-samples",
    "rounding_steps": "--rounding-steps",
    "scale_steps": "--scale-steps",
    "batch": "--reconstruction-batch",
}
"""How a field of ``ReconstructOptions`` is called at the command line."""
GRID_ROWS = 4
"""Images of each label that are drawn unless told otherwise."""
IMPORT_SAMPLES, RECALIBRATION_SAMPLES = 4, 64
"""Samplings that are recorded: to trace and verify an imported model with, and to recalibrate it
on.
"""


@dataclass(frozen=True)
class StageOptions:
    """The options of a stage; of one without any, as it is."""

    unrecorded: ClassVar[tuple[str, ...]] = ()
    """Fields that do not shape the result."""
    unset: ClassVar[tuple[str, ...]] = ()
    """Fields that the manifest lacks where they are None."""

    def to_json(self) -> dict[str, Any]:
        """What the manifest records, of JSON's types and tuples."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in self.unrecorded and (value is not None or name not in self.unset)
        }

    @classmethod
    def from_json(cls, recorded: dict[str, Any]) -> Self:
        """The options that were recorded; raise InputError where some are unknown."""
        if unknown := recorded.keys() - {each.name for each in fields(cls)}:
            raise InputError(
                f"expected options of {cls.__name__}, found {', '.join(sorted(unknown))}"
            )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in recorded.items()})

    def check_machine(self) -> None:
        """Raise InputError where this machine lacks what the stage needs, before any file is
        read.
        """


@dataclass(frozen=True)
class EngineStageOptions(StageOptions):
    """The options of a stage that is about the engine of ``backend``."""

    unrecorded: ClassVar[tuple[str, ...]] = ("backend",)
    backend: str = DEFAULT_BACKEND

    def __post_init__(self) -> None:
        get_backend(self.backend)

    def check_machine(self) -> None:
        """Raise InputError where this machine cannot run the engine."""
        get_backend(self.backend).check_run(EngineOptions())


@dataclass(frozen=True)
class CalibrateOptions(StageOptions):
    """How to calibrate.

    Attributes:
        samples, steps: samplings of so many DDIM steps (or more, to visit every bucket); None for
            the model's own numbers.
        method: one of ``METHODS``.
        reconstruction: of ``ReconstructOptions``, for "qdiff".
        batch: rows that run through the float model at once; None for the model's own number.
        guidance: the classifier-free guidance weight of the samplings; None for the model's own.
        prompts: for a text-to-image model; None for those of the package.
    """

    samples: int | None = None
    steps: int | None = None
    method: str = "mse"
    seed: int = 0
    reconstruction: dict[str, int] = field(default_factory=dict)
    batch: int | None = None
    guidance: float | None = None
    prompts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise InputError("calibration needs a batch of at least one row")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise InputError(f"expected a guidance weight of 0 or more, not {self.guidance}")
        if self.method not in METHODS:
            raise InputError(
                f"unknown calibration method {self.method!r}: expected one of {', '.join(METHODS)}"
            )
        if (self.samples is not None and self.samples < 1) or (
            self.steps is not None and self.steps < 1
        ):
            raise InputError("calibration needs at least one sample and one step")
        if not self.reconstruction.keys() <= RECONSTRUCTION_OPTIONS.keys():
            raise InputError(
                f"unknown options of the reconstruction: {', '.join(self.reconstruction)}"
            )
        if self.reconstruction and self.method != QDIFF:
            raise InputError(
                f"{', '.join(RECONSTRUCTION_OPTIONS.values())}: expected --method {QDIFF} with "
                f"them, not {self.method}"
            )


@dataclass(frozen=True)
class ImportOptions(StageOptions):
    """Which checkpoint of the official code to import.

    Attributes:
        checkpoint: its file.
        unet: the CompVis UNet's configuration.
        settings: what the files do not say.
        recalibrate: keep the rounded weights, but choose new activation scales that can be
            deployed.
        samples: samplings to record, None for IMPORT_SAMPLES or RECALIBRATION_SAMPLES.
    """

    checkpoint: Path
    unet: Path
    settings: ImportSettings
    recalibrate: bool = False
    samples: int | None = None
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """The files with their hashes; the checkpoint's scheme says what the settings were."""
        return {
            "checkpoint": str(self.checkpoint),
            "checkpoint_sha256": sha256_of(self.checkpoint),
            "unet": str(self.unet),
            "unet_sha256": sha256_of(self.unet),
            "recalibrate": self.recalibrate,
            "samples": self.samples,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class SensitivityOptions(StageOptions):
    """How to measure the layers' sensitivity: over ``samples`` recorded samplings at all their
    steps, ``batch`` rows at once.
    """

    samples: int = 4
    batch: int = 32


@dataclass(frozen=True)
class FinetuneOptions(StageOptions):
    """How to finetune.

    Attributes:
        stages: ..., seed: of :class:`quest_deploy.finetuning.train.FinetuneOptions`; None for the
            model's own.
        device: ..., save_every: of :func:`quest_deploy.finetuning.train.finetune`; they do not
            shape the result.
    """

    unrecorded: ClassVar[tuple[str, ...]] = (
        "device",
        "gradient_checkpointing",
        "target_cache",
        "save_every",
    )
    stages: tuple[str, ...] | None = None
    temporal_layers: tuple[str, ...] | None = None
    sensitive_layers: tuple[str, ...] | None = None
    carry_temporal: bool | None = None
    temporal_steps: int | None = None
    sensitive_steps: int | None = None
    batch: int | None = None
    weight_rate: float | None = None
    scale_rate: float | None = None
    output_loss: float | None = None
    block_loss: float | None = None
    precision: str | None = None
    seed: int = 0
    device: str = "cpu"
    gradient_checkpointing: bool = False
    target_cache: int = 1024
    save_every: int = 20

    def to_json(self) -> dict[str, Any]:
        """What was chosen of what shapes the result."""
        return {name: value for name, value in super().to_json().items() if value is not None}

    @property
    def execution(self) -> dict[str, Any]:
        """What does not shape the result."""
        return {name: getattr(self, name) for name in self.unrecorded}


@dataclass(frozen=True)
class ReferenceOptions(StageOptions):
    """The options of :func:`quest_deploy.verification.reference.save_reference`."""

    seed: int = 0
    megabytes: int = 1000
    measured: int | None = None
    sample_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.megabytes < 1 or (self.measured is not None and self.measured < 1):
            raise InputError("--megabytes and --measured: expected 1 or more")

    def to_json(self) -> dict[str, Any]:
        """The options and the version of the records."""
        # Imports numpy, a sixth of the time that the program's help takes.
        from quest_deploy.artifacts.reference import VERSION

        return {**super().to_json(), "version": VERSION}


@dataclass(frozen=True)
class BuildEngineOptions(EngineStageOptions):
    """How to build the engine of ``backend``."""

    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.backend, self.engine)

    @property
    def resolved(self) -> EngineOptions:
        """The engine's options with what the backend chooses on this machine."""
        return get_backend(self.backend).resolve(self.engine)

    def check_machine(self) -> None:
        """Raise InputError where this machine cannot build the engine."""
        get_backend(self.backend).check_build(self.resolved)

    def to_json(self) -> dict[str, Any]:
        """The engine's options and what they depend on: the machine's answers, and the plugin's
        content, which may be another one at the same place.
        """
        options = self.resolved
        answers = get_backend(self.backend).answers(options)
        plugin = (
            {} if options.plugins is None else {"plugin_sha256": sha256_of(Path(options.plugins))}
        )
        return asdict(options) | answers | plugin


@dataclass(frozen=True)
class BenchmarkOptions(EngineStageOptions):
    """What to time: ``runs`` inferences after ``warmup`` untimed ones at each of ``batches``, and
    with ``static`` an engine of static scales too.
    """

    batches: tuple[int, ...] = (1, 16)
    runs: int = 50
    warmup: int = 5
    static: bool = True


@dataclass(frozen=True)
class GenerateOptions(EngineStageOptions):
    """What to draw.

    Attributes:
        labels: the classes, one column each: "0123", or "207,360"; None for the first ten.
        rows: images of each; None for 4, or 1 for a text-to-image model.
        steps: denoising steps.
        guidance: classifier-free guidance weight; None for the model's.
        scheduler: one of ``SCHEDULERS``.
        prompt, negative_prompt, height, width: for a text-to-image model; None for one of the
            package's prompts, and for the model's size in pixels.
    """

    unset: ClassVar[tuple[str, ...]] = (
        "labels",
        "guidance",
        "prompt",
        "negative_prompt",
        "height",
        "width",
    )
    labels: str | None = None
    rows: int | None = None
    steps: int = 20
    guidance: float | None = None
    scheduler: str = "ddim"
    seed: int = 0
    prompt: tuple[str, ...] | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheduler not in SCHEDULERS:
            raise InputError(
                f"unknown scheduler {self.scheduler!r}: expected one of {', '.join(SCHEDULERS)}"
            )


@dataclass(frozen=True)
class EvaluateOptions(EngineStageOptions):
    """What to judge by; see :class:`quest_deploy.evaluation.quality.SamplingOptions`. None for the
    model's own.
    """

    unset: ClassVar[tuple[str, ...]] = ("images", "guidance")
    images: int | None = None
    steps: int = 20
    guidance: float | None = None
    scheduler: str = "ddim"
    seed: int = 2024
