"""Judge FP32, PTQ, QuEST and the engine side by side.

It is measured how near they come to FP32: the error of the predictions in each timestep bucket, and
that of the images drawn from the same noise. The embedded model has a judge beside it, which says
how well its images show what they were asked for.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.workspace import (
    CALIBRATED,
    CHECKPOINT,
    ENGINES,
    IMAGES,
    REPORTS,
)
from quest_deploy.backends.base import engine_options
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.backends.registry import get_backend
from quest_deploy.calibration import trajectories
from quest_deploy.evaluation import FEW_IMAGES, quality
from quest_deploy.evaluation.image_grid import save_comparison, save_images
from quest_deploy.evaluation.perceptual import Perceptual, Weights
from quest_deploy.evaluation.retrieval import Judge
from quest_deploy.evaluation.sampling import float_denoiser
from quest_deploy.files import write_json
from quest_deploy.models.channels import guidance_of
from quest_deploy.models.loading import load_model
from quest_deploy.models.schedulers import set_steps
from quest_deploy.progress import named
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.stages.options import METRIC_FILES
from quest_deploy.stages.workspaces import method_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.evaluation.sampling import Denoiser
    from quest_deploy.models.pipeline_model import PipelineModel
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import EvaluateOptions
    from quest_deploy.stages.results import Evaluation

logger = logging.getLogger(__name__)
COMPARED = 8
"""Images of each that are shown side by side."""


def work(
    workspace: Workspace, options: EvaluateOptions, progress: Progress
) -> tuple[list[Path], Evaluation]:
    """Judge the float model, the fake-quantized ones and the engine; write the report."""
    # Refused at once, before anything is drawn.
    model = load_model(workspace.source, images=options.images_from)
    model.require_weights("evaluate")
    engine_options(get_backend(options.backend), workspace.path(ENGINES, options.backend))
    defaults = {
        "steps": model.steps,
        "guidance": model.guidance,
        "image_guidance": model.image_guidance,
        "images": model.evaluation_images,
    }
    weights = Weights(**{name: each.unchanged() for name, each in options.metric_files.items()})
    perceptual = Perceptual(weights, model.image_size, of_text=model.asked_for == "prompt")
    others = {"image_folder", *METRIC_FILES}
    chosen = {name: x for name, x in options.to_json().items() if name not in others}
    sampling = quality.SamplingOptions(**(defaults | chosen))
    judge = Judge(model.judge_folder) if model.judge_folder is not None else None
    if sampling.images < FEW_IMAGES and (judge is not None or weights.fid is not None):
        logger.warning(
            "a Frechet distance of %d images says little: give --images %d or more",
            sampling.images,
            FEW_IMAGES,
        )
    set_steps(model.load_scheduler(sampling.scheduler), sampling.steps)
    guidance_of(model, sampling.guidance, options.image_guidance)
    unet = model.load_unet()
    progress("recording held-out trajectories", 0, 1)
    held_out = trajectories.record_trajectories(
        model,
        unet,
        steps=sampling.steps,
        samples=min(quality.HELD_OUT_SAMPLES, model.calibration_samples),
        seed=quality.HELD_OUT_SEED,
        scheme=workspace.scheme,
        rows=model.forward_rows,
    )
    results: dict[str, Any] = {}
    drawn: dict[str, NDArray[np.float32]] = {}
    for name, denoise in _contestants(workspace, options.backend, unet):
        images, labels = quality.draw(
            model,
            denoise,
            sampling,
            named(progress, f"{name} draws"),
        )
        drawn[name] = images[:COMPARED].copy()  # a view would keep all of them
        if name == "FP32":
            fp32_images = images
        errors = quality.epsilon_mse(denoise, held_out, workspace.scheme, model.forward_rows)
        judged = quality.evaluate_images(images, labels, fp32_images, errors, judge)
        asked = captions_of(model, labels)
        results[name] = judged.to_json() | perceptual(images, asked, fp32_images)
    picture = workspace.new(IMAGES, f"compare-{options.backend}.png")
    captions = captions_of(model, labels[:COMPARED])
    save_comparison(drawn, captions, picture)
    singles = {
        name: _singles(workspace, options.backend, name, len(x)) for name, x in drawn.items()
    }
    for name, paths in singles.items():
        save_images(drawn[name], paths)
    details: Evaluation = {
        "backend": options.backend,
        "sampling": dataclasses.asdict(sampling),
        "results": results,
        "picture": str(workspace.path(IMAGES, picture.name)),
        "captions": captions,
        "images": {
            name: [f"{IMAGES}/{path.parent.name}/{path.name}" for path in paths]
            for name, paths in singles.items()
        },
    }
    report = workspace.new(REPORTS, f"evaluate-{options.backend}.json")
    write_json(report, details)
    return [report, picture, *(path for paths in singles.values() for path in paths)], details


def _singles(workspace: Workspace, backend: str, name: str, count: int) -> list[Path]:
    """Where the contestant ``name`` keeps the images of its that are compared."""
    folder = f"evaluate-{backend}"
    return [workspace.new(IMAGES, folder, f"{name.lower()}-{i}.png") for i in range(count)]


def _contestants(
    workspace: Workspace, backend: str, unet: nn.Module
) -> Iterator[tuple[str, Denoiser]]:
    """The denoisers by name, FP32 first; each is released before the next is made, since a large
    model's fill the memory.
    """
    yield "FP32", float_denoiser(unet)
    methods = {method_name(workspace): CALIBRATED} | (
        {"QuEST": CHECKPOINT} if "finetune" in workspace.stages else {}
    )
    for name, file in methods.items():
        yield name, _quantized(workspace.path(file))
    with EngineUNet.load(workspace, backend) as engine:
        yield backend, engine


def _quantized(path: Path) -> QuantizedModel:
    """The fake-quantized model of a checkpoint, its weights rounded once for all images."""
    quantized = QuantizedModel.from_checkpoint(load_checkpoint(path)).eval()
    for layer in quantized.quantized_layers().values():
        layer.freeze()
    return quantized


def captions_of(model: PipelineModel, labels: NDArray[np.int64]) -> list[str]:
    """What each image [N] was asked for by, in words or as a number."""
    if model.asked_for == "prompt":
        prompts = model.prompts  # read from its file
        return [prompts[label % len(prompts)] for label in labels]
    return [str(label) if model.asked_for else "" for label in labels]
