"""Draw images with the engine as the UNet of the sampling loop."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quest_deploy.artifacts.workspace import IMAGES
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.evaluation.image_grid import save_grid, save_image
from quest_deploy.evaluation.sampling import sample_images
from quest_deploy.models.channels import EDITING, INPAINTING, guidance_of
from quest_deploy.models.image_inputs import ImageInput, read_image, resized
from quest_deploy.models.ip_adapters import IMAGE_PARTS
from quest_deploy.models.loading import load_model
from quest_deploy.models.schedulers import set_steps
from quest_deploy.serving.pipeline import load_pipeline
from quest_deploy.stages.options import GRID_ROWS

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.models.pipeline_model import PipelineModel
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import GenerateOptions
    from quest_deploy.stages.results import Generation

GRID_COLUMNS = 10


def work(
    workspace: Workspace, options: GenerateOptions, progress: Progress
) -> tuple[list[Path], Generation]:
    """Draw a grid of a column a label, or for a text-to-image model a picture for each image."""
    model = load_model(workspace.source)
    model.require_weights("draw")
    of_text = model.asked_for == "prompt"
    unused = ["labels"] if of_text else ["prompt", "negative_prompt", "height", "width"]
    kind = model.channels.image_kind
    unused += {INPAINTING: ["image_guidance"], EDITING: ["mask"]}.get(
        kind or "", ["image", "mask", "image_guidance"]
    )
    if kind == INPAINTING and (options.image is None) != (options.mask is None):
        raise InputError("--image, --mask: expected both, or neither for made ones")
    if misplaced := [name for name in unused if getattr(options, name) is not None]:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in misplaced)
        raise InputError(
            f"{given}: not for {model.name}, a model that is {model.family}"
            + (f" and for {kind}" if kind else "")
        )
    if options.negative_prompt is not None and not model.classifier_free:
        raise InputError(
            f"--negative-prompt: expected a model with classifier-free guidance, and {model.name} "
            "has none"
        )
    # Both refused before engines load.
    guidance_of(model, options.guidance, options.image_guidance)
    set_steps(model.load_scheduler(options.scheduler), steps_of(model, options))
    draw = _draw_prompts if of_text else _draw_labels
    pictures, count = draw(workspace, model, options, progress)
    places = [str(workspace.path(IMAGES, picture.name)) for picture in pictures]
    return pictures, {
        "backend": options.backend,
        "images": count,
        "picture": places[0],
        "pictures": places,
    }


def steps_of(model: PipelineModel, options: GenerateOptions) -> int:
    """How many denoising steps are drawn with: the model's own number unless ``options`` say it."""
    return model.steps if options.steps is None else options.steps


def _guidance(model: PipelineModel, options: GenerateOptions) -> float:
    return model.guidance if options.guidance is None else options.guidance


def _draw_labels(
    workspace: Workspace, model: PipelineModel, options: GenerateOptions, progress: Progress
) -> tuple[list[Path], int]:
    labels = _labels(options.labels, model)
    picture = workspace.new(IMAGES, f"grid-{options.backend}.png")
    with EngineUNet.load(workspace, options.backend) as unet:
        images = sample_images(
            model,
            unet,
            np.tile(labels, options.rows or GRID_ROWS),
            scheduler=options.scheduler,
            steps=steps_of(model, options),
            guidance=_guidance(model, options),
            seed=options.seed,
            progress=progress,
        )
    save_grid(images, picture, columns=len(labels))
    return [picture], len(images)


def _labels(text: str | None, model: PipelineModel) -> Any:
    """The labels of "0123" where each is a digit, or of "207,360"; the model's first ones where
    ``text`` is None.
    """
    if text is None:
        return np.arange(min(model.labels, GRID_COLUMNS), dtype=np.int64)
    if model.asked_for is None:
        raise InputError(
            f"--labels: not for {model.name}, a model that is {model.family}; --rows says how many "
            "images"
        )
    parts = text.split(",") if "," in text or model.labels > 10 else list(text)
    if long := [part for part in parts if len(part) > 9]:
        raise InputError(f"--labels: expected 0 to {model.labels - 1}, not {', '.join(long)}")
    return np.asarray([int(part) for part in parts], np.int64)


def _check_pixels(pipeline: Any, model: PipelineModel, options: GenerateOptions) -> None:
    network = getattr(pipeline, model.network.part)
    factor = pipeline.vae_scale_factor * network.engine.sample_multiple
    sizes = {"height": options.height, "width": options.width}
    if wrong := [f"--{name} {size}" for name, size in sizes.items() if size and size % factor]:
        raise InputError(f"{', '.join(wrong)}: expected a multiple of {factor}")


