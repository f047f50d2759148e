"""The bucket-aware runtime: an engine that is called like the UNet it replaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quest_deploy.artifacts.workspace import ENGINES
from quest_deploy.backends.base import engine_info, open_engine
from quest_deploy.backends.registry import get_backend
from quest_deploy.errors import InputError

if TYPE_CHECKING:
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

    def __init__(self, runner: Runner, sample_multiple: int = 1) -> None:
        """Run with ``runner`` on samples whose height and width are multiples of
        ``sample_multiple``.
        """
        self._runner = runner
        self.sample_multiple = sample_multiple

    @classmethod
    def load(cls, workspace: Workspace, backend: str) -> EngineUNet:
        """Open a workspace's engine, its record and its files checked; raise InputError where there
        is none that can run here.
        """
        workspace.require(f"build-engine/{backend}")
        folder = workspace.path(ENGINES, backend)
        return cls(open_engine(get_backend(backend), folder), engine_info(folder).sample_multiple)

    def predict(
        self, sample: NDArray[Any], timestep: NDArray[Any] | float, **conditions: NDArray[Any]
    ) -> NDArray[np.float32]:
        """Run the engine once.

        Args:
            sample: [B, ...], any float dtype.
            timestep: [B], or one number for the whole batch; integers and floats alike.
            conditions: each [B, ...].

        Raises:
            InputError: batch sizes that differ, or a height or width that the UNet cannot halve as
                often as it does.
        """
        if any(size % self.sample_multiple for size in sample.shape[2:]):
            raise InputError(
                f"expected samples whose height and width are multiples of {self.sample_multiple}, "
                f"found {list(sample.shape[2:])}"
            )
        batch = len(sample)
        steps = np.asarray(timestep, np.float32)
        steps = np.full(batch, steps) if steps.ndim == 0 else steps
        feeds = {"sample": sample, "timestep": steps, **conditions}
        wrong = {name: len(value) for name, value in feeds.items() if len(value) != batch}
        if wrong:
            raise InputError(f"expected a batch of {batch}, as in sample; found {wrong}")
        outputs = self._runner.infer(
            {name: np.asarray(value, np.float32) for name, value in feeds.items()}
        )
        return next(iter(outputs.values()))

    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """The same on torch tensors: a :class:`quest_deploy.evaluation.sampling.Denoiser`."""
        import torch

        arrays = {name: value.numpy(force=True) for name, value in conditions.items()}
        return torch.from_numpy(
            self.predict(sample.numpy(force=True), timestep.numpy(force=True), **arrays)
        )

    def __enter__(self) -> EngineUNet:
        return self

    def __exit__(self, *exception: object) -> None:
        self._runner.close()
