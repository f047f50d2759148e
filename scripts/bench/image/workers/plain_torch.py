"""torch, eager or compiled."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from scripts.bench.image.workers.in_diffusers import opened_by
from scripts.bench.image.workers.measuring import main


def load(request: dict[str, Any]) -> Any:
    """The pipeline in "folder"; where "compiled", UNet and decoder are."""
    pipeline = StableDiffusionPipeline.from_pretrained(request["folder"])
    if request["compiled"]:
        pipeline.unet.forward = torch.compile(pipeline.unet.forward)
        pipeline.vae.decoder.forward = torch.compile(pipeline.vae.decoder.forward)
    return pipeline


if __name__ == "__main__":
    main(opened_by(load), ("torch", "diffusers"))
