"""Compare the C++ runtime's images with Python's: one engine, one scheduler, the same noise.

    python -m scripts.bench.compare_denoise -w WORKSPACE --program DENOISE [--backend tensorrt]

Writes what `trt_plugins/apps/denoise` reads, runs it, draws the same images with the engine in
Python, whose loop is diffusers' own scheduler, and compares their pixels.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer

from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.errors import QuestDeployError
from quest_deploy.evaluation.sampling import sample_images
from quest_deploy.files import write_json
from quest_deploy.models.channels import Guidance
from quest_deploy.models.loading import load_model
from quest_deploy.stages.schedule import write_schedule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quest_deploy.models.pipeline_model import PipelineModel

SEED = 0


def denoised_by(
    program: Path,
    workspace: Workspace,
    backend: str,
    model: PipelineModel,
    labels: NDArray[np.int64],
    scheduler: str,
    steps: int,
    guidance: float,
) -> tuple[NDArray[np.float32], str]:
    """The images [B, C, H, W] in [-1, 1] that the program draws, and what it prints; raise
    QuestDeployError where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="quest-deploy-") as scratch:
        folder = Path(scratch)
        schedule, result = folder / "schedule.json", folder / "result.f32"
        write_schedule(workspace, scheduler, steps, schedule)
        generator = torch.Generator().manual_seed(SEED)  # as sample_images draws it
        shape = (len(labels), *model.sample_shape)
        torch.randn(*shape, generator=generator).numpy().tofile(folder / "noise.f32")
        parts = Guidance(guidance).parts(
            model.conditions(labels), model.null_conditions(len(labels))
        )
        line: list[str | Path] = [program, workspace.root, backend, schedule]
        line += [folder / "noise.f32", result, "--batch", str(len(labels))]
        line += ["--guidance", str(guidance)]
        for name in parts[0]:
            torch.cat([part[name] for part in parts]).float().numpy().tofile(folder / name)
            line += ["--condition", f"{name}={folder / name}"]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise QuestDeployError(f"{program} failed: {done.stderr.strip()}")
        return model.images(np.fromfile(result, np.float32).reshape(shape)), done.stdout.strip()


def compare(ours: NDArray[np.float32], other: NDArray[np.float32]) -> dict[str, Any]:
    """How far two batches of images are apart, as the 8-bit pixels that a file has."""
    a, b = (np.rint(127.5 * (images + 1)).clip(0, 255) for images in (ours, other))
    apart = np.abs(a - b)
    return {"equal_pixels": float((apart == 0).mean()), "largest_difference": int(apart.max())}


def main(
    workspace: Annotated[Path, typer.Option("--workspace", "-w")],
    program: Annotated[Path, typer.Option(help="apps/denoise, built for the backend.")],
    backend: str = "tensorrt",
    images: Annotated[int, typer.Option(min=1)] = 2,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    scheduler: str = "ddim",
    guidance: Annotated[float, typer.Option(min=1.0)] = 3.0,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Draw with both, and print how far they are apart."""
    try:
        opened = Workspace.open(workspace)
        model, labels = load_model(opened.source), np.arange(images, dtype=np.int64)
        drawn, said = denoised_by(
            program, opened, backend, model, labels, scheduler, steps, guidance
        )
        with EngineUNet.load(opened, backend) as unet:
            expected = sample_images(
                model,
                unet,
                labels,
                scheduler=scheduler,
                steps=steps,
                guidance=guidance,
                seed=SEED,
            )
    except QuestDeployError as e:
        print(f"error: {e}", file=sys.stderr)
        raise typer.Exit(e.exit_code) from e
    found = {"images": images, "steps": steps, "said": said, **compare(drawn, expected)}
    print(found)
    if json_file is not None:
        write_json(json_file, found)


if __name__ == "__main__":
    typer.run(main)
