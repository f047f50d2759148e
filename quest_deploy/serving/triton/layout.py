"""Where a package's files stand, and what its models are configured with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quest_deploy.errors import InputError
from quest_deploy.serving.triton.configs import plan_config
from quest_deploy.serving.triton.options import IO_DTYPES
from quest_deploy.serving.triton.pbtxt import pbtxt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quest_deploy.serving.triton.options import TritonOptions
    from quest_deploy.serving.triton.plans import Plan

MODELS = "models"
FILES = Path(__file__).parent / "triton_files"
"""What is copied as it is."""
PLAN, ONNX = "model.plan", "model.onnx"
NUMPY_TYPES = {"TYPE_FP32": "float32", "TYPE_FP16": "float16", "TYPE_INT32": "int32"}
Signature = dict[str, Any]
"""A model's inputs, their NumPy types by name, and the names of its outputs."""


@dataclass(frozen=True)
class Layout:
    """A package that is being written.

    Attributes:
        folder: the package's.
        plan: the workspace's TensorRT engine, if there is one.
        sample_shape: of the latents, [C, H, W].
        sample_multiple: what other heights and widths are multiples of.
        pixels_per_latent: a side of an image, in sides of the sample.

    Raises:
        InputError: images are larger than the options allow, or the options allow larger ones than
            the plan.
    """

    folder: Path
    options: TritonOptions
    plan: Plan | None
    sample_shape: tuple[int, ...]
    sample_multiple: int
    pixels_per_latent: int

    def __post_init__(self) -> None:
        height, width = self.pixels(self.size)
        planned = max((max(self.pixels(size)) for size in self.sizes), default=None)
        if self.max_size < max(height, width):
            raise InputError(
                f"--max-size {self.max_size}: expected at least the default size of an image, "
                f"{height}x{width}"
            )
        if planned is not None and self.max_size > planned:
            raise InputError(
                f"--max-size {self.max_size}: the plan's largest side is {planned}; build it with "
                "a larger --sample-size"
            )

    def pixels(self, size: tuple[int, int]) -> tuple[int, int]:
        """An image's height and width, of a sample's."""
        return size[0] * self.pixels_per_latent, size[1] * self.pixels_per_latent

    @property
    def max_size(self) -> int:
        """The most pixels of a request's height or width."""
        return self.options.max_size or max(
            side for size in self.sizes or (self.size,) for side in self.pixels(size)
        )

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The sample's heights and widths that the plan was built for, and takes no other; empty
        without a plan.
        """
        return () if self.plan is None else self.plan.sizes or (self._native,)

    @property
    def size(self) -> tuple[int, int]:
        """The sample's height and width where a request does not say."""
        return self._native if not self.sizes or self._native in self.sizes else self.sizes[0]

    @property
    def _native(self) -> tuple[int, int]:
        _, height, width = self.sample_shape
        return height, width

    @property
    def max_batch(self) -> int:
        """Rows that the UNet runs at once."""
        return self.options.max_batch or (16 if self.plan is None else self.plan.options.max_batch)

    @property
    def half(self) -> bool:
        """Whether the models' inputs and outputs are FP16."""
        return self.options.io_dtype == "fp16"

    @property
    def kind(self) -> str:
        """Triton's name of the inputs' and outputs' type."""
        return IO_DTYPES[self.options.io_dtype]

    @property
    def inner_queue(self) -> int:
        """Calls that wait for a model: each image in flight of both pipelines waits for one answer
        at a time; the rest is for pipelines with a few instances.
        """
        return 8 * self.options.max_in_flight

    def version_folder(self, model: str) -> Path:
        """The folder of the model's files, made where it is missing."""
        folder = self.folder / MODELS / model / "1"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write_config(self, model: str, config: dict[str, Any]) -> None:
        """Write the model's ``config.pbtxt``."""
        (self.folder / MODELS / model / "config.pbtxt").write_text(pbtxt(config))

    def write_plan_config(
        self,
        name: str,
        inputs: dict[str, list[int]],
        outputs: dict[str, list[int]],
        max_batch: int,
        kinds: dict[str, str],
        queue_delay: int = 0,
        profiles: int = 1,
        size: tuple[int, int] | None = None,
        divisors: Mapping[str, int] | None = None,
    ) -> Signature:
        """Configure a model of the platform tensorrt_plan; see
        :func:`quest_deploy.serving.triton.configs.plan_config`.

        Args:
            size: height and width to warm up with, where they are not the sample's.
            divisors: what they are divided by in an input, by its name.
        """
        height, width = size or self.size

        def native(name: str, dims: list[int]) -> list[int]:
            divisor = (divisors or {}).get(name, 1)
            sides = (self.sample_shape[0], height // divisor, width // divisor)
            return [s if s > 0 else sides[axis] for axis, s in enumerate(dims)]

        config = plan_config(
            name,
            {key: (kinds[key], dims) for key, dims in inputs.items()},
            {key: (self.kind, dims) for key, dims in outputs.items()},
            {key: native(key, dims) for key, dims in inputs.items()},
            max_batch,
            queue_delay=queue_delay,
            max_queue=self.inner_queue,
            profiles=profiles,
        )
        self.write_config(name, config)
        return {
            "inputs": {key: NUMPY_TYPES[kind] for key, kind in kinds.items()},
            "outputs": list(outputs),
        }
