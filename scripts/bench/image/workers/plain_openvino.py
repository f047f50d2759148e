"""Models of OpenVINO, such as NNCF's, as the parts of a diffusers pipeline: no torch model is
loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openvino
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from transformers import CLIPTokenizer

from scripts.bench.image.workers.in_diffusers import opened_by
from scripts.bench.image.workers.measuring import TEXT_ENCODER, UNET, VAE, main

if TYPE_CHECKING:
    from collections.abc import Mapping

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


class Part(torch.nn.Module):
    """A compiled model in the place of a module; it has no weights."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, model: Any, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._model, self.config = model, FrozenDict(config)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The model's output, of its inputs in order; what is no tensor it does not take."""
        given = [x for x in (*inputs, *named.values()) if isinstance(x, torch.Tensor)]
        feeds = [x.long().reshape(1) if x.dim() == 0 else x for x in given]  # a timestep
        return (torch.from_numpy(self._model([x.numpy() for x in feeds])[0].copy()),)

    def decode(self, latents: Any, **options: Any) -> Any:
        """A decoder's name for it."""
        return self(latents)


def load(request: dict[str, Any]) -> Any:
    """The pipeline of "folder", its parts the models at the paths in "parts"."""
    folder, core = Path(request["folder"]), openvino.Core()
    properties = {
        "INFERENCE_NUM_THREADS": request["threads"],
        "INFERENCE_PRECISION_HINT": PRECISIONS[request["dtype"]],
    }
    parts = {}
    for name in (TEXT_ENCODER, UNET, VAE):
        model = core.read_model(request["parts"][name])
        model.reshape(
            {
                each.any_name: [int(size) for size in shape]
                for each, shape in zip(model.inputs, request["shapes"][name], strict=True)
            }
        )
        config = json.loads((folder / name / "config.json").read_text())
        parts[name] = Part(core.compile_model(model, "CPU", properties), config)
    return StableDiffusionPipeline(
        **parts,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


if __name__ == "__main__":
    main(opened_by(load), ("openvino", "diffusers", "torch"))
