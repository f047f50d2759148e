"""The options of every stage, as its command and its function take them and the manifest records
them.

A stage runs again where its recorded options are not these. What is out of range is refused when
they are made.
"""

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from quest_deploy.artifacts.hashed_path import HashedPath
from quest_deploy.artifacts.image_folder import ImageFolder
from quest_deploy.artifacts.model_source import Lora, ModelSource
from quest_deploy.artifacts.scaled_folder import ScaledFolder
from quest_deploy.artifacts.workspace import ENGINES, REPORTS, SENSITIVITY_REPORT, Workspace
from quest_deploy.backends.base import VERSION, engine_info
from quest_deploy.backends.options import (
    ENGINE_OPTIONS,
    NATIVE,
    REFIT_FROM,
    TENSORRT,
    EngineOptions,
    declared_options,
    parse_sample_size,
)
from quest_deploy.backends.refit import refitted_options
from quest_deploy.backends.registry import BACKENDS, get_backend
from quest_deploy.errors import InputError
from quest_deploy.files import read_bounded, sha256_of
from quest_deploy.finetuning.choices import DEVICES, PRECISIONS, STAGES
from quest_deploy.importers.settings import ImportSettings
from quest_deploy.models.residuals import KINDS, flag
from quest_deploy.models.schedulers import SCHEDULERS
from quest_deploy.options import Option, Options, declared

DEFAULT_BACKEND = "openvino"
_MAX_PROMPT_BYTES = 2**20
QDIFF = "qdiff"
AUTO = "auto"
"""The layers that `quest-deploy sensitivity` picked."""
METHODS = ("mse", "minmax", "l2.4", QDIFF)
"""How clip ranges are chosen; Q-Diffusion searches with l2.4 and then reconstructs the model's
blocks.
"""
RECONSTRUCTION = {
    "samples": "reconstruction_samples",
    "rounding_steps": "rounding_steps",
    "scale_steps": "scale_steps",
    "batch": "reconstruction_batch",
}
"""The fields of ``ReconstructOptions``, and what they are called here."""
GRID_ROWS = 4
"""Images of each label that are drawn unless told otherwise."""
IMPORT_SAMPLES, RECALIBRATION_SAMPLES = 4, 64
"""Samplings that are recorded: to trace and verify an imported model with, and to recalibrate it
on.
"""


METRIC_FILES = ("clip", "lpips", "fid", "inception")
"""The options of an evaluation that name what a metric is measured with."""
METHOD_HELP = (
    "How clip ranges are chosen: mse, minmax or l2.4; or qdiff: l2.4, then Q-Diffusion's "
    "reconstruction (a new workspace has --split-shortcuts then)."
)
BACKEND = Option(f"The backend: {', '.join(BACKENDS)}.")
STEPS = Option("Denoising steps.", minimum=1, default="the model's, which is 20 of most")
SCHEDULER = Option(f"A diffusers scheduler: {', '.join(SCHEDULERS)}.", choices=tuple(SCHEDULERS))
GUIDANCE = Option(
    "Guidance weight; 1 or less is none where it is classifier-free.",
    minimum=0,
    default="the model's",
)
IMAGE_GUIDANCE = Option(
    "Weight of the image that an instruct-pix2pix model edits, beside --guidance.",
    minimum=1,
    default="the model's",
)
PIXELS = Option("Pixels, for a text-to-image model.", minimum=8, default="the model's")


def parse_list(text: str) -> tuple[str, ...]:
    """The parts of "a, b"."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_patterns(text: str) -> tuple[str, ...]:
    """The patterns of "conv_in, *.ff.*"; "all" is the one that every layer matches."""
    return ("*",) if text == "all" else parse_list(text)


def parse_layers(text: str) -> tuple[str, ...] | str:
    """The patterns, as of :func:`parse_patterns`, or ``AUTO``."""
    return text if text == AUTO else parse_patterns(text)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line, empty lines left out; raise InputError where it
    cannot be read or has none.
    """
    repair = "give a text file with a prompt a line"
    try:
        content = read_bounded(path, _MAX_PROMPT_BYTES, repair)
        # Windows' editors write a byte order mark, before UTF-16 too.
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        lines = content.decode("utf-16" if wide else "utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: expected a text file with a prompt a line ({e})") from e
    if prompts := tuple(line.strip() for line in lines if line.strip()):
        return prompts
    raise InputError(f"{path}: expected a prompt a line, and found none")


