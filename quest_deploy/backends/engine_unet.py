"""The bucket-aware runtime: an engine that is called like the UNet it replaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import numpy as np

from quest_deploy.artifacts.workspace import ENGINES
from quest_deploy.backends.base import LOWERED, engine_info, open_engine
from quest_deploy.backends.registry import get_backend
from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.backends.base import Runner


class EngineUNet:
    """Predicts with an engine. A context manager; each sample of a batch may be at a timestep of
    its own.

    >>> with EngineUNet.load(workspace, "openvino") as unet:            # doctest: +SKIP
    ...     epsilon = unet.predict(sample, 501, encoder_hidden_states=tokens)
    """

    def __init__(
        self,
        runner: Runner,
        sample_multiple: int = 1,
        inputs: Mapping[str, tuple[int | None, ...]] | None = None,
    ) -> None:
        """Run with ``runner`` on samples whose height and width are multiples of
        ``sample_multiple``.

        Args:
            inputs: the shapes of the engine's inputs, by name, None for what may vary; they are
                not checked where it is None.
        """
        self._runner = runner
        self.sample_multiple = sample_multiple
        self.pixels_per_latent = 1  # a pipeline's decoder says otherwise
        self._inputs = inputs

    @classmethod
    def load(cls, workspace: Workspace, backend: str) -> EngineUNet:
        """Open a workspace's engine, its record and its files checked; raise InputError where there
        is none that can run here.
        """
        from exporters.graph_info import input_sizes, load_graph

        workspace.require(f"build-engine/{backend}")
        folder = workspace.path(ENGINES, backend)
        runner = open_engine(get_backend(backend), folder)
        inputs = input_sizes(load_graph(folder / LOWERED))
        return cls(runner, engine_info(folder).sample_multiple, inputs)

    def predict(
        self, sample: NDArray[Any], timestep: NDArray[Any] | float, **conditions: NDArray[Any]
    ) -> NDArray[np.float32]:
        """Run the engine once.

        Args:
            sample: [B, ...], any float dtype.
            timestep: [B], or one number for the whole batch; integers and floats alike.
            conditions: each [B, ...].

        Raises:
            InputError: an input that is missing, unknown or of another shape than the engine's;
                batch sizes that differ; or a height or width that the UNet cannot halve as often
                as it does.
        """
        batch = len(sample)
        steps = np.asarray(timestep, np.float32)
        steps = np.full(batch, steps) if steps.ndim == 0 else steps
        feeds = {"sample": sample, "timestep": steps, **conditions}
        self._check(feeds)
        if any(size % self.sample_multiple for size in sample.shape[2:]):
            multiple, factor = self.sample_multiple, self.pixels_per_latent
            in_pixels = "" if factor == 1 else f" (images: of {multiple * factor} pixels)"
            raise InputError(
                f"expected samples whose height and width are multiples of {multiple}{in_pixels}, "
                f"found {list(sample.shape[2:])}: the UNet halves them, and the engine pads nothing"
            )
        wrong = {name: len(value) for name, value in feeds.items() if len(value) != batch}
        if wrong:
            raise InputError(f"expected a batch of {batch}, as in sample; found {wrong}")
        outputs = self._runner.infer(
            {name: np.asarray(value, np.float32) for name, value in feeds.items()}
        )
        return next(iter(outputs.values()))

    def _check(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        """Raise InputError where the engine has other inputs."""
        if self._inputs is None:
            return
        for names, problem in (
            (self._inputs.keys() - feeds.keys(), "expected too"),
            (feeds.keys() - self._inputs.keys(), "which the engine does not take"),
        ):
            if names:
                raise InputError(
                    f"{', '.join(sorted(names))}: {problem}; its inputs are "
                    f"{', '.join(self._inputs)}"
                )
        for name, sizes in self._inputs.items():
            found = list(np.shape(feeds[name]))
            fits = (size in (None, n) for size, n in zip(sizes, found, strict=False))
            if len(sizes) != len(found) or not all(fits):
                expected = ", ".join("any" if size is None else str(size) for size in sizes)
                raise InputError(
                    f"{name}: expected [{expected}], found {found}; an engine takes the channels "
                    "of its model, and TensorRT's, or one of a graph that an earlier version "
                    "exported, its tokens: shorten a longer prompt, or export and build again for "
                    "openvino or onnxruntime"
                )

    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """The same on torch tensors: a :class:`quest_deploy.evaluation.sampling.Denoiser`."""
        import torch

        # NumPy has no bfloat16.
        arrays = {name: value.float().numpy(force=True) for name, value in conditions.items()}
        rows, steps = (value.float().numpy(force=True) for value in (sample, timestep))
        return torch.from_numpy(self.predict(rows, steps, **arrays))

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Raise InputError: the runtime's memory cannot be copied."""
        raise InputError(
            "an open engine cannot be copied or pickled (copy.deepcopy, pickle, torch.save): share "
            "it, as type(pipeline)(**pipeline.components) does, or open it once more, also in "
            "another process, with quest_deploy.load_pipeline or EngineUNet.load"
        )

    def __enter__(self) -> EngineUNet:
        return self

    def __exit__(self, *exception: object) -> None:
        self._runner.close()
