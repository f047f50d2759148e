"""Import a checkpoint that the official QuEST or Q-Diffusion code wrote, as a workspace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quest_deploy.artifacts.model_source import IMPORTED
from quest_deploy.artifacts.workspace import MANIFEST, Workspace, check_vacant
from quest_deploy.calibration.ptq import CalibrationOptions
from quest_deploy.errors import InputError
from quest_deploy.importers import convert, trajectories
from quest_deploy.importers.architecture import UNetConfig
from quest_deploy.importers.read import read
from quest_deploy.progress import progress_of
from quest_deploy.stages import IMPORT
from quest_deploy.stages.calibrate import describe, save_calibrated
from quest_deploy.stages.options import IMPORT_SAMPLES, RECALIBRATION_SAMPLES

if TYPE_CHECKING:
    from quest_deploy.artifacts.scheme import Scheme
    from quest_deploy.progress import Display, Progress
    from quest_deploy.stages.options import ImportOptions
    from quest_deploy.stages.results import Import


def import_checkpoint(
    root: Path | None, options: ImportOptions, shown: Progress | Display
) -> Workspace:
    """Make a workspace in ``root``, or quest-out/imported-<bits>, of an official checkpoint.

    Raises:
        InputError: the checkpoint does not fit the configuration and the settings, or the folder
            holds something else.
    """
    official = read(options.checkpoint, UNetConfig.load(options.unet), options.settings)
    rounded = convert.rounded_layers(official)
    imported = (
        None
        if options.recalibrate
        else convert.import_checkpoint(
            official, rounded, trajectories.random_inputs(official, 2, options.seed)
        )
    )
    scheme = convert.import_scheme(official) if imported is None else imported.checkpoint.scheme
    root = root or Path("quest-out") / f"{IMPORTED}-{scheme.name}"
    opened = _opened(root, scheme)
    with progress_of(shown, "record") as progress:
        recorded = trajectories.record_imported(
            official,
            convert.float_model(official),
            samples=options.samples
            or (RECALIBRATION_SAMPLES if options.recalibrate else IMPORT_SAMPLES),
            seed=options.seed,
            progress=progress,
        )
        result = imported or convert.recalibrate(
            official, rounded, recorded, CalibrationOptions(seed=options.seed), progress
        )

    def work(
        workspace: Workspace, options: ImportOptions, progress: Progress
    ) -> tuple[list[Path], Import]:
        files = save_calibrated(workspace, recorded, result.checkpoint)
        return files, {
            "from": options.settings.source.value,
            "recalibrated": options.recalibrate,
            "in_float": result.in_float,
            **describe(workspace, result.checkpoint),
        }

    # Not before: an import that fails leaves no workspace.
    workspace = opened or Workspace.create(root, IMPORTED, scheme)
    IMPORT.run(workspace, options, shown, work=work)
    return workspace


def _opened(root: Path, scheme: Scheme) -> Workspace | None:
    """The workspace in ``root``, or None where one can be made there."""
    if not (root / MANIFEST).exists():
        check_vacant(root)
        return None
    opened = Workspace.open(root)
    if opened.model != IMPORTED or opened.scheme != scheme:
        raise InputError(f"{root} holds another model or scheme; give another folder with -w")
    return opened