def _draw_prompts(
    workspace: Workspace, model: PipelineModel, options: GenerateOptions, progress: Progress
) -> tuple[list[Path], int]:
    _image_arguments(model, options, 1)  # what it cannot read is refused before an engine opens
    # It shows no image, whose encoder is large.
    unused = {} if model.source.ip_adapter is None else dict.fromkeys(IMAGE_PARTS)
    pipeline = load_pipeline(workspace, options.backend, **unused)
    pipeline.set_progress_bar_config(disable=True)
    _check_pixels(pipeline, model, options)
    pipeline.scheduler = model.load_scheduler(options.scheduler)
    arguments = call_arguments(pipeline, model, options)
    arguments |= _progress_arguments(pipeline, steps_of(model, options), progress)
    try:
        drawn = pipeline(**arguments).images
    except ValueError as e:  # what diffusers raises for arguments that do not go together
        raise InputError(str(e)) from e
    if not np.isfinite(drawn).all():
        raise QuestDeployError("the decoder's images are not finite; choose a smaller --guidance")
    images = pipeline.numpy_to_pil(drawn)
    pictures = [workspace.new(IMAGES, f"{options.backend}-{i}.png") for i in range(len(images))]
    for path, image in zip(pictures, images, strict=True):
        save_image(image, path)
    return pictures, len(images)


def call_arguments(pipeline: Any, model: PipelineModel, options: GenerateOptions) -> dict[str, Any]:
    """What a diffusers pipeline of a text-to-image model is called with, of what it takes."""
    prompts = list(options.prompt or model.prompts[:1])
    of_images = _image_arguments(model, options, len(prompts) * (options.rows or 1))
    height, width = (side * pipeline.vae_scale_factor for side in model.sample_shape[1:])
    negative = options.negative_prompt
    arguments = {
        "prompt": prompts,
        "negative_prompt": None if negative is None else [negative] * len(prompts),
        "num_inference_steps": steps_of(model, options),
        "guidance_scale": _guidance(model, options),
        "num_images_per_prompt": options.rows or 1,
        "height": options.height or height,
        "width": options.width or width,
        "generator": torch.Generator().manual_seed(options.seed),
        "output_type": "np",
        "use_resolution_binning": False,  # the size that is asked for, not one near it
        "clean_caption": False,  # as in calibration; it needs packages of its own
        **of_images,
    }
    # Instruct-pix2pix's has the image's size, and takes no other; PixArt's takes no None.
    taken = inspect.signature(pipeline.__call__).parameters
    return {name: x for name, x in arguments.items() if name in taken and x is not None}


def _progress_arguments(pipeline: Any, steps: int, progress: Progress) -> dict[str, Any]:
    """What makes a diffusers pipeline tell of each step, and end at latents that are not finite;
    some have the older way alone.
    """

    def on_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        _after_step(step + 1, pipe.num_timesteps, values["latents"], progress)
        return values

    if "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters:
        return {"callback_on_step_end": on_step}
    return {"callback": lambda step, _, latents: _after_step(step + 1, steps, latents, progress)}


def _after_step(done: int, steps: int, latents: torch.Tensor, progress: Progress) -> None:
    if not torch.isfinite(latents).all():
        raise QuestDeployError(
            f"the latents are not finite after step {done} of {steps}; choose a smaller --guidance"
        )
    progress("denoising", done, steps)


def _image_arguments(model: PipelineModel, options: GenerateOptions, count: int) -> dict[str, Any]:
    """What a pipeline that inpaints or edits draws ``count`` images from."""
    kind = model.channels.image_kind
    if kind is None:
        return {}
    height, width = model.image_size
    size = options.height or height, options.width or width
    given = model.image_input(0)
    if options.image is not None:
        mask = None if options.mask is None else read_image(options.mask)
        given = ImageInput(read_image(options.image), mask)
    image = resized(given.image, size)
    if kind == EDITING:
        weight = model.image_guidance if options.image_guidance is None else options.image_guidance
        return {"image": [image] * count, "image_guidance_scale": weight}
    assert given.mask is not None
    return {
        "image": image,
        "mask_image": resized(given.mask, size).convert("L"),
        "height": size[0],
        "width": size[1],
        "strength": 1.0,  # from noise alone, which SDXL's pipeline leaves a little short of
    }
