"""Measure what a step of finetuning costs for a UNet of Stable Diffusion 1.5's size: seconds and
peak memory.

    python -m scripts.bench.measure_finetune_cost [--device cuda] [--precision bf16] [--json FILE]

The UNet has the configuration of stable-diffusion-v1-5's and random weights, and the "recorded"
trajectories are random too: neither time nor memory depends on their values. It is calibrated to
W4A4 in two buckets by min-max, on small latents, its attention's q, k, v and softmax and the halves
of its shortcuts included; then `finetune` runs, with the layer sets of text-to-image models and
gradient checkpointing. Peaks are counted anew when finetuning begins, and printed after each step.
With --limit-gb torch may hold no more of the GPU's memory than that: what it runs in is shown, and
not only what it would have liked to have.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from quest_deploy.artifacts.model_source import ModelSource
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.calibration.ptq import CalibrationOptions, RangeMethod, calibrate
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.finetuning.train import TARGETS, FinetuneOptions, Step, finetune
from quest_deploy.models.loading import load_model

if TYPE_CHECKING:
    from torch import nn

    from quest_deploy.artifacts.checkpoint import Checkpoint

MODEL = load_model(ModelSource("sd15", random_weights=True))
TIMESTEPS = (801.0, 201.0)
"""One in each of two buckets."""
SAMPLES = 4
"""Samplings in the trajectories."""
CALIBRATION_SIZE = 16
"""A side of the latents to calibrate on: what a step costs depends on no scale."""


def load_unet() -> nn.Module:
    """The float UNet, the same at every call."""
    return MODEL.load_unet()


def random_trajectories(size: int) -> Trajectories:
    """Two steps of four samplings with latents of ``size`` x ``size``."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(len(TIMESTEPS), SAMPLES, 4, size, size, generator=generator)
    output = torch.randn(sample.shape, generator=generator)
    return Trajectories(
        sample, torch.tensor(TIMESTEPS), output, MODEL.draw_conditions(SAMPLES, generator)
    )


def calibrated_checkpoint(trajectories: Trajectories, attention_bits: int | None) -> Checkpoint:
    """The UNet at W4A4; the float model is released."""
    options = CalibrationOptions(RangeMethod.MINMAX, samples=1, batch=1)
    scheme = Scheme.parse(
        "w4a4",
        buckets=len(TIMESTEPS),
        attention_bits=attention_bits,
        softmax_bits=attention_bits,
        split_shortcuts=True,
    )
    return calibrate("sd15-size", load_unet(), trajectories, scheme, options)


def peak_gib(device: str) -> float:
    """The most memory this process has held since :func:`reset_peak`, in GiB: on the GPU as torch
    counts it, else resident (Linux).
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) / 2**20


def limit_memory(gigabytes: float) -> None:
    """Let torch hold at most that much (10^9 bytes each) of the GPU's memory; beyond it raises."""
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * gigabytes / whole))


def reset_peak(device: str) -> None:
    """Count :func:`peak_gib` from now on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def main(
    device: str = "cpu",
    precision: str = "float32",
    batch: int = 4,
    latent_size: Annotated[
        int, typer.Option(help="Side of the latents; 64 is Stable Diffusion 1.5's.")
    ] = 64,
    attention_bits: Annotated[
        int, typer.Option(help="Bits of q, k, v and softmax; 0 leaves attention in float.")
    ] = 8,
    steps: Annotated[int, typer.Option(help="Steps of each stage.")] = 1,
    gradient_checkpointing: bool = True,
    limit_gb: Annotated[
        float | None, typer.Option(help="cuda: the most memory that torch may hold, in GB.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Calibrate, run both stages, and print the cost of their steps."""
    started = time.monotonic()
    if limit_gb is not None and device == "cuda":
        limit_memory(limit_gb)
    trajectories = random_trajectories(latent_size)
    checkpoint = calibrated_checkpoint(
        random_trajectories(min(latent_size, CALIBRATION_SIZE)), attention_bits or None
    )
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "precision": precision,
        "attention_bits": attention_bits or None,
        "batch": batch,
        "latent_size": latent_size,
        "gradient_checkpointing": gradient_checkpointing,
        "limit_gb": limit_gb,
        "parameters": sum(layer.codes.size for layer in checkpoint.layers.values()),
        "calibration_seconds": time.monotonic() - started,
        "calibration_peak_gib": peak_gib("cpu"),
        "targets": [],
        "steps": [],
    }
    print(
        json.dumps({k: v for k, v in result.items() if k not in ("targets", "steps")}, indent=1),
        flush=True,
    )
    reset_peak(device)
    last = time.monotonic()

    def record(entries: list[dict[str, Any]], **what: Any) -> None:
        nonlocal last
        now = time.monotonic()
        entries.append({**what, "seconds": now - last, "peak_gib": peak_gib(device)})
        last = now
        print(
            f"{what}: {entries[-1]['seconds']:.1f} s, peak memory {entries[-1]['peak_gib']:.2f} "
            "GiB",
            flush=True,
        )

    def on_step(step: Step) -> None:
        record(result["steps"], stage=step.stage, step=step.step, loss=step.loss)

    def progress(phase: str, done: int, total: int, detail: str = "") -> None:
        if phase == TARGETS:
            record(result["targets"], targets_of_step=done)

    options = FinetuneOptions(
        "text-to-image",
        temporal_steps=steps,
        sensitive_steps=steps,
        batch=batch,
        precision=precision,
    )
    finetune(
        load_unet,
        checkpoint,
        trajectories,
        options,
        device=device,
        gradient_checkpointing=gradient_checkpointing,
        progress=progress,
        on_step=on_step,
    )
    result["peak_gib"] = peak_gib(device)
    print(
        f"whole run: {time.monotonic() - started:.1f} s, peak memory {result['peak_gib']:.2f} GiB",
        flush=True,
    )
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
