"""`quest-deploy calibrate`: choose every scale from the FP32 model's own sampling trajectories
(PTQ).
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy import __version__
from quest_deploy.artifacts.workspace import CALIBRATED, RECONSTRUCT_STATE, TRAJECTORIES
from quest_deploy.cli.console import Console, size
from quest_deploy.cli.options import (
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
from quest_deploy.cli.stage import run_stage
from quest_deploy.errors import InputError
from quest_deploy.files import read_json, sha256_of, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from quest_deploy.artifacts.checkpoint import Checkpoint
    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.calibration.trajectories import Trajectories
    from quest_deploy.cli.console import Update

    Start = tuple[Trajectories, Checkpoint]
    """What reconstruction starts from: the recorded trajectories and the model calibrated on them.
    """

QDIFF = "qdiff"
METHODS = ("mse", "minmax", "l2.4", QDIFF)
"""How clip ranges are chosen; Q-Diffusion searches with l2.4 and then reconstructs the model's
blocks.
"""
DEFAULT_METHOD = "mse"
METHOD_HELP = (
    "How clip ranges are chosen: mse, minmax or l2.4; or qdiff: l2.4, then Q-Diffusion's "
    "reconstruction "
    "(a new workspace has --split-shortcuts then)."
)
RECONSTRUCTION_OPTIONS = {
    "samples": "--reconstruction-samples",
    "rounding_steps": "--rounding-steps",
    "scale_steps": "--scale-steps",
    "batch": "--reconstruction-batch",
}
"""How a field of ``ReconstructOptions`` is called at the command line."""
_MAX_PROMPT_BYTES = 2**20
MADE_FROM = "made-from.json"
"""Beside the start that reconstruction keeps: what it was made from, and its files' hashes."""


@dataclasses.dataclass(frozen=True)
class CalibrateOptions:
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
    method: str = DEFAULT_METHOD
    seed: int = 0
    reconstruction: dict[str, int] = dataclasses.field(default_factory=dict)
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


def calibrate_stage(
    workspace: Workspace, console: Console, options: CalibrateOptions, *, reuse: bool = False
) -> dict[str, Any]:
    """Record trajectories and calibrate; writes trajectories.safetensors and
    calibrated.safetensors.

    An interrupted reconstruction goes on: what comes before it is kept with its state, and read
    from there.
    """

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        from quest_deploy.artifacts.checkpoint import save_checkpoint
        from quest_deploy.calibration.ptq import CalibrationOptions, RangeMethod, calibrate
        from quest_deploy.calibration.reconstruction import ReconstructOptions, reconstruct
        from quest_deploy.calibration.training_state import hash_of_tensors
        from quest_deploy.calibration.trajectories import record_trajectories, samples_for
        from quest_deploy.models.loading import load_model

        model = load_model(workspace.source, options.prompts)
        unet = model.load_unet()
        steps = options.steps or model.calibration_steps
        samples = options.samples or samples_for(model, workspace.scheme, steps)
        rows = options.batch or model.forward_rows
        reconstructs = options.method == QDIFF

        def start() -> Start:
            trajectories = record_trajectories(
                model,
                unet,
                steps=steps,
                samples=samples,
                seed=options.seed,
                scheme=workspace.scheme,
                guidance=options.guidance,
                rows=rows,
                on_progress=lambda done, total: update("recording trajectories", done, total),
            )
            method = RangeMethod.L24 if reconstructs else RangeMethod(options.method)
            # No more rows than by default: which values are kept depends on them.
            batch = min(rows or CalibrationOptions.batch, options.batch or CalibrationOptions.batch)
            settings = CalibrationOptions(method, seed=options.seed, batch=batch)
            return trajectories, calibrate(
                workspace.model, unet, trajectories, workspace.scheme, settings, update
            )

        if not reconstructs:
            trajectories, checkpoint = start()
        else:
            made_from = {
                "quest-deploy": __version__,
                "model": [workspace.model, hash_of_tensors(unet.state_dict())],
                "scheme": workspace.scheme.to_json(),
                "options": dataclasses.asdict(options),
            }
            trajectories, checkpoint = _kept(
                workspace.path(RECONSTRUCT_STATE), made_from, start, console.note
            )
            checkpoint = reconstruct(
                unet,
                checkpoint,
                trajectories,
                ReconstructOptions(seed=options.seed, **options.reconstruction),
                lambda unit, done, total: update("reconstruction", done, total, unit),
                state_path=workspace.path(RECONSTRUCT_STATE),
                notify=console.note,
            )
        trajectories.save(workspace.path(TRAJECTORIES))
        save_checkpoint(checkpoint, workspace.path(CALIBRATED))
        shutil.rmtree(workspace.path(RECONSTRUCT_STATE), ignore_errors=True)
        weights, macs = checkpoint.share_at(4)
        details = {
            "layers": len(checkpoint.layers),
            "sites": len(checkpoint.sites),
            "buckets": workspace.scheme.buckets,
            "weights_at_4_bits": weights,
            "macs_at_4_bits": macs,
            "checkpoint_bytes": workspace.path(CALIBRATED).stat().st_size,
        }
        return [workspace.path(TRAJECTORIES), workspace.path(CALIBRATED)], details

    return run_stage(
        workspace,
        console,
        "calibrate",
        inputs=(),
        options=dataclasses.asdict(options),
        reuse=reuse,
        work=work,
    )


