"""`quest-deploy evaluate`: quality of FP32, PTQ, QuEST and the engines, side by side."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from quest_deploy.engine.backends import BACKENDS, get_backend
from quest_deploy.files import write_json
from quest_deploy.workspace import CALIBRATED, CHECKPOINT, REPORTS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.cli.console import Update
    from quest_deploy.evaluate import SamplingOptions
    from quest_deploy.workspace import Workspace


def evaluate_stage(
    workspace: Workspace, console: Console, backend: str, options: SamplingOptions | None = None, *, reuse: bool = False
) -> dict[str, Any]:
    """Judge FP32, PTQ, QuEST (where finetuned) and the engine of ``backend``; writes reports/evaluate-<backend>.json."""
    from quest_deploy.evaluate import HELD_OUT_SAMPLES, HELD_OUT_SEED, SamplingOptions, assess, draw, epsilon_mse

    get_backend(backend)
    chosen = options or SamplingOptions()
    report = workspace.path(REPORTS, f"evaluate-{backend}.json")

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        from quest_deploy.checkpoint import load_checkpoint
        from quest_deploy.models.registry import load_model
        from quest_deploy.quant.model import QuantizedModel
        from quest_deploy.runtime import EngineUNet
        from quest_deploy.sampling import float_denoiser
        from quest_deploy.trajectories import record_trajectories

        model = load_model(workspace.model)
        unet = model.load_unet()
        update("recording held-out trajectories", 0, 1)
        held_out = record_trajectories(
            model, unet, steps=chosen.steps, samples=HELD_OUT_SAMPLES, seed=HELD_OUT_SEED, scheme=workspace.scheme
        )
        methods = {method_name(workspace): CALIBRATED} | ({"QuEST": CHECKPOINT} if "finetune" in workspace.stages else {})
        contestants: dict[str, Any] = {"FP32": float_denoiser(unet)}
        for name, file in methods.items():
            contestants[name] = QuantizedModel.from_checkpoint(load_checkpoint(workspace.path(file))).eval()
        results: dict[str, Any] = {}
        with EngineUNet.load(workspace, backend) as engine:
            contestants[backend] = engine
            for name, denoise in contestants.items():
                images, labels = draw(model, denoise, chosen, partial(_report, update, name))
                if name == "FP32":
                    fp32_images = images
                quality = assess(images, labels, fp32_images, epsilon_mse(denoise, held_out, workspace.scheme))
                results[name] = quality.to_json()
        details = {"backend": backend, "sampling": dataclasses.asdict(chosen), "results": results}
        write_json(report, details)
        return [report], details

    inputs = (*workspace.checkpoint_inputs, f"build-engine/{backend}")
    return run_stage(
        workspace, console, f"evaluate/{backend}", inputs=inputs, options=dataclasses.asdict(chosen), reuse=reuse, work=work
    )


def _report(update: Update, name: str, done: int, total: int) -> None:
    update(f"{name} draws", done, total)


def describe(details: dict[str, Any]) -> str:
    """The details as a table; epsilon-MSE as the mean over the upper and the lower half of the buckets."""
    rows = []
    for name, quality in details["results"].items():
        errors = [e for e in quality["epsilon_mse"] if e is not None]
        clean, noisy = errors[: max(1, len(errors) // 2)], errors[len(errors) // 2 :]
        rows.append([
            name, f"{quality['frechet_distance']:.2f}", f"{quality['accuracy']:.1%}", f"{quality['pixel_mse']:.4f}",
            f"{sum(noisy) / len(noisy):.4f}", f"{sum(clean) / len(clean):.4f}",
        ])  # fmt: skip
    sampling = details["sampling"]
    caption = f"{sampling['images']} images, {sampling['steps']}-step {sampling['scheduler']}, guidance {sampling['guidance']:g}"
    header = ["", "Frechet distance", "accuracy", "pixel MSE", "e-MSE, t high", "e-MSE, t low"]
    return "\n".join([caption, table(header, rows)])


def evaluate(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    backend: Annotated[str, typer.Option(help=f"The engine to judge: {', '.join(BACKENDS)}.")] = DEFAULT_BACKEND,
    images: Annotated[int, typer.Option(min=2, help="Images to draw with each.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance weight; 1 is none.")] = 1.0,
    scheduler: Annotated[str, typer.Option(help="A diffusers scheduler.")] = "ddim",
    seed: int = 2024,
    as_json: JsonOption = False,
) -> None:
    """Judge FP32, the fake-quantized models and the engine with the model's own quality metric."""
    from quest_deploy.evaluate import SamplingOptions

    console = Console(as_json=as_json)
    get_backend(backend)
    opened = open_workspace(workspace, model, bits)
    options = SamplingOptions(images, steps, guidance, scheduler, seed)
    details = evaluate_stage(opened, console, backend, options)
    console.result({"workspace": str(opened.root), **details}, describe(details))
