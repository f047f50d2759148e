"""Choose every scale from the FP32 model's own sampling trajectories (PTQ)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from quest_deploy import __version__
from quest_deploy.artifacts.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from quest_deploy.artifacts.workspace import CALIBRATED, RECONSTRUCT_STATE, TRAJECTORIES
from quest_deploy.calibration import ptq, reconstruction, trajectories
from quest_deploy.calibration.training_state import hash_of_tensors
from quest_deploy.errors import InputError
from quest_deploy.files import read_json, sha256_of, write_json
from quest_deploy.models.channels import guidance_of
from quest_deploy.models.controls import Controls
from quest_deploy.models.ip_adapters import ImagePrompts
from quest_deploy.models.loading import load_model
from quest_deploy.models.schedulers import most_steps
from quest_deploy.stages.options import QDIFF

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.calibration.trajectories import Trajectories
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import CalibrateOptions
    from quest_deploy.stages.results import Calibration

    Start = tuple[Trajectories, Checkpoint]
    """What reconstruction starts from: the recorded trajectories and the model calibrated on them.
    """

MADE_FROM = "made-from.json"
"""Beside the start that reconstruction keeps: what it was made from, and its files' hashes."""
logger = logging.getLogger(__name__)


def work(
    workspace: Workspace, options: CalibrateOptions, progress: Progress
) -> tuple[list[Path], Calibration]:
    """Record trajectories and calibrate.

    An interrupted reconstruction goes on: what comes before it is kept with its state, and read
    from there.
    """
    workspace.check_not_folded()
    options.check_source(workspace.source)
    model = load_model(workspace.source, options.prompts, options.images_from)
    if (trained := model.train_timesteps) != workspace.scheme.train_timesteps:
        raise InputError(
            f"{workspace.root} divides {workspace.scheme.train_timesteps} training steps into "
            f"buckets, and {model.name} was trained with {trained}; start a new workspace with -w"
        )
    reconstructs = options.method == QDIFF
    if reconstructs and not model.network.reconstructs:
        raise InputError(
            f"--method {QDIFF}: expected a model with a UNet, and {model.name} has a "
            f"{model.network.noun}; choose another method, and `quest-deploy finetune`"
        )
    guidance_of(model, options.guidance, options.image_guidance)
    model.check_decoder()
    scheduler = model.load_scheduler(model.calibration_scheduler)
    steps = options.steps or most_steps(scheduler, model.calibration_steps)
    samples = options.samples or trajectories.samples_for(model, workspace.scheme, steps)
    control = (
        Controls(options.controls, options.shown, model, samples)
        if any(options.controls.values())
        else None
    )
    prompt = (
        None if model.source.ip_adapter is None else ImagePrompts(model, options.ip_images, samples)
    )
    unet = model.load_unet(narrow=not reconstructs)
    rows = options.batch or model.forward_rows

    def start() -> Start:
        recorded = trajectories.record_trajectories(
            model,
            unet,
            steps=steps,
            samples=samples,
            seed=options.seed,
            scheme=workspace.scheme,
            guidance=options.guidance,
            image_guidance=options.image_guidance,
            rows=rows,
            control=control,
            prompt=prompt,
            progress=progress,
        )
        settings = ptq.CalibrationOptions(
            ptq.RangeMethod.L24 if reconstructs else ptq.RangeMethod(options.method),
            seed=options.seed,
            # No more rows than by default: which values are kept depends on them.
            batch=min(
                rows or ptq.CalibrationOptions.batch,
                options.batch or ptq.CalibrationOptions.batch,
            ),
        )
        return recorded, ptq.calibrate(
            workspace.model, unet, recorded, workspace.scheme, settings, progress
        )

    if reconstructs:
        made_from = {
            "quest-deploy": __version__,
            "model": [workspace.model, hash_of_tensors(unet.state_dict())],
            "scheme": workspace.scheme.to_json(),
            "options": options.to_json(),
        }
        recorded, checkpoint = _kept(workspace.path(RECONSTRUCT_STATE), made_from, start)
        checkpoint = reconstruction.reconstruct(
            unet,
            checkpoint,
            recorded,
            reconstruction.ReconstructOptions(seed=options.seed, **options.reconstruction),
            progress,
            state_path=workspace.path(RECONSTRUCT_STATE),
        )
    else:
        recorded, checkpoint = start()
    return save_calibrated(workspace, recorded, checkpoint), describe(workspace, checkpoint)


def save_calibrated(
    workspace: Workspace, recorded: Trajectories, checkpoint: Checkpoint
) -> list[Path]:
    """Write trajectories.safetensors and calibrated.safetensors; return their paths."""
    files = [workspace.new(TRAJECTORIES), workspace.new(CALIBRATED)]
    recorded.save(files[0])
    save_checkpoint(checkpoint, files[1])
    return files


def describe(workspace: Workspace, checkpoint: Checkpoint) -> Calibration:
    """Return what there is to report of the calibrated checkpoint that was saved."""
    weights, macs = checkpoint.share_at(4)
    branches = len(checkpoint.branches)
    details: Calibration = {
        "layers": len(checkpoint.layers),
        "sites": len(checkpoint.quantizers),
        "buckets": workspace.scheme.buckets,
        "weights_at_4_bits": weights,
        "macs_at_4_bits": macs,
        "checkpoint_bytes": workspace.new(CALIBRATED).stat().st_size,
    }
    return {**details, "branches": branches} if branches else details


def _kept(folder: Path, made_from: dict[str, Any], make: Callable[[], Start]) -> Start:
    """Return what an interrupted reconstruction started from, to the bit, or else what ``make``
    gives, kept in ``folder``.

    Made again with other threads or on another machine it would differ in last bits, and no unit
    that is done would fit it.
    """
    if (folder / MADE_FROM).exists():
        try:
            return _read_start(folder, made_from)
        except InputError as e:
            logger.warning("%s: trajectories and scales are made anew", e)
    recorded, checkpoint = make()
    recorded.save(folder / TRAJECTORIES)
    save_checkpoint(checkpoint, folder / CALIBRATED)
    write_json(folder / MADE_FROM, {"made_from": made_from, "sha256": _hashes(folder)})
    # Not what is in memory: every run computes from the very tensors that a resumed one reads,
    # their layout included.
    return _read_start(folder, made_from)


def _read_start(folder: Path, made_from: dict[str, Any]) -> Start:
    record = read_json(folder / MADE_FROM, repair="it cannot be used")
    if not isinstance(record, dict) or record.get("made_from") != made_from:
        raise InputError(f"{folder / MADE_FROM} is of a run with other options, model or version")
    if record.get("sha256") != _hashes(folder):
        raise InputError(f"{folder}: {TRAJECTORIES} or {CALIBRATED} is damaged")
    return (
        trajectories.Trajectories.load(folder / TRAJECTORIES),
        load_checkpoint(folder / CALIBRATED),
    )


def _hashes(folder: Path) -> dict[str, str]:
    return {
        name: sha256_of(folder / name)
        for name in (TRAJECTORIES, CALIBRATED)
        if (folder / name).is_file()
    }
