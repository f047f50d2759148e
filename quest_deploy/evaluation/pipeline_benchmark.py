"""The time of a whole image: what each part of a diffusers pipeline takes of it, for pipelines that
differ in their network alone and draw in turn.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quest_deploy.progress import no_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from quest_deploy.progress import Progress

TEXT_ENCODER, IMAGE_ENCODER, UNET, DECODER = "text encoder", "image encoder", "unet", "decoder"
_CALLS = (
    ("text_encoder", "forward", TEXT_ENCODER),
    ("text_encoder_2", "forward", TEXT_ENCODER),
    ("text_encoder_3", "forward", TEXT_ENCODER),
    ("vae", "encode", IMAGE_ENCODER),
    ("unet", "forward", UNET),
    ("transformer", "forward", UNET),
    ("vae", "decode", DECODER),
)
"""The pipeline's parts, by what they are called with, and what they count as; a transformer as a
UNet.
"""


@dataclass(frozen=True)
class Drawing:
    """One drawing: the seconds of all of it, and of each call of a part, by the part."""

    seconds: float
    calls: dict[str, list[float]]


@dataclass(frozen=True)
class ImageTiming:
    """One engine's drawings: medians over them, in seconds.

    Attributes:
        parts: by part, all its calls of a drawing together; a part that is not called is missing.
        unet_call_s: one call of the UNet; median over all of them.
        unet_calls: how many calls a drawing takes.
        total_s: the whole drawing.
        rest_s: what the parts leave of it, for the scheduler, the tokenizer, guidance and copies;
            a difference of medians, which noise can take below 0.
        peak_memory_bytes: the peak resident memory of a process that loads the pipeline and draws.
    """

    engine: str
    parts: dict[str, float]
    unet_call_s: float
    unet_calls: int
    total_s: float
    rest_s: float
    images_per_s: float
    peak_memory_bytes: int


@contextmanager
def _recorded(pipeline: Any) -> Iterator[dict[str, list[float]]]:
    """The seconds of each call of the pipeline's parts, by part, while the context is open."""
    calls: dict[str, list[float]] = {}

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments, **options)
            calls.setdefault(part, []).append(time.perf_counter() - start)
            return result

        return run

    found = [(getattr(pipeline, name, None), method, part) for name, method, part in _CALLS]
    patched = [(module, method, part) for module, method, part in found if module is not None]
    try:
        for module, method, part in patched:
            setattr(module, method, timed(part, getattr(module, method)))
        yield calls
    finally:
        for module, method, _ in patched:
            vars(module).pop(method, None)  # the class has the original


def draw_in_turn(
    pipelines: Mapping[str, Any],
    draw: Callable[[Any], Any],
    runs: int,
    progress: Progress = no_progress,
) -> dict[str, list[Drawing]]:
    """The drawings of each pipeline, ``runs`` of them after an untimed one; ``draw`` calls it."""
    drawings: dict[str, list[Drawing]] = {name: [] for name in pipelines}
    for run in range(1 + runs):
        for name, pipeline in pipelines.items():
            with _recorded(pipeline) as calls:
                start = time.perf_counter()
                draw(pipeline)
                seconds = time.perf_counter() - start
            if run:
                drawings[name].append(Drawing(seconds, calls))
        progress("drawing", run, runs)
    return drawings


def timing_of(engine: str, drawings: list[Drawing], images: int, memory: int) -> ImageTiming:
    """The medians of an engine's drawings, of ``images`` each."""
    total = _median([x.seconds for x in drawings])
    parts = {
        part: _median([sum(x.calls[part]) for x in drawings])
        for part in (TEXT_ENCODER, IMAGE_ENCODER, UNET, DECODER)
        if part in drawings[0].calls
    }
    return ImageTiming(
        engine,
        parts,
        _median([seconds for x in drawings for seconds in x.calls[UNET]]),
        len(drawings[0].calls[UNET]),
        total,
        total - sum(parts.values()),
        images / total,
        memory,
    )


def _median(values: list[float]) -> float:
    return float(np.median(values))
