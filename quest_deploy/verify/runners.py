"""Polygraphy runners: the fake-quantized model's saved outputs, and any engine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from quest_deploy.engine.base import Runner

    Arrays = dict[str, NDArray[Any]]

G_LOGGER.module_severity = G_LOGGER.ERROR


class ReferenceRunner(BaseRunner):  # type: ignore[misc]
    """Answers the i-th inference with the i-th saved output, whatever the feed: the fake-quantized torch model, from files."""

    def __init__(self, feeds: Sequence[Arrays], outputs: Sequence[Arrays]) -> None:
        super().__init__(name="fake-quant")
        self._feeds, self._outputs, self._next = feeds, outputs, 0

    def activate_impl(self) -> None:
        self._next = 0

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _metadata(self._feeds[0])

    def infer_impl(self, feed_dict: Arrays) -> Arrays:
        output = self._outputs[self._next]
        self._next += 1
        self.inference_time = 0.0
        return output


class EngineRunner(BaseRunner):  # type: ignore[misc]
    """Runs one of our engines (onnxruntime, openvino, TensorRT), opened when Polygraphy activates it."""

    def __init__(self, name: str, opened: Callable[[], Runner], feeds: Sequence[Arrays]) -> None:
        super().__init__(name=name)
        self._open, self._feeds = opened, feeds

    def activate_impl(self) -> None:
        self._runner = self._open()

    def deactivate_impl(self) -> None:
        self._runner.close()
        del self._runner

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _metadata(self._feeds[0])

    def infer_impl(self, feed_dict: Arrays) -> Arrays:
        start = time.perf_counter()
        output = self._runner.infer(feed_dict)
        self.inference_time = time.perf_counter() - start
        return output


def compare(
    name: str, opened: Callable[[], Runner], feeds: Sequence[Arrays], expected: Sequence[Arrays]
) -> list[tuple[Arrays, Arrays]]:
    """Run ``feeds`` through the engine and the reference under Polygraphy's Comparator: pairs of (engine's, reference's) outputs.

    The judgement is the caller's: what a mismatch means depends on how far its activation is from a rounding tie.
    """
    runners = [EngineRunner(name, opened, feeds), ReferenceRunner(feeds, expected)]
    engine, reference = Comparator.run(runners, data_loader=list(feeds)).values()
    return [(dict(mine), dict(theirs)) for mine, theirs in zip(engine, reference, strict=True)]


def _metadata(feed: Arrays) -> TensorMetadata:
    metadata = TensorMetadata()
    for name, value in feed.items():
        metadata.add(name, dtype=np.asarray(value).dtype, shape=(-1, *value.shape[1:]))
    return metadata
