"""What a worker does, whatever its program: a request in, a drawing from a cold start and a warm
one, figures out. The standard library alone is imported at the top.

The request is a JSON value on standard input, the figures are the last line of standard output;
what the program prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import statistics
import sys
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TEXT_ENCODER, UNET, VAE = "text_encoder", "unet", "vae"
PR_SET_PDEATHSIG = 1
Calls = dict[str, list[float]]
"""Seconds of each call of a part."""


class Program(Protocol):
    """An open program."""

    def draw(self, steps: int) -> Calls:
        """Draw the image of the request in ``steps`` steps."""

    def predict(self, **inputs: Any) -> Any:
        """The UNet's prediction, float32 [B, C, H, W], for "sample" [B, C, H, W], "timestep" [B],
        all of it the same, and "encoder_hidden_states" [B, tokens, D]; None where the program does
        not give it.
        """


def timed(seconds: list[float], call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` that notes how long it takes."""

    def run(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    return run


def peak_bytes() -> int:
    """The most memory that this process has held; not getrusage's, which is inherited."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM:")))


def measure(request: dict[str, Any], open_program: Callable[[dict[str, Any]], Program]) -> Any:
    """Open the program, draw twice, and compare its predictions with those of the float model.

    Args:
        request: "spawned", the time at which this process was started; "steps" of an image, and
            those that are drawn of it: "cold_steps", then "warm_steps", 0 where the first drawing
            had nothing to warm up; "inputs", the folder of :func:`predictions_error`; the rest is
            the program's.

    Returns:
        "open_s" and "first_image_s", since the process was started; "text_encoder_s",
        "unet_step_s", the median of "unet_steps_s", "unet_s", "vae_s" and "image_s" of the last
        drawing, all of whose steps count as the median; steps that the first drawing left out too;
        "peak_bytes" of both drawings; "error", or None.
    """
    program = open_program(request)
    opened = time.time()
    steps, drawn = request["steps"], request["cold_steps"]
    calls = program.draw(drawn)
    cold = whole = time.time() - opened
    if request["warm_steps"]:
        started = time.perf_counter()
        calls = program.draw(request["warm_steps"])
        whole = time.perf_counter() - started
    step = statistics.median(calls[UNET])
    peak = peak_bytes()
    return {
        "open_s": opened - request["spawned"],
        "first_image_s": opened - request["spawned"] + cold + step * (steps - drawn),
        "text_encoder_s": sum(calls[TEXT_ENCODER]),
        "unet_steps_s": calls[UNET],
        "unet_step_s": step,
        "unet_s": step * steps,
        "vae_s": sum(calls[VAE]),
        "image_s": whole - sum(calls[UNET]) + step * steps,
        "peak_bytes": peak,
        "error": predictions_error(program, Path(request["inputs"])),
    }


def predictions_error(program: Program, folder: Path) -> float | None:
    """The L2 distance of the program's predictions from the float model's, over the norm of those.

    Args:
        folder: a file NAME.npy for each input [N, B, ...] and for the float model's "prediction".
    """
    import numpy as np

    arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    expected = arrays.pop("prediction").astype(np.float64)
    off = 0.0
    for i in range(len(expected)):
        found = program.predict(**{name: values[i] for name, values in arrays.items()})
        if found is None:
            return None
        off += float(np.square(np.asarray(found, np.float64) - expected[i]).sum())
    return float(np.sqrt(off / np.square(expected).sum()))


def versions(packages: Sequence[str]) -> dict[str, str]:
    """What is installed here of ``packages``."""
    return {name: metadata.version(name) for name in packages}


@contextmanager
def quiet() -> Iterator[Callable[[Any], None]]:
    """Give what sends a JSON value to the process that started this one; whatever else is written
    to standard output meanwhile, also by native code, goes to standard error.
    """
    protocol = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(protocol, "w") as stream:
        yield lambda value: print(json.dumps(value), file=stream, flush=True)


def main(open_program: Callable[[dict[str, Any]], Program], packages: Sequence[str]) -> None:
    """Measure what standard input asks for.

    Args:
        packages: of the program, whose versions belong to the figures.
    """
    # It ends with the process that started it, however that ends.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    request = json.load(sys.stdin)
    with quiet() as send:
        send(measure(request, open_program) | {"versions": versions(packages)})
