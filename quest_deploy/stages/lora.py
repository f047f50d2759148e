"""Fold LoRAs into the integer weights of a workspace's checkpoint, as another workspace."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quest_deploy.artifacts.checkpoint import load_checkpoint, save_checkpoint
from quest_deploy.artifacts.model_source import Lora
from quest_deploy.artifacts.workspace import (
    CALIBRATED,
    MANIFEST,
    TRAJECTORIES,
    Workspace,
    check_vacant,
)
from quest_deploy.calibration.requantize import requantize
from quest_deploy.errors import InputError
from quest_deploy.files import absolute, link_or_copy
from quest_deploy.models.loading import load_model
from quest_deploy.progress import progress_of
from quest_deploy.stages import LORA
from quest_deploy.stages.calibrate import describe
from quest_deploy.stages.options import LoraOptions
from quest_deploy.stages.run import exported
from quest_deploy.stages.workspaces import method_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quest_deploy.artifacts.model_source import ModelSource
    from quest_deploy.progress import Display, Progress
    from quest_deploy.stages.results import Folding


def fold_loras(
    base: Workspace, texts: Sequence[str], output: Path | None, shown: Progress | Display
) -> Workspace:
    """Make a workspace in ``output``, or beside ``base``, of its checkpoint with LoRAs folded in.

    The model of the new workspace is that of ``base`` with these LoRAs, as if it were calibrated
    with them: they are in its text encoders and in the FP32 model that it is compared with, too.

    Args:
        texts: each "PATH" or "PATH:WEIGHT".

    Raises:
        InputError: a LoRA does not fit the model or changes nothing, ``base`` has no checkpoint, or
            the folder holds something else.
    """
    given = tuple(map(Lora.parse, texts))
    source = replace(base.source, loras=_with(base.source.loras, given))
    if source == base.source:
        raise InputError(
            f"--lora {' '.join(texts)}: expected what changes {base.root}, whose LoRAs are "
            f"{_named(base.source.loras)}"
        )
    root = output or _beside(base.root, given)
    opened = _opened(root, source, base)
    with base.reading():
        base.require(base.checkpoint_stage)
        old, new = load_model(base.source), load_model(source)
        new.check_text_encoders()
        with progress_of(shown, "fold") as progress:
            made, changed = requantize(
                load_checkpoint(base.checkpoint_path), old.load_unet(), new.load_unet(), progress
            )
        loras = [asdict(lora) for lora in source.loras]
        checkpoint = replace(made, provenance=made.provenance | {"loras": loras})

        def work(
            workspace: Workspace, options: LoraOptions, progress: Progress
        ) -> tuple[list[Path], Folding]:
            files = [workspace.new(TRAJECTORIES), workspace.new(CALIBRATED)]
            link_or_copy(base.path(TRAJECTORIES), files[0])
            save_checkpoint(checkpoint, files[1])
            return files, {
                "base": str(options.base),
                "method": "QuEST" if "finetune" in base.stages else method_name(base),
                "changed_layers": changed,
                **describe(workspace, checkpoint),
            }

        # Not before: LoRAs that do not fit leave no workspace.
        workspace = opened or Workspace.create(root, source, base.scheme)
        options = LoraOptions(
            base=absolute(base.root),
            checkpoint=base.checkpoint_path,
            loras=given,
            export=exported(base),
        )
        LORA.run(workspace, options, shown, work=work)
    return workspace


def _with(loras: Sequence[Lora], given: Sequence[Lora]) -> tuple[Lora, ...]:
    """``loras`` with the ``given`` ones instead of those of the same files; weight 0 is none."""
    hashes = {lora.sha256 for lora in given}
    others = (lora for lora in loras if lora.sha256 not in hashes)
    return (*others, *(lora for lora in given if lora.weight))


def _named(loras: Sequence[Lora]) -> str:
    return ", ".join(f"{lora.path}:{lora.weight:g}" for lora in loras) or "none"


def _beside(root: Path, given: Sequence[Lora]) -> Path:
    place = absolute(root)
    names = (f"{Path(lora.path).stem}-{lora.weight:g}" for lora in given)
    return place.with_name("-".join([place.name, *names]))


def _opened(root: Path, source: ModelSource, base: Workspace) -> Workspace | None:
    """The workspace in ``root``, or None where one can be made there."""
    if not (root / MANIFEST).exists():
        check_vacant(root, "--output")
        return None
    opened = Workspace.open(root)
    same = opened.source == source and opened.scheme == base.scheme
    other = opened.stages and "lora" not in opened.stages
    if not same or opened.interrupted_stages or other:
        held = "a calibration of its own" if same else f"the LoRAs {_named(opened.source.loras)}"
        raise InputError(
            f"{root} holds {opened.model} at {opened.scheme.name} with {held}; give another folder "
            "with --output"
        )
    return opened
