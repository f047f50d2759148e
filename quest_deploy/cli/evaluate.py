"""`quest-deploy evaluate`: quality of FP32, PTQ, QuEST and the engines, side by side.

The embedded model's images are judged by a classifier of digits. Of other models it is measured how
near they come to FP32: the error of the predictions in each timestep bucket, and that of the images
drawn from the same noise.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.artifacts.workspace import CALIBRATED, CHECKPOINT, REPORTS
from quest_deploy.backends.base import EngineOptions
from quest_deploy.backends.registry import BACKENDS, get_backend
from quest_deploy.cli.calibrate import method_name
from quest_deploy.cli.console import Console, table
from quest_deploy.cli.options import (
    DEFAULT_BACKEND,
    BitsOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    open_workspace,
)
from quest_deploy.cli.stage import run_stage
from quest_deploy.files import write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.cli.console import Update
    from quest_deploy.evaluation.sampling import Denoiser
    from quest_deploy.quantization.model import QuantizedModel

"""To draw with each of the contestants, where a forward pass may take seconds."""
STEPS, SCHEDULER, SEED = 20, "ddim", 2024
DEFAULTS = {"steps": STEPS, "scheduler": SCHEDULER, "seed": SEED}


def evaluate_stage(
    workspace: Workspace,
    console: Console,
    backend: str,
    choices: dict[str, Any] | None = None,
    *,
    reuse: bool = False,
) -> dict[str, Any]:
    """Judge FP32, PTQ, QuEST (where finetuned) and the engine of ``backend``; writes
    reports/evaluate-<backend>.json.

    Args:
        choices: override the defaults of SamplingOptions, some of which are the model's.
    """
    get_backend(backend).check_run(EngineOptions())  # at once, before anything is drawn
    report = workspace.path(REPORTS, f"evaluate-{backend}.json")
    given = {**DEFAULTS, **(choices or {})}

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        from quest_deploy.calibration.trajectories import record_trajectories
        from quest_deploy.evaluation.quality import (
            HELD_OUT_SAMPLES,
            HELD_OUT_SEED,
            SamplingOptions,
            draw,
            epsilon_mse,
            evaluate_images,
        )
        from quest_deploy.models.loading import load_model

        model = load_model(workspace.source)
        defaults = {"images": model.evaluation_images}
        chosen = SamplingOptions(**{"guidance": model.guidance, **defaults, **given})
        unet = model.load_unet()
        update("recording held-out trajectories", 0, 1)
        held_out = record_trajectories(
            model,
            unet,
            steps=chosen.steps,
            samples=min(HELD_OUT_SAMPLES, model.calibration_samples),
            seed=HELD_OUT_SEED,
            scheme=workspace.scheme,
            rows=model.forward_rows,
        )
        results: dict[str, Any] = {}
        for name, denoise in _contestants(workspace, backend, unet):
            images, labels = draw(model, denoise, chosen, partial(_report, update, name))
            if name == "FP32":
                fp32_images = images
            errors = epsilon_mse(denoise, held_out, workspace.scheme, model.forward_rows)
            judged = evaluate_images(model, images, labels, fp32_images, errors)
            results[name] = judged.to_json()
        details = {"backend": backend, "sampling": dataclasses.asdict(chosen), "results": results}
        write_json(report, details)
        return [report], details

    inputs = (*workspace.checkpoint_inputs, f"build-engine/{backend}")
    return run_stage(
        workspace,
        console,
        f"evaluate/{backend}",
        inputs=inputs,
        options=given,
        reuse=reuse,
        work=work,
    )


def _contestants(
    workspace: Workspace, backend: str, unet: nn.Module
) -> Iterator[tuple[str, Denoiser]]:
    """The denoisers by name, FP32 first; each is released before the next is made, since a large
    model's fill the memory.
    """
    from quest_deploy.backends.engine_unet import EngineUNet
    from quest_deploy.evaluation.sampling import float_denoiser

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
    from quest_deploy.artifacts.checkpoint import load_checkpoint
    from quest_deploy.quantization.model import QuantizedModel

    quantized = QuantizedModel.from_checkpoint(load_checkpoint(path)).eval()
    for layer in quantized.quantized_layers().values():
        layer.freeze()
    return quantized


def _report(update: Update, name: str, done: int, total: int) -> None:
    update(f"{name} draws", done, total)


def describe(details: dict[str, Any]) -> str:
    """The details as a table; epsilon-MSE as the mean over the upper and the lower half of the
    buckets.
    """
    rows = []
    judged = all("frechet_distance" in quality for quality in details["results"].values())
    for name, quality in details["results"].items():
        errors = [e for e in quality["epsilon_mse"] if e is not None]
        clean, noisy = errors[: max(1, len(errors) // 2)], errors[len(errors) // 2 :]
        told = (
            [f"{quality['frechet_distance']:.2f}", f"{quality['accuracy']:.1%}"]
            if judged
            else [_psnr(quality)]
        )
        rows.append(
            [
                name,
                *told,
                f"{quality['pixel_mse']:.4f}",
                f"{sum(noisy) / len(noisy):.4f}",
                f"{sum(clean) / len(clean):.4f}",
            ]
        )
    sampling = details["sampling"]
    caption = (
        f"{sampling['images']} images, {sampling['steps']}-step {sampling['scheduler']}, "
        f"guidance {sampling['guidance']:g}"
    )
    measures = ["Frechet distance", "accuracy"] if judged else ["PSNR to FP32, dB"]
    return "\n".join(
        [caption, table(["", *measures, "pixel MSE", "e-MSE, t high", "e-MSE, t low"], rows)]
    )


def summary(details: dict[str, Any]) -> str:
    """The details in a line."""
    results = details["results"]
    if all("frechet_distance" in quality for quality in results.values()):
        told = "  ".join(
            f"{name} {quality['frechet_distance']:.2f}" for name, quality in results.items()
        )
        return f"Frechet distance (lower is better): {told}"
    return (
        "PSNR to FP32's images, dB: "
        f"{'  '.join(f'{name} {_psnr(quality)}' for name, quality in results.items())}"
    )


def _psnr(quality: dict[str, Any]) -> str:
    return "same" if quality["psnr"] is None else f"{quality['psnr']:.2f}"


def evaluate(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    backend: Annotated[
        str, typer.Option(help=f"The engine to judge: {', '.join(BACKENDS)}.")
    ] = DEFAULT_BACKEND,
    images: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Images to draw with each.",
            show_default="the model's own",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = STEPS,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance weight; 1 is none.", show_default="the model's"
        ),
    ] = None,
    scheduler: Annotated[str, typer.Option(help="A diffusers scheduler.")] = SCHEDULER,
    seed: int = SEED,
    as_json: JsonOption = False,
) -> None:
    """Judge FP32, the fake-quantized models and the engine: digits by a classifier, other models by
    their distance from FP32.
    """
    console = Console(as_json=as_json)
    get_backend(backend)
    opened = open_workspace(workspace, model, bits)
    choices = {
        "images": images,
        "steps": steps,
        "guidance": guidance,
        "scheduler": scheduler,
        "seed": seed,
    }
    details = evaluate_stage(
        opened,
        console,
        backend,
        {name: value for name, value in choices.items() if value is not None},
    )
    console.result({"workspace": str(opened.root), **details}, describe(details))
