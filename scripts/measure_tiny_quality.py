"""Measure what QuEST finetuning does to the embedded model at W4A4: the quality table of the README.

    python scripts/measure_tiny_quality.py [--bits w4a4] [--seed 0 --seed 1] [--json FILE]

A seed draws the calibration trajectories, the values kept for the range search and the finetuning batches; the images that are judged
come from a noise of their own, the same for every row. About six minutes a seed on two idle cores.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from quest_deploy.evaluate import HELD_OUT_SAMPLES, HELD_OUT_SEED, SamplingOptions, assess, draw, epsilon_mse
from quest_deploy.finetune.train import FinetuneOptions, finetune
from quest_deploy.models.registry import load_model
from quest_deploy.quant.calibrate import CalibrationOptions, RangeMethod, calibrate
from quest_deploy.quant.model import QuantizedModel
from quest_deploy.sampling import float_denoiser
from quest_deploy.scheme import DEFAULT_BUCKETS, Granularity, Scheme
from quest_deploy.trajectories import record_trajectories


def main(
    bits: str = "w4a4",
    buckets: int = DEFAULT_BUCKETS,
    seed: Annotated[list[int] | None, typer.Option(help="A seed; may be repeated. [default: 0, 1 and 2]")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print the table as Markdown."""
    model = load_model("tiny")
    unet = model.load_unet()
    options = SamplingOptions()
    scheme = Scheme.parse(bits, buckets=buckets)
    per_tensor = Scheme.parse(bits, buckets=1, granularity=Granularity.PER_TENSOR)
    held_out = record_trajectories(model, unet, steps=model.calibration_steps, samples=HELD_OUT_SAMPLES, seed=HELD_OUT_SEED)
    fp32 = float_denoiser(unet)
    fp32_images, labels = draw(model, fp32, options)
    rows: dict[str, list[dict[str, Any]]] = {}

    def judge(name: str, denoise: Any, seconds: float) -> None:
        images, _ = draw(model, denoise, options)
        quality = assess(images, labels, fp32_images, epsilon_mse(denoise, held_out, scheme))
        rows.setdefault(name, []).append({**quality.to_json(), "seconds": seconds})
        print(f"{name}: Frechet distance {quality.frechet_distance:.2f}, {seconds:.0f} s", flush=True)

    judge("FP32", fp32, 0.0)
    for number in seed or [0, 1, 2]:
        started = time.monotonic()
        trajectories = record_trajectories(
            model, unet, steps=model.calibration_steps, samples=model.calibration_samples, seed=number, scheme=scheme
        )
        calibrated = calibrate("tiny", unet, trajectories, scheme, CalibrationOptions(seed=number))
        calibration_s = time.monotonic() - started
        finetuned = finetune(lambda: unet, calibrated, trajectories, FinetuneOptions(family=model.family, seed=number))
        total_s = time.monotonic() - started
        started = time.monotonic()
        minmax = calibrate("tiny", unet, trajectories, per_tensor, CalibrationOptions(RangeMethod.MINMAX, seed=number))
        minmax_s = time.monotonic() - started
        judge("PTQ min-max, per tensor, 1 bucket", QuantizedModel.from_checkpoint(minmax).eval(), minmax_s)
        judge(f"PTQ MSE, folded channel, {buckets} buckets", QuantizedModel.from_checkpoint(calibrated).eval(), calibration_s)
        judge(f"QuEST, folded channel, {buckets} buckets", QuantizedModel.from_checkpoint(finetuned).eval(), total_s)
    print(markdown(rows))
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


def markdown(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The means over the seeds as a Markdown table, each seed's Frechet distance in brackets."""
    lines = [
        "| 20-step DDIM, 1000 images | Fréchet distance | accuracy | pixel MSE to FP32 | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, results in rows.items():
        mean = {key: float(np.mean([r[key] for r in results])) for key in ("frechet_distance", "accuracy", "pixel_mse", "seconds")}
        distances = ", ".join(f"{result['frechet_distance']:.2f}" for result in results)
        each = f" ({distances})" if len(results) > 1 else ""
        distance, accuracy, pixels = f"{mean['frechet_distance']:.2f}{each}", f"{mean['accuracy']:.1%}", f"{mean['pixel_mse']:.4f}"
        lines.append(f"| {name} | {distance} | {accuracy} | {pixels} | {mean['seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
