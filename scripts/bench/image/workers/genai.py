"""OpenVINO GenAI's text-to-image pipeline, at its own precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from scripts.bench.image.workers.measuring import TEXT_ENCODER, UNET, VAE, Calls, main

MILLISECONDS, MICROSECONDS = 1e-3, 1e-6


class GenAi:
    """See :class:`scripts.bench.image.workers.measuring.Program`."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Open the exported folder "folder", for one image of the request's size."""
        self._request = request
        self._properties = {"INFERENCE_NUM_THREADS": request["threads"]}
        self._pipeline = openvino_genai.Text2ImagePipeline(request["folder"])
        self._pipeline.reshape(1, request["height"], request["width"], request["guidance"])
        self._pipeline.compile("CPU", **self._properties)
        self._unet: Any = None

    def draw(self, steps: int) -> Calls:
        """See the protocol."""
        asked = {name: self._request[name] for name in ("height", "width")}
        self._pipeline.generate(
            self._request["prompt"],
            **asked,
            guidance_scale=self._request["guidance"],
            num_inference_steps=steps,
            rng_seed=self._request["seed"],
        )
        metrics = self._pipeline.get_performance_metrics()
        encoders = metrics.get_text_encoder_infer_duration().values()
        return {
            TEXT_ENCODER: [x * MILLISECONDS for x in encoders],
            UNET: [x * MICROSECONDS for x in metrics.raw_metrics.unet_inference_durations],
            VAE: [metrics.get_vae_decoder_infer_duration() * MILLISECONDS],
        }

    def predict(self, **inputs: Any) -> Any:
        """See the protocol; the UNet is opened once more, alone."""
        if self._unet is None:
            del self._pipeline
            folder = Path(self._request["folder"]) / "unet"
            self._unet = openvino_genai.UNet2DConditionModel(folder, "CPU", **self._properties)
        states = openvino.Tensor(np.ascontiguousarray(inputs["encoder_hidden_states"]))
        self._unet.set_hidden_states("encoder_hidden_states", states)
        sample = openvino.Tensor(np.ascontiguousarray(inputs["sample"]))
        timestep = openvino.Tensor(inputs["timestep"][:1].astype(np.int64))
        return self._unet.infer(sample, timestep).data


if __name__ == "__main__":
    main(GenAi, ("openvino-genai", "openvino"))
