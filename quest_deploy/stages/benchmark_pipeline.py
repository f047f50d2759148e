"""Time whole images: the model's diffusers pipeline with the quantized engine as its UNet or
transformer, and with the float engine of the same backend.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from exporters.graph_info import load_signature
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.backends.base import LOWERED
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.backends.parts import built_parts
from quest_deploy.backends.registry import get_backend
from quest_deploy.errors import InputError
from quest_deploy.evaluation.benchmark import FP32, QUANTIZED
from quest_deploy.evaluation.memory import peak_memory
from quest_deploy.evaluation.pipeline_benchmark import draw_in_turn, timing_of
from quest_deploy.models.channels import guidance_of
from quest_deploy.models.loading import load_model
from quest_deploy.models.schedulers import set_steps
from quest_deploy.processes import in_own_process
from quest_deploy.serving.parts import engine_parts
from quest_deploy.serving.pipeline import stand_in
from quest_deploy.stages.generate import call_arguments, steps_of
from quest_deploy.stages.options import GenerateOptions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from quest_deploy.backends.options import EngineOptions
    from quest_deploy.models.pipeline_model import PipelineModel
    from quest_deploy.progress import Progress
    from quest_deploy.stages.options import BenchmarkOptions


def check(workspace: Workspace, options: BenchmarkOptions) -> None:
    """Raise InputError where the model cannot draw whole images so, before anything is timed."""
    model = load_model(workspace.source)
    if model.asked_for != "prompt":
        raise InputError(
            f"--pipeline: expected a text-to-image model, and {model.name} is {model.family}"
        )
    model.require_weights("run as a pipeline")
    model.pipeline_class()
    drawing = options.drawing
    guidance_of(model, drawing.guidance, None)
    set_steps(model.load_scheduler(drawing.scheduler), steps_of(model, drawing))


def time_images(
    workspace: Workspace,
    options: BenchmarkOptions,
    engine_options: EngineOptions,
    sample_multiple: int,
    folders: Mapping[str, Path],
    progress: Progress,
) -> dict[str, Any]:
    """Draw with each of the engines in ``folders`` in turn; what the report has of it."""
    drawing, images, runs = options.drawing, options.images or 1, options.draws or 3
    model = load_model(workspace.source)
    of_engine = engine_options, sample_multiple, drawing
    beside = engine_parts(workspace, options.backend)
    pipelines = {
        name: _pipeline(model, options.backend, beside, folder, *of_engine)
        for name, folder in folders.items()
    }
    arguments = call_arguments(pipelines[QUANTIZED], model, drawing)
    drawings = draw_in_turn(
        pipelines, lambda pipeline: pipeline(**_seeded(arguments, drawing)), runs, progress
    )
    del pipelines, beside
    timings = []
    for i, (name, folder) in enumerate(folders.items()):
        memory = in_own_process(_peak_memory, workspace.root, options.backend, folder, *of_engine)
        timings.append(timing_of(name, drawings[name], images, memory))
        progress("measuring the pipeline's memory", i + 1, len(folders))
    height, width = model.image_size
    totals = {each.engine: each.total_s for each in timings}
    return {
        "network": model.network.noun,
        "steps": steps_of(model, drawing),
        "scheduler": drawing.scheduler,
        "guidance": arguments["guidance_scale"],
        "images": images,
        "draws": runs,
        "height": height,
        "width": width,
        "parts": sorted(built_parts(workspace, options.backend)),
        "engines": [asdict(each) for each in timings],
        "speedup_over_fp32": totals[FP32] / totals[QUANTIZED],
    }


def _pipeline(
    model: PipelineModel,
    backend: str,
    beside: Mapping[str, Any],
    folder: Path,
    options: EngineOptions,
    sample_multiple: int,
    drawing: GenerateOptions,
) -> Any:
    """The model's pipeline with the engine in ``folder`` as its network, and ``beside`` it the
    engines of the parts.
    """
    runner = get_backend(backend).open(folder, options)
    engine = EngineUNet.of_graph(runner, sample_multiple, load_signature(folder / LOWERED))
    network = stand_in(engine, model.config)
    pipeline = model.load_pipeline(**{model.network.part: network, **beside})
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = model.load_scheduler(drawing.scheduler)
    return pipeline


def _seeded(arguments: dict[str, Any], drawing: GenerateOptions) -> dict[str, Any]:
    """The arguments with a generator that is new: every drawing starts from the same noise."""
    return arguments | {"generator": torch.Generator().manual_seed(drawing.seed)}


def _peak_memory(
    root: Path,
    backend: str,
    folder: Path,
    options: EngineOptions,
    sample_multiple: int,
    drawing: GenerateOptions,
) -> int:
    workspace = Workspace.open(root)
    model = load_model(workspace.source)
    beside = engine_parts(workspace, backend)
    pipeline = _pipeline(model, backend, beside, folder, options, sample_multiple, drawing)
    pipeline(**_seeded(call_arguments(pipeline, model, drawing), drawing))
    return peak_memory()
