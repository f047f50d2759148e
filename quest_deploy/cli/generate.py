"""`quest-deploy generate`: draw images with the engine as the UNet of the sampling loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.cli.console import Console
from quest_deploy.cli.options import (
    DEFAULT_BACKEND,
    BackendOption,
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    open_workspace,
)
from quest_deploy.cli.stage import run_stage
from quest_deploy.engine.backends import get_backend
from quest_deploy.errors import InputError
from quest_deploy.models.schedulers import SCHEDULERS
from quest_deploy.workspace import IMAGES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.cli.console import Update
    from quest_deploy.workspace import Workspace

LABELS, ROWS = "0123456789", 4


def generate_stage(
    workspace: Workspace,
    console: Console,
    backend: str,
    labels: str = LABELS,
    rows: int = ROWS,
    steps: int = 20,
    guidance: float = 1.0,
    scheduler: str = "ddim",
    seed: int = 0,
    *,
    reuse: bool = False,
) -> dict[str, Any]:
    """Draw ``rows`` images of every label; writes images/grid-<backend>.png."""
    get_backend(backend)
    if not (labels.isascii() and labels.isdigit()):
        raise InputError(f"labels must be digits such as 0123456789, not {labels!r}")
    if scheduler not in SCHEDULERS:
        raise InputError(f"unknown scheduler {scheduler!r}: expected one of {', '.join(SCHEDULERS)}")
    picture = workspace.path(IMAGES, f"grid-{backend}.png")

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        import numpy as np

        from quest_deploy.models.registry import load_model
        from quest_deploy.pictures import save_grid
        from quest_deploy.runtime import EngineUNet
        from quest_deploy.sampling import sample_images

        wanted = np.tile(np.asarray([int(c) for c in labels], np.int64), rows)
        with EngineUNet.load(workspace, backend) as unet:
            images = sample_images(
                load_model(workspace.model),
                unet,
                wanted,
                scheduler=scheduler,
                steps=steps,
                guidance=guidance,
                seed=seed,
                on_progress=lambda done, total: update("denoising", done, total),
            )
        save_grid(images, picture, columns=len(labels))
        return [picture], {"backend": backend, "images": len(images), "picture": str(picture)}

    options = {
        "labels": labels, "rows": rows, "steps": steps, "guidance": guidance, "scheduler": scheduler, "seed": seed
    }  # fmt: skip
    inputs = (f"build-engine/{backend}",)
    return run_stage(workspace, console, f"generate/{backend}", inputs=inputs, options=options, reuse=reuse, work=work)


def generate(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    backend: BackendOption = DEFAULT_BACKEND,
    labels: Annotated[str, typer.Option(help="The digits to draw, one column each.")] = LABELS,
    rows: Annotated[int, typer.Option(min=1, help="Images of each.")] = ROWS,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance weight; 1 is none.")] = 1.0,
    scheduler: Annotated[str, typer.Option(help=f"A diffusers scheduler: {', '.join(SCHEDULERS)}.")] = "ddim",
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Draw a PNG grid with the engine."""
    console = Console(as_json=as_json)
    opened = open_workspace(workspace, model, bits)
    details = generate_stage(opened, console, backend, labels, rows, steps, guidance, scheduler, seed)
    console.result({"workspace": str(opened.root), **details}, f"{details['picture']}: {details['images']} images")
