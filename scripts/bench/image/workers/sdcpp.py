"""stable-diffusion.cpp, by its Python package."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

from stable_diffusion_cpp import StableDiffusion

from scripts.bench.image.workers.measuring import TEXT_ENCODER, UNET, VAE, Calls, main


class SdCpp:
    """See :class:`scripts.bench.image.workers.measuring.Program`."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Open the file "file"."""
        self._request = request
        self._program = StableDiffusion(
            model_path=request["file"], n_threads=request["threads"], vae_decode_only=True
        )

    def draw(self, steps: int) -> Calls:
        """See the protocol: the text encoder's time ends where the first step begins, and the
        decoder's begins where the last one ends.
        """
        ends: list[float] = []

        def note(step: int, of: int, seconds: float) -> None:
            # Of what is loaded it tells too, in other numbers.
            if of == steps and step == len(ends):
                ends.append(time.perf_counter())

        asked = {name: self._request[name] for name in ("prompt", "height", "width", "seed")}
        started = time.perf_counter()
        self._program.generate_image(
            **asked,
            cfg_scale=self._request["guidance"],
            sample_method="euler",
            sample_steps=steps,
            progress_callback=note,
        )
        ended = time.perf_counter()
        if len(ends) != steps + 1:
            raise RuntimeError(f"expected to be told of {steps} steps and their start: {ends}")
        return {
            TEXT_ENCODER: [ends[0] - started],
            UNET: [end - start for start, end in pairwise(ends)],
            VAE: [ended - ends[-1]],
        }

    def predict(self, **inputs: Any) -> None:
        """See the protocol: the package does not give it."""


if __name__ == "__main__":
    main(SdCpp, ("stable-diffusion-cpp-python",))
