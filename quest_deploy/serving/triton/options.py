"""What a package for Triton is configured for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quest_deploy.backends.options import NATIVE_PROCESSOR, PROCESSORS
from quest_deploy.errors import InputError
from quest_deploy.options import Option, Options

IO_DTYPES = {"fp32": "TYPE_FP32", "fp16": "TYPE_FP16"}


@dataclass(frozen=True, kw_only=True)
class TritonOptions(Options):
    """What the repository is configured for; all of it can be changed later in its ``config.pbtxt``
    files. Timesteps stay float32, which FP16 would round.
    """

    max_batch: int | None = Option(
        "Rows that the UNet runs at once; with guidance an image is two.",
        minimum=2,
        default="the plan's, or 16",
    ).field(None)
    max_steps: int = Option("The most denoising steps of a request.", minimum=1).field(100)
    max_size: int | None = Option(
        "The most pixels of a height or width.", minimum=1, default="the plan's, or the model's"
    ).field(None)
    max_images: int = Option("The most images of a request.", minimum=1).field(4)
    max_in_flight: int = Option("Images that are drawn at the same time.", minimum=1).field(16)
    max_queue: int = Option(
        "Requests that may wait; more are refused at once.",
        minimum=1,
    ).field(64)
    queue_delay: int = Option(
        "Microseconds that a batch of the UNet waits for more requests, at every denoising step.",
        minimum=0,
    ).field(0)
    io_dtype: str = Option(
        f"Of the models' inputs and outputs: {' or '.join(IO_DTYPES)}.", choices=tuple(IO_DTYPES)
    ).field("fp32")
    plugin_library: Sequence[Path] = Option(
        "A library of TensorRT plugins that the plan needs, besides its own; may be repeated.",
        metavar="FILE",
        recorded="plugins",
    ).field(())
    processor: str = Option(
        "Without a GPU: native, exact on processors that compute as this one does, or any, exact "
        "on every x86-64.",
        choices=PROCESSORS,
    ).field(NATIVE_PROCESSOR)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_images > self.max_in_flight:
            raise InputError(
                f"--max-images {self.max_images}: expected at most --max-in-flight, "
                f"{self.max_in_flight}"
            )
        for path in self.plugin_library:
            if not path.is_file():
                raise InputError(f"--plugin-library {path}: there is no such file")
