"""What each function of ``api.py`` takes, and each command: a stage's options and the workspace
that it is about.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from quest_deploy.artifacts.model_source import ModelSource
from quest_deploy.artifacts.workspace import REPORT_PAGE, REPORTS, SCHEDULES, Workspace
from quest_deploy.backends.options import REFIT_FROM, EngineOptions
from quest_deploy.backends.registry import BACKENDS
from quest_deploy.errors import InputError
from quest_deploy.importers.settings import Source
from quest_deploy.options import Option, Options
from quest_deploy.progress import Display, Progress, no_progress
from quest_deploy.serving.triton.options import TritonOptions
from quest_deploy.stages.options import (
    DEFAULT_BACKEND,
    IMPORT_SAMPLES,
    METHOD_HELP,
    METHODS,
    RECALIBRATION_SAMPLES,
    SCHEDULER,
    SEED,
    STEPS,
    BenchmarkOptions,
    BuildPartsOptions,
    CalibrateOptions,
    EngineStageOptions,
    EvaluateOptions,
    ExportOptions,
    ExportPartsOptions,
    FinetuneOptions,
    GenerateOptions,
    ReferenceOptions,
    SensitivityOptions,
    StageOptions,
)
from quest_deploy.stages.stage import Stage
from quest_deploy.stages.workspaces import (
    BITS,
    LORA,
    MODEL,
    ModelChoices,
    Place,
    SchemeChoices,
    create_workspace,
    only_workspace,
    open_workspace,
)

S = TypeVar("S", bound=StageOptions)
R = TypeVar("R")
WORKSPACE = Option(
    "The workspace folder.",
    flags=("--workspace", "-w"),
    default="quest-out/<model>-<bits>, or the only one in quest-out",
    text=Path,
)


def parse_numbers(text: str) -> list[float]:
    """The numbers of "999, 500"; raise InputError for anything else."""
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError as e:
        raise InputError(
            f"--timesteps: expected numbers separated by commas, found {text!r}"
        ) from e


@dataclass(frozen=True, kw_only=True)
class Arguments(Options):
    """The parameter that Python's callers give alone: a command shows its progress itself."""

    progress: Progress | Display = no_progress


@dataclass(frozen=True, kw_only=True)
class OfWorkspace(Arguments):
    """The parameters of what is about a workspace."""

    workspace: Place = field(default=None, kw_only=False, metadata=WORKSPACE.metadata)


@dataclass(frozen=True, kw_only=True)
class OnWorkspace(OfWorkspace):
    """The parameters of what works on a workspace that is there."""

    model: str | None = MODEL.field(None)
    bits: str | None = BITS.field(None)

    def opened(self) -> Workspace:
        """The workspace; raise InputError where it is not of the model or bits."""
        return open_workspace(self.workspace, self.model, self.bits)

    def run(self, stage: Stage[S, R]) -> R:
        """Run a stage with its options."""
        return stage.run(self.opened(), self.of(stage.options), self.progress)


@dataclass(frozen=True, kw_only=True)
class MakingOne(SchemeChoices, ModelChoices, OfWorkspace):
    """The parameters of all that makes a workspace where there is none."""

    @property
    def describes_a_new_one(self) -> bool:
        """Whether anything is chosen of a model or a scheme, or there is no workspace that can be
        meant; a workspace that is given alone may have been mistyped.
        """
        return (
            (self.workspace is None and only_workspace(None, None) is None)
            or self.of(ModelChoices) != ModelChoices()
            or self.of(SchemeChoices) != SchemeChoices()
        )

    def found(self) -> Workspace:
        """The workspace; raise InputError where there is none."""
        return open_workspace(self.workspace, self.model, self.bits)

    def opened(
        self,
        *,
        split_shortcuts: bool = False,
        check: Callable[[ModelSource], None] | None = None,
    ) -> Workspace:
        """The workspace; raise InputError where it is not of this model or scheme.

        Args:
            split_shortcuts: of a new one, where the user chose neither.
            check: called with the model's source before a new one is made.
        """
        return create_workspace(
            self.workspace,
            self.of(ModelChoices),
            self.of(SchemeChoices),
            split_shortcuts=split_shortcuts,
            check=check,
        )


@dataclass(frozen=True, kw_only=True)
class ExportArguments(ExportOptions, MakingOne):
    """The parameters of ``export``."""


@dataclass(frozen=True, kw_only=True)
class FromModel(MakingOne):
    """Those parameters with the model first: `calibrate sd15`."""

    workspace: Place = WORKSPACE.field(None)
    model: str | None = field(default=None, kw_only=False, metadata=MODEL.metadata)


@dataclass(frozen=True, kw_only=True)
class CalibrateArguments(CalibrateOptions, FromModel):
    """The parameters of ``calibrate``."""


