"""Polygraphy runners: the fake-quantized model's saved outputs, and any engine that is open."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quest_deploy.backends.base import Runner

    Arrays = dict[str, NDArray[Any]]

G_LOGGER.module_severity = G_LOGGER.ERROR


class ReferenceRunner(BaseRunner):  # type: ignore[misc]
    """Answers with the saved outputs: the fake-quantized torch model, from files."""

    def __init__(self, feed: Arrays, outputs: Arrays) -> None:
        super().__init__(name="fake-quant")
        self._feed, self._outputs = feed, outputs

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _metadata(self._feed)

    def infer_impl(self, feed_dict: Arrays) -> Arrays:
        self.inference_time = 0.0
        return self._outputs


class EngineRunner(BaseRunner):  # type: ignore[misc]
    """Runs one of our engines (onnxruntime, openvino, TensorRT), which stays open: one engine
    answers record after record.
    """

    def __init__(self, name: str, runner: Runner, feed: Arrays) -> None:
        super().__init__(name=name)
        self._runner, self._feed = runner, feed

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _metadata(self._feed)

    def infer_impl(self, feed_dict: Arrays) -> Arrays:
        start = time.perf_counter()
        output = self._runner.infer(feed_dict)
        self.inference_time = time.perf_counter() - start
        return output


def compare(name: str, runner: Runner, feed: Arrays, expected: Arrays) -> tuple[Arrays, Arrays]:
    """Run ``feed`` through the engine and the reference under Polygraphy's Comparator: the engine's
    outputs and the reference's.

    The judgement is the caller's: what a mismatch means depends on how far its activation is from a
    rounding tie.
    """
    runners = [EngineRunner(name, runner, feed), ReferenceRunner(feed, expected)]
    ((mine,), (theirs,)) = Comparator.run(runners, data_loader=[feed]).values()
    return dict(mine), dict(theirs)


def _metadata(feed: Arrays) -> TensorMetadata:
    metadata = TensorMetadata()
    for name, value in feed.items():
        metadata.add(name, dtype=np.asarray(value).dtype, shape=(-1, *value.shape[1:]))
    return metadata