def method_name(workspace: Workspace) -> str:
    """What its calibrated checkpoint is called beside others."""
    record = workspace.stages.get("calibrate")
    return "Q-Diffusion" if record is not None and record.options.get("method") == QDIFF else "PTQ"


def _kept(
    folder: Path,
    made_from: dict[str, Any],
    make: Callable[[], Start],
    notify: Callable[[str], None],
) -> Start:
    """What an interrupted reconstruction started from, to the bit, or else what ``make`` gives,
    kept in ``folder``.

    Made again with other threads or on another machine it would differ in last bits, and no unit
    that is done would fit it.
    """
    if (folder / MADE_FROM).exists():
        try:
            return _read_start(folder, made_from)
        except InputError as e:
            notify(f"warning: {e}: trajectories and scales are made anew")
    _write_start(folder, made_from, *make())
    # Not what is in memory: every run computes from the very tensors that a resumed one reads,
    # their layout included.
    return _read_start(folder, made_from)


def _read_start(folder: Path, made_from: dict[str, Any]) -> Start:
    from quest_deploy.artifacts.checkpoint import load_checkpoint
    from quest_deploy.calibration.trajectories import Trajectories

    record = read_json(folder / MADE_FROM, repair="it cannot be used")
    if not isinstance(record, dict) or record.get("made_from") != made_from:
        raise InputError(f"{folder / MADE_FROM} is of a run with other options, model or version")
    if record.get("sha256") != _hashes(folder):
        raise InputError(f"{folder}: {TRAJECTORIES} or {CALIBRATED} is damaged")
    return Trajectories.load(folder / TRAJECTORIES), load_checkpoint(folder / CALIBRATED)


def _write_start(
    folder: Path, made_from: dict[str, Any], trajectories: Trajectories, checkpoint: Checkpoint
) -> None:
    from quest_deploy.artifacts.checkpoint import save_checkpoint

    trajectories.save(folder / TRAJECTORIES)
    save_checkpoint(checkpoint, folder / CALIBRATED)
    write_json(folder / MADE_FROM, {"made_from": made_from, "sha256": _hashes(folder)})


def _hashes(folder: Path) -> dict[str, str]:
    return {
        name: sha256_of(folder / name)
        for name in (TRAJECTORIES, CALIBRATED)
        if (folder / name).is_file()
    }


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; raise InputError where it cannot be read or has
    none.
    """
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


def describe(workspace: Workspace, details: dict[str, Any]) -> str:
    """The details in words."""
    return (
        f"{workspace.model} at {workspace.scheme.name}: {details['layers']} layers read "
        f"{details['sites']} tensors, each with "
        f"{details['buckets']} activation scales\n"
        f"4-bit share: {details['weights_at_4_bits']:.1%} of the weights, "
        f"{details['macs_at_4_bits']:.1%} of the multiply-adds\n"
        f"{workspace.path(CALIBRATED)} ({size(details['checkpoint_bytes'])})"
    )


def calibrate(
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
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = DEFAULT_METHOD,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samplings to record.", show_default="the model's")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="DDIM steps of each; more where that is needed to visit every bucket.",
            show_default="the model's",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows that run at once.", show_default="the model's")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance weight of the samplings; 1 is none.",
            show_default="the model's",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file with a prompt a line, for a text-to-image model.",
            show_default="a short list of ours",
        ),
    ] = None,
    reconstruction_samples: Annotated[
        int | None, typer.Option(min=1, help="qdiff: recorded samples it learns from.")
    ] = None,
    rounding_steps: Annotated[
        int | None, typer.Option(min=0, help="qdiff: steps a block that learn the rounding.")
    ] = None,
    scale_steps: Annotated[
        int | None,
        typer.Option(min=0, help="qdiff: steps a block that learn the activation scales."),
    ] = None,
    reconstruction_batch: Annotated[
        int | None, typer.Option(min=1, help="qdiff: samples a step.")
    ] = None,
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Quantize the FP32 model by calibration alone (PTQ), data-free; qdiff resumes where it was
    interrupted.
    """
    console = Console(as_json=as_json)
    reconstruction = {
        "samples": reconstruction_samples,
        "rounding_steps": rounding_steps,
        "scale_steps": scale_steps,
        "batch": reconstruction_batch,
    }
    given = {name: value for name, value in reconstruction.items() if value is not None}
    asked = None if prompts is None else read_prompts(prompts)
    options = CalibrateOptions(samples, steps, method, seed, given, batch, guidance, asked)
    choices = SchemeChoices(
        bits, buckets, granularity, attention_bits, softmax_bits, split_shortcuts
    )
    chosen = ModelChoices(model, revision, random_weights, tuple(lora or ()))
    opened = create_workspace(workspace, chosen, choices, split_shortcuts=method == QDIFF)
    details = calibrate_stage(opened, console, options)
    console.result({"workspace": str(opened.root), **details}, describe(opened, details))