@dataclass(frozen=True, kw_only=True)
class SensitivityArguments(SensitivityOptions, OnWorkspace):
    """The parameters of ``sensitivity``."""


@dataclass(frozen=True, kw_only=True)
class FinetuneArguments(FinetuneOptions, OnWorkspace):
    """The parameters of ``finetune``."""


@dataclass(frozen=True, kw_only=True)
class ReferenceArguments(ReferenceOptions, OnWorkspace):
    """The parameters of ``reference``."""


@dataclass(frozen=True, kw_only=True)
class BuildEngineArguments(EngineOptions, EngineStageOptions, OnWorkspace):
    """The parameters of ``build_engine``."""

    refit_from: Path | None = REFIT_FROM.field(None)


@dataclass(frozen=True, kw_only=True)
class ExportPartsArguments(ExportPartsOptions, OnWorkspace):
    """The parameters of ``export_parts``."""


@dataclass(frozen=True, kw_only=True)
class BuildPartsArguments(BuildPartsOptions, OnWorkspace):
    """The parameters of ``build_parts``."""


@dataclass(frozen=True, kw_only=True)
class VerifyArguments(EngineStageOptions, OnWorkspace):
    """The parameters of ``verify``."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkArguments(BenchmarkOptions, OnWorkspace):
    """The parameters of ``benchmark``."""


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(GenerateOptions, OnWorkspace):
    """The parameters of ``generate``."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(EvaluateOptions, OnWorkspace):
    """The parameters of ``evaluate``."""


@dataclass(frozen=True, kw_only=True)
class ReportArguments(OnWorkspace):
    """The parameters of ``report``."""

    output: Path | None = Option(
        "Where to write the page, which the manifest then does not record.",
        flags=("--output", "-o"),
        metavar="FILE",
        default=f"{REPORTS}/{REPORT_PAGE}, in the workspace",
    ).field(None)


@dataclass(frozen=True, kw_only=True)
class RunArguments(FromModel):
    """The parameters of ``run``.

    Attributes:
        on_result: called after each stage, with its name and its backend's, and its result.
    """

    method: str | None = Option(
        METHOD_HELP, choices=METHODS, default=f"the workspace's, or {CalibrateOptions.method}"
    ).field(None)
    backend: Sequence[str] = Option(
        f"Backends to verify and benchmark: {', '.join(BACKENDS)}; may be repeated.",
        default=DEFAULT_BACKEND,
    ).field((DEFAULT_BACKEND,))
    build_only: Sequence[str] = Option(
        "Backends to build for, without running; may be repeated."
    ).field(())
    if_available: bool = Option(
        "Leave out, by name, the backends that this machine lacks, unless it lacks all."
    ).field(False)
    seed: int | None = replace(
        SEED, help="Of calibration and finetuning.", default="the workspace's, or 0"
    ).field(None)
    on_result: Callable[[Workspace, str, Any], None] = lambda workspace, stage, result: None


@dataclass(frozen=True, kw_only=True)
class ImportArguments(Arguments):
    """The parameters of ``import_checkpoint``."""

    checkpoint: Path | str = field(
        kw_only=False,
        metadata=Option("The official checkpoint (ckpt.pth).", text=Path, argument=True).metadata,
    )
    source: Source | str = field(
        kw_only=False,
        metadata=Option("The code that wrote it.", flags=("--from",), text=Source).metadata,
    )
    unet: Path | str = field(
        kw_only=False,
        metadata=Option(
            "The CompVis UNet's configuration, YAML or JSON: an LDM config, or its UNet's "
            "parameters.",
            text=Path,
        ).metadata,
    )
    timesteps: Sequence[float] | None = Option(
        "QuEST: the calibrated timesteps, largest first, separated by commas.",
        default=False,
        text=str,
        parse=parse_numbers,
    ).field(None)
    weight_bits: int | None = Option("Bits of weights: 4 or 8.", default=False).field(None)
    activation_bits: int | None = Option("Bits of activations: 4 or 8.", default=False).field(None)
    first_last_bits: int | None = Option(
        "Bits of what the first and the last layer read: QuEST's commands set 8.", default=False
    ).field(None)
    softmax_bits: int | None = Option(
        "Bits of attention's softmax: 4, 8 or 16 (--sm_abit).", default=False
    ).field(None)
    symmetric: bool | None = Option(
        "Whether activations are symmetric (--a_sym).",
        flags=("--symmetric/--asymmetric",),
        default=False,
    ).field(None)
    context_tokens: int | None = Option(
        "Q-Diffusion: the length of the text or class condition.", default=False
    ).field(None)
    settings: Path | None = Option(
        "A JSON file with the settings above, by their names (timesteps a list).", default=False
    ).field(None)
    recalibrate: bool = Option(
        "Keep the rounded weights; choose new activation scales, deployable ones."
    ).field(False)
    samples: int | None = Option(
        "Samplings to record.",
        minimum=1,
        default=f"{IMPORT_SAMPLES}, or {RECALIBRATION_SAMPLES} to recalibrate",
    ).field(None)
    seed: int = SEED.field(0)
    workspace: Path | str | None = WORKSPACE.field(None)