SEED = Option(minimum=0, maximum=2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class StageOptions(Options):
    """The options of a stage; of one without any, as it is."""

    unrecorded: ClassVar[tuple[str, ...]] = ()
    """Fields that do not shape the result."""
    unset: ClassVar[tuple[str, ...]] = ()
    """Fields that the manifest lacks where they are None."""

    def to_json(self) -> dict[str, Any]:
        """Return what the manifest records, of JSON's types and tuples."""
        return {
            name: value
            for name, value in super().to_json().items()
            if name not in self.unrecorded and (value is not None or name not in self.unset)
        }

    @classmethod
    def from_json(cls, recorded: Mapping[str, Any]) -> Self:
        """The options that were recorded; raise InputError where some are unknown."""
        names = {each.recorded: name for name, each in declared(cls).items()}
        if unknown := recorded.keys() - names:
            raise InputError(
                f"the manifest records options that this version does not know: "
                f"{', '.join(sorted(unknown))}"
            )
        try:
            return cls(**{names[key]: value for key, value in recorded.items()})
        except (TypeError, ValueError, AttributeError) as e:
            raise InputError(f"the manifest records options that cannot be used: {e}") from e

    def check_machine(self) -> None:
        """Raise InputError where this machine lacks what the stage needs, before any file is
        read.
        """

    def further_inputs(self, workspace: Workspace) -> list[str]:
        """The stages that these options read besides the stage's own, as the manifest of
        ``workspace`` calls them.
        """
        return []


@dataclass(frozen=True, kw_only=True)
class EngineStageOptions(StageOptions):
    """The options of a stage that is about the engine of ``backend``."""

    unrecorded: ClassVar[tuple[str, ...]] = ("backend",)
    backend: str = BACKEND.field(DEFAULT_BACKEND)

    def __post_init__(self) -> None:
        super().__post_init__()
        get_backend(self.backend)

    def check_machine(self) -> None:
        """Raise InputError where this machine cannot run the engine."""
        get_backend(self.backend).check_run(EngineOptions())


@dataclass(frozen=True, kw_only=True)
class ImageFolderOptions(StageOptions):
    """The options of a stage that starts from images."""

    image_folder: ImageFolder | Path | str | None = Option(
        "A folder of images for a model that inpaints, beside each NAME.png its NAME-mask.png, "
        "white where it is drawn anew, or that edits images.",
        metavar="DIR",
        default="made ones",
        text=Path,
        held=ImageFolder,
    ).field(None)

    @property
    def images_from(self) -> ImageFolder | None:
        """The folder, where one is given."""
        return self.image_folder if isinstance(self.image_folder, ImageFolder) else None


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(ImageFolderOptions):
    """How to calibrate; None for the model's own numbers, guidance weights, prompts and images."""

    unset: ClassVar[tuple[str, ...]] = (
        "image_folder",
        "image_guidance",
        *KINDS,
        "control_images",
        "ip_adapter_images",
    )
    method: str = Option(METHOD_HELP, choices=METHODS).field("mse")
    samples: int | None = Option(
        "Samplings to record.",
        minimum=1,
        default="the model's",
    ).field(None)
    steps: int | None = Option(
        "Sampling steps of each; more where that is needed to visit every bucket.",
        minimum=1,
        default="the model's",
    ).field(None)
    batch: int | None = Option(
        "Rows that run at once.",
        minimum=1,
        default="the model's",
    ).field(None)
    guidance: float | None = Option(
        "Guidance weight of the samplings; 1 or less is none where it is classifier-free.",
        minimum=0,
        default="the model's",
    ).field(None)
    image_guidance: float | None = IMAGE_GUIDANCE.field(None)
    prompts: Sequence[str] | None = Option(
        "A file with a prompt a line, for a text-to-image model.",
        default="a short list of ours",
        text=Path,
        parse=read_prompts,
    ).field(None)
    controlnet: Sequence[ScaledFolder | Path | str] | None = Option(
        "A ControlNet to calibrate with and without, a folder in diffusers' layout, and the "
        "scale of what it adds; may be repeated, all of them together.",
        metavar="DIR:SCALE",
        default="none",
        text=list[str],
        held=ScaledFolder,
    ).field(None)
    t2i_adapter: Sequence[ScaledFolder | Path | str] | None = Option(
        "A T2I-adapter to calibrate with and without, likewise.",
        metavar="DIR:SCALE",
        default="none",
        text=list[str],
        held=ScaledFolder,
    ).field(None)
    control_images: Sequence[ImageFolder | Path | str] | None = Option(
        "A folder of what ControlNets and T2I-adapters are shown, such as edges or poses; "
        "repeated, each is shown its own, the ControlNets first.",
        metavar="DIR",
        default="edges of the model's own pictures",
        text=list[Path],
        held=ImageFolder,
    ).field(None)
    ip_adapter_images: ImageFolder | Path | str | None = Option(
        "A folder of what the IP-Adapter is shown.",
        metavar="DIR",
        default="the model's own pictures",
        text=Path,
        held=ImageFolder,
    ).field(None)
    reconstruction_samples: int | None = Option(
        "qdiff: recorded samples it learns from.", minimum=1
    ).field(None)
    rounding_steps: int | None = Option(
        "qdiff: steps a block that learn the rounding.", minimum=0
    ).field(None)
    scale_steps: int | None = Option(
        "qdiff: steps a block that learn the activation scales.", minimum=0
    ).field(None)
    reconstruction_batch: int | None = Option("qdiff: samples a step.", minimum=1).field(None)
    seed: int = SEED.field(0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.control_images and not any(self.controls.values()):
            raise InputError(f"--control-images: needs {' or '.join(map(flag, KINDS))}")
        if self.reconstruction and self.method != QDIFF:
            flags = [declared(type(self))[RECONSTRUCTION[x]].flag for x in self.reconstruction]
            raise InputError(f"{', '.join(flags)}: needs --method {QDIFF}, not {self.method}")

    @property
    def reconstruction(self) -> dict[str, int]:
        """What was chosen of ``ReconstructOptions``."""
        values = {name: getattr(self, option) for name, option in RECONSTRUCTION.items()}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def controls(self) -> dict[str, tuple[ScaledFolder, ...]]:
        """The ControlNets and the T2I-adapters, by kind."""
        return {kind: getattr(self, kind) or () for kind in KINDS}

    @property
    def shown(self) -> tuple[ImageFolder, ...]:
        """The folders of what they are shown, where some are given."""
        return tuple(x for x in self.control_images or () if isinstance(x, ImageFolder))

    @property
    def ip_images(self) -> ImageFolder | None:
        """The folder of what the IP-Adapter is shown, where one is given."""
        given = self.ip_adapter_images
        return given if isinstance(given, ImageFolder) else None

    def check_source(self, source: ModelSource) -> None:
        """Raise InputError for an IP-Adapter's images where the model has none."""
        if self.ip_images is not None and source.ip_adapter is None:
            raise InputError("--ip-adapter-images: needs a workspace with --ip-adapter")

    def to_json(self) -> dict[str, Any]:
        """The options, those of the reconstruction by themselves."""
        found = super().to_json()
        apart = {name: found[name] for name in found.keys() - RECONSTRUCTION.values()}
        return apart | {"reconstruction": self.reconstruction}

    @classmethod
    def from_json(cls, recorded: Mapping[str, Any]) -> Self:
        reconstruction: Any = recorded.get("reconstruction", {})
        if not isinstance(reconstruction, dict):
            raise InputError(
                f"the manifest records options that cannot be used: reconstruction {reconstruction}"
            )
        options = {name: recorded[name] for name in recorded.keys() - {"reconstruction"}}
        options |= {RECONSTRUCTION.get(str(k), str(k)): x for k, x in reconstruction.items()}
        return super().from_json(options)


@dataclass(frozen=True, kw_only=True)
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
    recalibrate: bool
    samples: int | None
    seed: int

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


@dataclass(frozen=True, kw_only=True)
class LoraOptions(StageOptions):
    """Which LoRAs to fold into which checkpoint.

    Attributes:
        base: the folder of the checkpoint's workspace.
        checkpoint: its file.
        loras: those that were given, also one of weight 0, which is taken out.
        export: the options that the base was exported with, which ``run`` exports with too.
    """

    base: Path
    checkpoint: Path
    loras: tuple[Lora, ...]
    export: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The checkpoint by its hash."""
        return {
            "base": str(self.base),
            "checkpoint_sha256": sha256_of(self.checkpoint),
            "loras": [asdict(lora) for lora in self.loras],
            **({"export": dict(self.export)} if self.export else {}),
        }


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(StageOptions):
    """How to measure the layers' sensitivity."""

    samples: int = Option(
        "Recorded rows to run through, at all their steps; a sampling with guidance has two, "
        "or three.",
        minimum=1,
    ).field(4)
    batch: int = Option("Rows that run at once.", minimum=1).field(32)


@dataclass(frozen=True, kw_only=True)
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
    stages: Sequence[str] | None = Option(
        "The stages in order, separated by commas.",
        choices=STAGES,
        default="temporal,sensitive",
        text=str,
        parse=parse_list,
    ).field(None)
    temporal_layers: Sequence[str] | None = Option(
        "Layers of the temporal stage: globs separated by commas, or all.",
        default="the model family's",
        text=str,
        parse=parse_patterns,
    ).field(None)
    layers: Sequence[str] | str | None = Option(
        f"Layers of the sensitive stage: globs separated by commas, all, or {AUTO} "
        f"({REPORTS}/{SENSITIVITY_REPORT} picks them).",
        default="the model family's",
        text=str,
        parse=parse_layers,
        recorded="sensitive_layers",
    ).field(None)
    carry_temporal: bool | None = Option(
        "Whether the sensitive stage trains the temporal layers on, where their stage came first.",
        flags=("--carry-temporal/--freeze-temporal",),
        default="carry",
    ).field(None)
    temporal_steps: int | None = Option(
        "Optimizer steps of the temporal stage.",
        minimum=0,
    ).field(None)
    sensitive_steps: int | None = Option(
        "Optimizer steps of the sensitive stage.", minimum=0
    ).field(None)
    batch: int | None = Option("Samples a step, over all processes.", minimum=1).field(None)
    weight_rate: float | None = Option("Learning rate of the weights.", minimum=0).field(None)
    scale_rate: float | None = Option(
        "Learning rate of the activation scales.",
        minimum=0,
    ).field(None)
    output_loss: float | None = Option(
        "Weight of the loss at the model's output.", minimum=0
    ).field(None)
    block_loss: float | None = Option(
        "Weight of the loss at its blocks' outputs.", minimum=0
    ).field(None)
    guidance_loss: float | None = Option(
        "Weight of the loss that keeps the length of what guidance multiplies, the difference "
        "between conditional and unconditional outputs.",
        minimum=0,
    ).field(None)
    precision: str | None = Option(
        "float32, or bf16 for the float arithmetic between the quantizers.", choices=PRECISIONS
    ).field(None)
    seed: int = SEED.field(0)
    device: str = Option("cpu or cuda.", choices=DEVICES).field("cpu")
    gradient_checkpointing: bool = Option(
        "Compute activations again in the backward pass: less memory, more time.",
        flags=("--gradient-checkpointing/--no-gradient-checkpointing",),
    ).field(False)
    target_cache: int = Option(
        "MiB on disk for the float model's block outputs, per process.", minimum=1
    ).field(1024)
    save_every: int = Option("Steps between two saved states.", minimum=1).field(20)

    def to_json(self) -> dict[str, Any]:
        """Return what was chosen of what shapes the result."""
        return {name: value for name, value in super().to_json().items() if value is not None}

    @property
    def execution(self) -> dict[str, Any]:
        """What does not shape the result."""
        return {name: getattr(self, name) for name in self.unrecorded}


@dataclass(frozen=True, kw_only=True)
class AddedInputsOptions(StageOptions):
    """Which inputs of what is added inside the model there are."""

    unset: ClassVar[tuple[str, ...]] = ("controlnet_inputs", "t2i_adapter_inputs")
    controlnet_inputs: bool | None = Option(
        "Give the graph the inputs of what ControlNets add.",
        flags=("--controlnet-inputs/--no-controlnet-inputs",),
        default="where it was calibrated with --controlnet",
    ).field(None)
    t2i_adapter_inputs: bool | None = Option(
        "Give the graph the inputs of what T2I-adapters add.",
        flags=("--t2i-adapter-inputs/--no-t2i-adapter-inputs",),
        default="where it was calibrated with --t2i-adapter",
    ).field(None)

    @property
    def added_inputs(self) -> dict[str, bool | None]:
        """The options by kind."""
        return {kind: getattr(self, f"{kind}_inputs") for kind in KINDS}


@dataclass(frozen=True, kw_only=True)
class ExportOptions(AddedInputsOptions):
    """What the graph takes."""


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions(StageOptions):
    """The options of :func:`quest_deploy.verification.reference.save_reference`."""

    seed: int = SEED.field(0)
    megabytes: int = Option(
        "The largest record; where it cannot hold all quantized tensors, the records hold "
        "them in turn.",
        minimum=1,
    ).field(1000)
    measured: int | None = Option(
        "In how many records the model's sensitivity to last-bit differences is measured.",
        minimum=1,
        default="all, or 2 where a record cannot hold all quantized tensors",
    ).field(None)
    sample_size: tuple[int, int] | None = Option(
        "Cut the recorded samples down to this size: a large model's records then hold "
        "more quantized tensors, in less time.",
        metavar="SIZE|HEIGHTxWIDTH",
        default="as recorded",
        text=str,
        parse=parse_sample_size,
    ).field(None)

    def to_json(self) -> dict[str, Any]:
        """The options and the version of the records."""
        # Imports numpy, a sixth of the time that the program's help takes.
        from quest_deploy.artifacts.reference import VERSION

        return {**super().to_json(), "version": VERSION}


@dataclass(frozen=True, kw_only=True)
class BuildEngineOptions(EngineStageOptions):
    """How to build the engine of ``backend``."""

    engine: EngineOptions = field(default_factory=EngineOptions)
    refit_from: Path | None = REFIT_FROM.field(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        get_backend(self.backend).check_options(self.engine)
        if self.refit_from is not None and (
            refusal := REFIT_FROM.refusal(self.backend, self.engine.provider, self.refit_from)
        ):
            raise InputError(f"--refit-from: {refusal}")

    @property
    def base(self) -> Path | None:
        """The folder of the engine to refit; None where one is built."""
        if self.refit_from is None:
            return None
        return Workspace.open(self.refit_from).path(ENGINES, self.backend)

    @property
    def resolved(self) -> EngineOptions:
        """The engine's options with what the backend chooses on this machine, or those of the
        engine that is refitted.
        """
        if (base := self.base) is not None:
            return refitted_options(base, self.engine)
        return get_backend(self.backend).resolve(self.engine)

    def check_machine(self) -> None:
        """Raise InputError where this machine cannot build the engine, or refit the other one."""
        options, backend = self.resolved, get_backend(self.backend)
        if (base := self.base) is not None:
            backend.check_engine(engine_info(base))
        else:
            backend.check_build(options)

    def to_json(self) -> dict[str, Any]:
        """The engine's options and what they depend on: the machine's answers, and the content of
        the plugin, or of the engine to refit, which may be another one at the same place; and the
        version of the record.
        """
        options, base = self.resolved, self.base
        answers = get_backend(self.backend).answers(options)
        plugin = {} if options.plugins is None else {"plugin_sha256": sha256_of(options.plugins)}
        refitted = {} if base is None else {"refitted_from": engine_info(base).graph_sha256}
        return options.to_json() | answers | plugin | refitted | {"version": VERSION}


WEIGHTS = FP32, INT8 = ("fp32", "int8")
"""How the weights of parts are stored; they compute in float."""


@dataclass(frozen=True, kw_only=True)
class ExportPartsOptions(StageOptions):
    """How text encoders and VAE are stored."""

    weights: str = Option(
        "Of the large weights: fp32, or int8, symmetric with a scale for each output channel, "
        "dequantized where they are read: a quarter of the size.",
        choices=WEIGHTS,
    ).field(FP32)


def _of_parts(name: str, **changes: Any) -> Option:
    """An engine's option, as the parts' engines take it."""
    return replace(ENGINE_OPTIONS[name].option, **changes)


@dataclass(frozen=True, kw_only=True)
class BuildPartsOptions(EngineStageOptions):
    """How to build the engines of the parts for ``backend``."""

    provider: str = _of_parts("provider").field(EngineOptions.provider)
    threads: int = _of_parts("threads").field(EngineOptions.threads)
    dtype: str = _of_parts(
        "dtype",
        help="What they compute in: fp32; openvino takes bf16 too, where the processor has it.",
        choices=("fp32", "bf16"),
        limits={name: ("fp32",) for name in BACKENDS if name != "openvino"},
        reasons={},
    ).field(EngineOptions.dtype)
    compute_capability: Sequence[str] = _of_parts("compute_capability").field(())
    max_batch: int = _of_parts("max_batch").field(EngineOptions.max_batch)
    sample_size: Sequence[tuple[int, int]] = _of_parts("sample_size").field(())

    def __post_init__(self) -> None:
        super().__post_init__()
        for each, option in declared_options(type(self)):
            value = getattr(self, each.name)
            if value != each.default and (
                refusal := option.refusal(self.backend, self.provider, value)
            ):
                raise InputError(f"{each.flag}: {refusal}")
        get_backend(self.backend).check_options(self.engine)

    @property
    def engine(self) -> EngineOptions:
        """The engines' options: prompts and images come one by one, and nothing is quantized."""
        own: dict[str, dict[str, Any]] = {"openvino": {"compiled_batch": (1,)}}
        own |= {name: {"quantize": NATIVE} for name in TENSORRT}
        chosen = {each.name: getattr(self, each.name) for each, _ in declared_options(type(self))}
        return get_backend(self.backend).resolve(
            EngineOptions(**chosen, **own.get(self.backend, {}))
        )

    def check_machine(self) -> None:
        """Raise InputError where this machine cannot build the engines."""
        get_backend(self.backend).check_build(self.engine)

    def to_json(self) -> dict[str, Any]:
        """The engines' options, and the version of their records."""
        return self.engine.to_json() | {"version": VERSION}


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(EngineStageOptions):
    """What to time."""

    unset: ClassVar[tuple[str, ...]] = ("steps", "scheduler", "guidance", "images", "draws")
    batch: Sequence[int] = Option(
        "A batch size; may be repeated. [default: 1 and 16]", minimum=1, recorded="batches"
    ).field((1, 16))
    runs: int = Option("Timed inferences of each engine.", minimum=1).field(50)
    warmup: int = Option("Untimed inferences before.", minimum=0).field(5)
    static: bool = Option(
        "Time static scales too; a large model's third engine may not fit into memory.",
        flags=("--static/--no-static",),
    ).field(True)
    pipeline: bool = Option(
        "Time whole images too: text encoder, UNet, decoder; of a text-to-image model."
    ).field(False)
    steps: int | None = Option(
        "Of --pipeline: denoising steps.", minimum=1, default="the model's, which is 20 of most"
    ).field(None)
    scheduler: str | None = Option(
        "Of --pipeline: a diffusers scheduler, such as ddim or unipc.",
        choices=tuple(SCHEDULERS),
        default="ddim",
    ).field(None)
    guidance: float | None = Option(
        "Of --pipeline: guidance weight; 1 or less is none where it is classifier-free.",
        minimum=0,
        default="the model's",
    ).field(None)
    images: int | None = Option(
        "Of --pipeline: images drawn at once.", minimum=1, default="1"
    ).field(None)
    draws: int | None = Option(
        "Of --pipeline: timed drawings with each engine, after an untimed one.",
        minimum=1,
        default="3",
    ).field(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pipeline and (given := [x for x in self.unset if getattr(self, x) is not None]):
            raise InputError(f"{', '.join(f'--{name}' for name in given)}: needs --pipeline")

    def to_json(self) -> dict[str, Any]:
        """The options, those of whole images only where they are timed."""
        found = super().to_json()
        return found if self.pipeline else {k: v for k, v in found.items() if k != "pipeline"}

    def further_inputs(self, workspace: Workspace) -> list[str]:
        """Return the engines of the parts, where they are built and whole images are timed."""
        parts = f"build-parts/{self.backend}"
        return [parts] if self.pipeline and parts in workspace.stages else []

    @property
    def drawing(self) -> "GenerateOptions":
        """How whole images are drawn."""
        return GenerateOptions(
            backend=self.backend,
            rows=self.images or 1,
            steps=self.steps,
            scheduler=self.scheduler or "ddim",
            guidance=self.guidance,
        )


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(EngineStageOptions):
    """What to draw; None for one of the package's prompts, and for the model's own size, steps and
    guidance weight.
    """

    unset: ClassVar[tuple[str, ...]] = (
        "labels",
        "steps",
        "guidance",
        "prompt",
        "negative_prompt",
        "height",
        "width",
        "image",
        "mask",
        "image_guidance",
    )
    prompt: Sequence[str] | None = Option(
        "What to draw, for a text-to-image model; may be repeated.", default="one of ours"
    ).field(None)
    negative_prompt: str | None = Option("What not to draw.").field(None)
    image: Path | None = Option(
        "What to inpaint or edit, for a model that does.", default="a made one"
    ).field(None)
    mask: Path | None = Option(
        "An image as large as --image, white where it is drawn anew, for a model that inpaints.",
        default="a made one",
    ).field(None)
    labels: str | None = Option(
        "The classes to draw, one column each: 0123, or 207,360 where there are more.",
        default="the first ten",
    ).field(None)
    rows: int | None = Option(
        "Images of each.", minimum=1, default=f"{GRID_ROWS}, or 1 for a text-to-image model"
    ).field(None)
    steps: int | None = STEPS.field(None)
    guidance: float | None = GUIDANCE.field(None)
    image_guidance: float | None = IMAGE_GUIDANCE.field(None)
    scheduler: str = SCHEDULER.field("ddim")
    height: int | None = PIXELS.field(None)
    width: int | None = PIXELS.field(None)
    seed: int = SEED.field(0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels is not None and not re.fullmatch("[0-9]+(,[0-9]{1,9})*", self.labels):
            raise InputError(
                f"--labels: expected digits such as 0123456789, or numbers such as 207,360, not "
                f"{self.labels!r}"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(EngineStageOptions, ImageFolderOptions):
    """What to judge by; see :class:`quest_deploy.evaluation.quality.SamplingOptions`. None for the
    model's own.
    """

    unset: ClassVar[tuple[str, ...]] = (
        "images",
        "steps",
        "guidance",
        "image_guidance",
        "image_folder",
        "clip",
        "lpips",
        "fid",
        "inception",
    )
    images: int | None = Option(
        "Images to draw with each.", minimum=2, default="the model's own"
    ).field(None)
    steps: int | None = STEPS.field(None)
    guidance: float | None = GUIDANCE.field(None)
    image_guidance: float | None = IMAGE_GUIDANCE.field(None)
    scheduler: str = SCHEDULER.field("ddim")
    seed: int = SEED.field(2024)
    clip: HashedPath | Path | str | None = Option(
        "A folder with a CLIP model in transformers' layout: measure the CLIP score, of a "
        "text-to-image model.",
        metavar="DIR",
        text=Path,
        held=HashedPath,
    ).field(None)
    lpips: HashedPath | Path | str | None = Option(
        "torchvision's weights of an AlexNet or a VGG-16, a .pth file: measure LPIPS to FP32's "
        "images.",
        metavar="FILE",
        text=Path,
        held=HashedPath,
    ).field(None)
    fid: HashedPath | Path | str | None = Option(
        "A folder of real images: measure the Frechet inception distance to them, with "
        "--inception.",
        metavar="DIR",
        text=Path,
        held=HashedPath,
    ).field(None)
    inception: HashedPath | Path | str | None = Option(
        "torch-fidelity's weights of an Inception v3, a .pth file, for --fid.",
        metavar="FILE",
        text=Path,
        held=HashedPath,
    ).field(None)

    @property
    def metric_files(self) -> dict[str, HashedPath]:
        """What is given of ``METRIC_FILES``."""
        found = {name: getattr(self, name) for name in METRIC_FILES}
        return {name: given for name, given in found.items() if isinstance(given, HashedPath)}


@dataclass(frozen=True, kw_only=True)
class RecordsOptions(ReferenceOptions, AddedInputsOptions):
    """The same with the inputs of the exported graph, which the user chooses there."""
