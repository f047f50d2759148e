"""What a package for Triton is configured for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quest_deploy.backends.base import NATIVE_PROCESSOR, PROCESSORS
from quest_deploy.errors import InputError

IO_DTYPES = {"fp32": "TYPE_FP32", "fp16": "TYPE_FP16"}


@dataclass(frozen=True)
class TritonOptions:
    """What the repository is configured for; all of it can be changed later in its ``config.pbtxt``
    files.

    Attributes:
        max_batch: rows that the UNet runs at once, an image with guidance being two; None is the
            plan's own, or 16.
        max_steps: the most denoising steps of a request.
        max_size: the most pixels of a height or width; None is the plan's largest, or the model's
            own.
        max_images: the most images of one request.
        max_in_flight: images that are drawn at the same time; more wait.
        max_queue: requests that wait; more are refused at once.
        queue_delay: microseconds that the UNet's batcher waits for more requests, at every
            denoising step.
        io_dtype: fp32 or fp16, of the models' inputs and outputs but for timesteps, which FP16
            would round.
        plugins: TensorRT plugin libraries that the plan needs, besides the one that the engine's
            record names.
        processor: the processors that the package shall be exact on without a GPU: native, those
            that compute as this one does, or any.
    """

    max_batch: int | None = None
    max_steps: int = 100
    max_size: int | None = None
    max_images: int = 4
    max_in_flight: int = 16
    max_queue: int = 64
    queue_delay: int = 0
    io_dtype: str = "fp32"
    plugins: tuple[str, ...] = ()
    processor: str = NATIVE_PROCESSOR

    def __post_init__(self) -> None:
        if self.processor not in PROCESSORS:
            raise InputError(
                f"--processor: expected one of {', '.join(PROCESSORS)}, not {self.processor!r}"
            )
        if self.io_dtype not in IO_DTYPES:
            raise InputError(
                f"unknown type {self.io_dtype!r} of inputs and outputs: expected "
                f"{' or '.join(IO_DTYPES)}"
            )
        least = {
            "max_batch": 2,
            "max_steps": 1,
            "max_size": 1,
            "max_images": 1,
            "max_in_flight": 1,
            "max_queue": 1,
            "queue_delay": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise InputError(
                    f"--{name.replace('_', '-')}: expected {bound} or more, not {value}"
                )
        if self.max_images > self.max_in_flight:
            raise InputError(
                f"--max-images {self.max_images}: expected at most --max-in-flight, "
                f"{self.max_in_flight}"
            )
        for plugin in self.plugins:
            if not Path(plugin).is_file():
                raise InputError(f"--plugin-library {plugin}: there is no such file")
