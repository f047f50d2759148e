"""The bucket-aware runtime: an engine that is called like the UNet it replaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quest_deploy.artifacts.workspace import ENGINES
from quest_deploy.backends.base import (
    ENGINE_FILE,
    LOWERED,
    OpenEngine,
    check_sizes,
    engine_info,
    open_engine,
)
from quest_deploy.backends.registry import get_backend
from quest_deploy.errors import InputError
from quest_deploy.models.residuals import check_image_prompt

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir
    from numpy.typing import NDArray
    from torch import Tensor

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.backends.base import Runner

_OF_INPUTS = (
    "an engine takes the channels of its model, and TensorRT's, or one of a graph that an earlier "
    "version exported, its tokens: shorten a longer prompt, or export and build again for openvino "
    "or onnxruntime"
)
_OF_ADDED = "what is added has the channels of the engine's UNet and the sizes of its sample"


class EngineUNet(OpenEngine):
    """Predicts with an engine; each sample of a batch may be at a timestep of its own.

    >>> with EngineUNet.load(workspace, "openvino") as unet:            # doctest: +SKIP
    ...     epsilon = unet.predict(sample, 501, encoder_hidden_states=tokens)
    """

    openers = "quest_deploy.load_pipeline or EngineUNet.load"

    def __init__(
        self,
        runner: Runner,
        sample_multiple: int = 1,
        inputs: Mapping[str, tuple[int | None, ...]] | None = None,
        added: Mapping[str, int] | None = None,
    ) -> None:
        """Run with ``runner`` on samples whose height and width are multiples of
        ``sample_multiple``.

        Args:
            inputs: the shapes of the engine's inputs, by name, None for what may vary; they are
                not checked where it is None.
            added: the inputs that are zeros where they are not given, and what the sample's height
                and width are divided by in each.
        """
        self._runner = runner
        self.sample_multiple = sample_multiple
        self.pixels_per_latent = 1  # a pipeline's decoder says otherwise
        self._inputs = inputs
        self.added = dict(added or {})

    @classmethod
    def of_graph(cls, runner: Runner, sample_multiple: int, graph: ir.Model) -> EngineUNet:
        """Run with ``runner``, whose inputs are those of its lowered ``graph``,
        of which the signature is enough."""
        from exporters.graph_info import added_inputs, input_sizes, size_divisors

        divisors = size_divisors(graph)
        added = {name: divisors.get(name, 1) for name in added_inputs(graph)}
        return cls(runner, sample_multiple, input_sizes(graph), added)

    @classmethod
    def load(cls, workspace: Workspace, backend: str) -> EngineUNet:
        """Open a workspace's engine, its record and its files checked; raise InputError where there
        is none that can run here.
        """
        from exporters.graph_info import load_signature

        workspace.require_recorded(f"build-engine/{backend}", f"{ENGINES}/{backend}/{ENGINE_FILE}")
        folder = workspace.path(ENGINES, backend)
        runner = open_engine(get_backend(backend), folder)
        graph = load_signature(folder / LOWERED)
        return cls.of_graph(runner, engine_info(folder).sample_multiple, graph)

    def predict(
        self, sample: NDArray[Any], timestep: NDArray[Any] | float, **conditions: NDArray[Any]
    ) -> NDArray[np.float32]:
        """Run the engine once.

        Args:
            sample: [B, ...], any float dtype.
            timestep: [B], or one number for the whole batch; integers and floats alike.
            conditions: each [B, ...]; one of ``added`` that is not given is zeros, and of an
                IP-Adapter's two both or neither are given.

        Raises:
            InputError: an input that is missing, unknown or of another shape than the engine's;
                batch sizes that differ; or a height or width that the UNet cannot halve as often
                as it does.
        """
        batch = len(sample)
        steps = np.asarray(timestep, np.float32)
        steps = np.full(batch, steps) if steps.ndim == 0 else steps
        feeds = {"sample": sample, "timestep": steps, **conditions}
        if any(size % self.sample_multiple for size in sample.shape[2:]):
            multiple, factor = self.sample_multiple, self.pixels_per_latent
            in_pixels = "" if factor == 1 else f" (images: of {multiple * factor} pixels)"
            raise InputError(
                f"expected samples whose height and width are multiples of {multiple}{in_pixels}, "
                f"found {list(sample.shape[2:])}: the network divides them, and the engine pads "
                "nothing"
            )
        self._check(feeds)
        check_image_prompt(feeds)
        feeds |= {
            name: np.zeros((batch, *self._sizes(name, sample)[1:]), np.float32)
            for name in self.added.keys() - feeds.keys()
        }
        wrong = {name: len(value) for name, value in feeds.items() if len(value) != batch}
        if wrong:
            raise InputError(f"expected a batch of {batch}, as in sample; found {wrong}")
        outputs = self._runner.infer(
            {name: np.asarray(value, np.float32) for name, value in feeds.items()}
        )
        return next(iter(outputs.values()))

    def _sizes(self, name: str, sample: NDArray[Any]) -> tuple[Any, ...]:
        """The sizes of an input, None for what may vary; of what is added, those beside
        ``sample``.
        """
        sizes, divisor = (self._inputs or {})[name], self.added.get(name)
        if divisor is None:
            return sizes
        sides = [n // divisor for n in sample.shape]
        return (None, *(x or side for x, side in zip(sizes[1:], sides[1:], strict=False)))

    def _check(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        """Raise InputError where the engine has other inputs."""
        if self._inputs is None:
            return
        for names, problem in (
            (self._inputs.keys() - self.added.keys() - feeds.keys(), "expected too"),
            (feeds.keys() - self._inputs.keys(), "which the engine does not take"),
        ):
            if names:
                raise InputError(
                    f"{', '.join(sorted(names))}: {problem}; its inputs are "
                    f"{', '.join(self._inputs)}"
                )
        # The sample comes before what is added, whose sizes it says.
        for name in sorted(filter(feeds.__contains__, self._inputs), key=self.added.__contains__):
            hint = _OF_ADDED if name in self.added else _OF_INPUTS
            sizes = self._sizes(name, feeds["sample"])
            check_sizes(name, sizes, np.shape(feeds[name]), f"; {hint}")

    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """The same on torch tensors: a :class:`quest_deploy.evaluation.sampling.Denoiser`."""
        import torch

        # NumPy has no bfloat16.
        arrays = {name: value.float().numpy(force=True) for name, value in conditions.items()}
        rows, steps = (value.float().numpy(force=True) for value in (sample, timestep))
        return torch.from_numpy(self.predict(rows, steps, **arrays))
