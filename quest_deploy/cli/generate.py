"""`quest-deploy generate`: draw images with the engine as the UNet of the sampling loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.artifacts.workspace import IMAGES
from quest_deploy.backends.base import EngineOptions
from quest_deploy.backends.registry import get_backend
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
from quest_deploy.errors import InputError
from quest_deploy.models.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.cli.console import Update
    from quest_deploy.models.registry import DiffusionModel

ROWS, STEPS, SCHEDULER, DEFAULT_COLUMNS = 4, 20, "ddim", 10


def generate_stage(
    workspace: Workspace,
    console: Console,
    backend: str,
    choices: dict[str, Any] | None = None,
    *,
    reuse: bool = False,
) -> dict[str, Any]:
    """Draw; writes images/grid-<backend>.png, or for a text-to-image model
    images/<backend>-<number>.png.

    Args:
        choices: labels, rows, steps, guidance, scheduler, seed; of a text-to-image model prompt (a
            list), negative_prompt, height and width instead of labels; what is absent is the
            model's default.
    """
    get_backend(backend).check_run(EngineOptions())  # at once, before the model is loaded
    given = {"rows": None, "steps": STEPS, "scheduler": SCHEDULER, "seed": 0, **(choices or {})}
    if given["scheduler"] not in SCHEDULERS:
        raise InputError(
            f"unknown scheduler {given['scheduler']!r}: expected one of {', '.join(SCHEDULERS)}"
        )

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        from quest_deploy.models.loading import load_model

        model = load_model(workspace.source)
        of_text = model.asked_for == "prompt"
        unused = ("labels",) if of_text else ("prompt", "negative_prompt", "height", "width")
        if misplaced := [name for name in unused if given.get(name) is not None]:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in misplaced)
            raise InputError(f"{options}: not for {model.name}, a model that is {model.family}")
        draw = _draw_prompts if of_text else _draw_labels
        pictures, count = draw(workspace, backend, model, given, update)
        details = {
            "backend": backend,
            "images": count,
            "picture": str(pictures[0]),
            "pictures": [str(path) for path in pictures],
        }
        return pictures, details

    inputs = (f"build-engine/{backend}",)
    return run_stage(
        workspace,
        console,
        f"generate/{backend}",
        inputs=inputs,
        options=given,
        reuse=reuse,
        work=work,
    )


def _draw_labels(
    workspace: Workspace, backend: str, model: DiffusionModel, given: dict[str, Any], update: Update
) -> tuple[list[Path], int]:
    import numpy as np

    from quest_deploy.backends.engine_unet import EngineUNet
    from quest_deploy.evaluation.image_grid import save_grid
    from quest_deploy.evaluation.sampling import sample_images

    labels = _labels(given.get("labels"), model)
    wanted = np.tile(labels, given["rows"] or ROWS)
    picture = workspace.path(IMAGES, f"grid-{backend}.png")
    with EngineUNet.load(workspace, backend) as unet:
        images = sample_images(
            model,
            unet,
            wanted,
            scheduler=given["scheduler"],
            steps=given["steps"],
            guidance=model.guidance if given.get("guidance") is None else given["guidance"],
            seed=given["seed"],
            on_progress=lambda done, total: update("denoising", done, total),
        )
    save_grid(images, picture, columns=len(labels))
    return [picture], len(images)


def _labels(text: str | None, model: DiffusionModel) -> Any:
    """The labels of "0123" where each is a digit, or of "207,360"; the model's first ones where
    ``text`` is None.
    """
    import numpy as np

    if text is None:
        return np.arange(min(model.labels, DEFAULT_COLUMNS), dtype=np.int64)
    if model.asked_for is None:
        raise InputError(
            f"--labels: not for {model.name}, a model that is {model.family}; --rows says how many "
            "images"
        )
    parts = text.split(",") if "," in text or model.labels > 10 else list(text)
    if not parts or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise InputError(
            f"labels must be digits such as 0123456789, or numbers such as 207,360, not {text!r}"
        )
    return np.asarray([int(part) for part in parts], np.int64)


def _check_pixels(pipeline: Any, given: dict[str, Any]) -> None:
    factor = pipeline.vae_scale_factor * pipeline.unet.engine.sample_multiple
    wrong = [
        f"--{name} {size}"
        for name in ("height", "width")
        if (size := given.get(name)) is not None and size % factor
    ]
    if wrong:
        raise InputError(f"{', '.join(wrong)}: expected a multiple of {factor}")


def _draw_prompts(
    workspace: Workspace, backend: str, model: DiffusionModel, given: dict[str, Any], update: Update
) -> tuple[list[Path], int]:
    import torch

    from quest_deploy.files import atomic_file
    from quest_deploy.models.pipeline_model import default_prompts
    from quest_deploy.models.schedulers import set_steps
    from quest_deploy.serving.pipeline import load_pipeline

    prompts = given.get("prompt") or default_prompts()[:1]
    pipeline = load_pipeline(workspace, backend)
    pipeline.set_progress_bar_config(disable=True)
    _check_pixels(pipeline, given)
    pipeline.scheduler = model.load_scheduler(given["scheduler"])
    set_steps(
        model.load_scheduler(given["scheduler"]), given["steps"]
    )  # refuses what leaves the model's range

    def report(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        update("denoising", step + 1, pipe.num_timesteps)
        return values

    negative = given.get("negative_prompt")
    try:
        images = pipeline(
            prompt=prompts,
            negative_prompt=None if negative is None else [negative] * len(prompts),
            num_inference_steps=given["steps"],
            guidance_scale=model.guidance if given.get("guidance") is None else given["guidance"],
            num_images_per_prompt=given["rows"] or 1,
            height=given.get("height"),
            width=given.get("width"),
            generator=torch.Generator().manual_seed(given["seed"]),
            callback_on_step_end=report,
        ).images
    except ValueError as e:  # what diffusers raises for arguments that do not go together
        raise InputError(str(e)) from e
    pictures = [workspace.path(IMAGES, f"{backend}-{i}.png") for i in range(len(images))]
    for path, image in zip(pictures, images, strict=True):
        with atomic_file(path) as temporary, temporary.open("wb") as stream:
            image.save(stream, format="PNG")
    return pictures, len(images)


def generate(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    backend: BackendOption = DEFAULT_BACKEND,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What to draw, for a text-to-image model; may be repeated.",
            show_default="one of ours",
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="The classes to draw, one column each: 0123, or 207,360 where there are more.",
            show_default="the first ten",
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images of each.", show_default=f"{ROWS}, or 1 for a text-to-image model"
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = STEPS,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance weight; 1 is none.", show_default="the model's"
        ),
    ] = None,
    scheduler: Annotated[
        str, typer.Option(help=f"A diffusers scheduler: {', '.join(SCHEDULERS)}.")
    ] = SCHEDULER,
    height: Annotated[
        int | None,
        typer.Option(min=8, help="Pixels, for a text-to-image model.", show_default="the model's"),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=8, help="Pixels, for a text-to-image model.", show_default="the model's"),
    ] = None,
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Draw PNG pictures with the engine."""
    console = Console(as_json=as_json)
    opened = open_workspace(workspace, model, bits)
    choices = {
        "labels": labels,
        "rows": rows,
        "steps": steps,
        "guidance": guidance,
        "scheduler": scheduler,
        "seed": seed,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
    }
    details = generate_stage(
        opened,
        console,
        backend,
        {name: value for name, value in choices.items() if value is not None},
    )
    console.result({"workspace": str(opened.root), **details}, describe(details))


def describe(details: dict[str, Any]) -> str:
    """The details in words."""
    pictures = details.get("pictures", [details["picture"]])
    return (
        f"{details['picture']}: {details['images']} images"
        if len(pictures) == 1
        else "\n".join(pictures)
    )
