"""optimum-intel's pipeline, at its own precision."""

from __future__ import annotations

from typing import Any

import torch
from optimum.intel import OVStableDiffusionPipeline

from scripts.bench.image.workers.measuring import TEXT_ENCODER, UNET, VAE, Calls, main, timed


class Optimum:
    """See :class:`scripts.bench.image.workers.measuring.Program`."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Open the exported folder "folder", for one image of the request's size."""
        self._pipeline = OVStableDiffusionPipeline.from_pretrained(
            request["folder"],
            compile=False,
            ov_config={"INFERENCE_NUM_THREADS": str(request["threads"])},
        )
        self._pipeline.reshape(1, request["height"], request["width"], 1)
        self._pipeline.compile()
        self._pipeline.set_progress_bar_config(disable=True)
        self._request = request
        self._calls: Calls = {TEXT_ENCODER: [], UNET: [], VAE: []}
        parts = {TEXT_ENCODER: "text_encoder", UNET: "unet", VAE: "vae_decoder"}
        for part, name in parts.items():
            model = getattr(self._pipeline, name)
            model.forward = timed(self._calls[part], model.forward)

    def draw(self, steps: int) -> Calls:
        """See the protocol."""
        for seconds in self._calls.values():
            seconds.clear()
        asked = {name: self._request[name] for name in ("prompt", "height", "width")}
        self._pipeline(**asked, guidance_scale=self._request["guidance"], num_inference_steps=steps)
        return {part: list(seconds) for part, seconds in self._calls.items()}

    def predict(self, **inputs: Any) -> Any:
        """See the protocol."""
        given: dict[str, Any] = {name: torch.from_numpy(value) for name, value in inputs.items()}
        timestep = given.pop("timestep")
        output = self._pipeline.unet(**given, timestep=timestep[0], return_dict=False)
        return output[0].numpy()


if __name__ == "__main__":
    main(Optimum, ("optimum-intel", "openvino", "diffusers", "torch"))