@dataclass(frozen=True, kw_only=True)
class LoraArguments(OnWorkspace):
    """The parameters of ``lora``."""

    lora: Sequence[str] = field(
        metadata=replace(
            LORA,
            help="A LoRA to fold in, a .safetensors file; one that is in already gets the new "
            "weight, 0 takes it out; may be repeated.",
        ).metadata
    )
    output: Path | None = Option(
        "The new workspace's folder.",
        flags=("--output", "-o"),
        metavar="DIR",
        default="<workspace>-<LoRA>-<weight>",
    ).field(None)


SCHEDULE_PIXELS = Option(
    "Pixels of the images, for a model whose schedule depends on them (FLUX.1-dev).",
    minimum=8,
    default="the model's",
)


@dataclass(frozen=True, kw_only=True)
class ScheduleArguments(OnWorkspace):
    """The parameters of ``schedule``."""

    scheduler: str = SCHEDULER.field("ddim")
    steps: int | None = STEPS.field(None)
    height: int | None = SCHEDULE_PIXELS.field(None)
    width: int | None = SCHEDULE_PIXELS.field(None)
    output: Path | None = Option(
        flags=("--output", "-o"),
        metavar="FILE",
        default=f"{SCHEDULES}/<scheduler>-<steps>[-<height>x<width>].json",
    ).field(None)


@dataclass(frozen=True, kw_only=True)
class PackageArguments(TritonOptions, OnWorkspace):
    """The parameters of ``package``."""

    triton: Path = field(
        metadata=Option(
            "Write a package for Triton Inference Server there.", metavar="DIR"
        ).metadata
    )
    controlnet: Path | None = Option(
        "A ControlNet to serve beside the UNet, a folder in diffusers' layout, where the graph "
        "has its inputs.",
        metavar="DIR",
        default="none",
    ).field(None)


@dataclass(frozen=True, kw_only=True)
class ToServer(Arguments):
    """Which server."""

    url: str = field(
        kw_only=False,
        metadata=Option(
            "The server's gRPC service, such as 127.0.0.1:8001.",
            metavar="HOST:PORT",
            argument=True,
        ).metadata,
    )


@dataclass(frozen=True, kw_only=True)
class ImageRequest(Options):
    """What to ask a server for; None for what it chooses."""

    prompt: str | None = Option("What to draw, of a text-to-image model.").field(None)
    negative_prompt: str | None = Option("What not to draw.").field(None)
    label: int | None = Option("The class to draw, of a class-conditional model.").field(None)
    steps: int | None = Option("Denoising steps.", default="the server's").field(None)
    scheduler: str | None = Option(
        "A diffusers scheduler by its short name.", default="the server's"
    ).field(None)
    guidance: float | None = Option(
        "Classifier-free guidance weight; 1 or less is none.", default="the model's"
    ).field(None)
    init_image: Path | None = Option("What to inpaint or edit, of a model that does.").field(None)
    mask_image: Path | None = Option(
        "An image, white where --init-image is drawn anew, of a model that inpaints."
    ).field(None)
    image_guidance: float | None = Option(
        "Weight of the image that is edited, beside --guidance.", default="the model's"
    ).field(None)
    control_image: Path | None = Option(
        "What a ControlNet is shown, where the package has one."
    ).field(None)
    control_scale: float | None = Option(
        "Scale of what the ControlNet adds.",
        default="1",
    ).field(None)
    ip_adapter_image: Path | None = Option(
        "An image beside the prompt, where the package has an IP-Adapter."
    ).field(None)
    ip_adapter_scale: float | None = Option(
        "Scale of what the IP-Adapter adds.", default="that of the calibration"
    ).field(None)
    height: int | None = Option("Pixels.", default="the model's").field(None)
    width: int | None = Option("Pixels.", default="the model's").field(None)
    seed: int | None = Option(
        "The same seed draws the same image.", default="the server's choice"
    ).field(None)


@dataclass(frozen=True, kw_only=True)
class ClientArguments(ImageRequest, ToServer):
    """The parameters of ``client``."""

    output: Path = Option(
        "Where to write the PNG file.",
        flags=("--output", "-o"),
    ).field(Path("image.png"))
    timeout: float = Option("Seconds to wait for each step.", minimum=0.1).field(600.0)
