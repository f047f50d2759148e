"""A diffusers pipeline whose parts are timed, whoever computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from scripts.bench.image.workers.measuring import TEXT_ENCODER, UNET, VAE, Calls, timed

if TYPE_CHECKING:
    from collections.abc import Callable


class InDiffusers:
    """See :class:`scripts.bench.image.workers.measuring.Program`."""

    def __init__(self, pipeline: Any, request: dict[str, Any]) -> None:
        """Time the parts of ``pipeline``, modules, from now on."""
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline, self._request = pipeline, request
        self._calls: Calls = {TEXT_ENCODER: [], UNET: [], VAE: []}
        for part, name in ((TEXT_ENCODER, "forward"), (UNET, "forward"), (VAE, "decode")):
            module = getattr(pipeline, part)
            setattr(module, name, timed(self._calls[part], getattr(module, name)))

    def draw(self, steps: int) -> Calls:
        """See the protocol."""
        for seconds in self._calls.values():
            seconds.clear()
        asked = {name: self._request[name] for name in ("prompt", "height", "width")}
        self._pipeline(
            **asked,
            guidance_scale=self._request["guidance"],
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(self._request["seed"]),
        )
        return {part: list(seconds) for part, seconds in self._calls.items()}

    def predict(self, **inputs: Any) -> Any:
        """See the protocol."""
        given: dict[str, Any] = {name: torch.from_numpy(value) for name, value in inputs.items()}
        sample, timestep = given.pop("sample"), given.pop("timestep")
        with torch.no_grad():
            output = self._pipeline.unet(sample, timestep[0].long(), **given, return_dict=False)[0]
        return output.float().numpy()


def opened_by(
    make: Callable[[dict[str, Any]], Any],
) -> Callable[[dict[str, Any]], InDiffusers]:
    """A worker's program, of what makes its pipeline from the request."""

    def open_program(request: dict[str, Any]) -> InDiffusers:
        torch.set_num_threads(request["threads"])
        return InDiffusers(make(request), request)

    return open_program
