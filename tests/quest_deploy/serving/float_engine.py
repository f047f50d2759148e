"""The float UNet in the place of an engine, and an image of the pipeline around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from quest_deploy.models.residuals import unet_residuals

if TYPE_CHECKING:
    from quest_deploy.models.pipeline_model import PipelineModel


class FloatEngine:
    """The float UNet in the place of an engine that has the inputs of these ``kinds``."""

    def __init__(self, model: PipelineModel, *kinds: str) -> None:
        self.unet = model.load_unet()
        self.added = {name: 1 for kind in kinds for name in unet_residuals(model.config, kind)}

    def __call__(self, sample: Any, timestep: Any, **conditions: Any) -> Any:
        return self.unet(sample, timestep, **conditions, return_dict=False)[0]

    def prepare(self) -> None:
        """It is ready."""


def draw(pipeline: Any, **options: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red cat",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **options,
    ).images
