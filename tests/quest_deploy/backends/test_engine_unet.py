from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.backends.base import Runner, engine_info, open_engine
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.backends.registry import get_backend
from tests.helpers import refused

SAMPLE = np.arange(24.0).reshape(3, 2, 2, 2)


class Recorder(Runner):
    """A runner that keeps its feeds and answers the sample plus the timestep."""

    def __init__(self) -> None:
        self.feeds: dict[str, NDArray[Any]] = {}
        self.closed = False

    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.feeds = feeds
        return {"out_sample": feeds["sample"] + feeds["timestep"].reshape(-1, 1, 1, 1)}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def runner() -> Recorder:
    return Recorder()


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [
        (501, [501, 501, 501]),
        (0.5, [0.5, 0.5, 0.5]),
        (np.int64(7), [7, 7, 7]),
        (np.asarray(3.0), [3, 3, 3]),
        (np.asarray([1, 2, 999]), [1, 2, 999]),
        (np.asarray([1.5, 2.5, 3.5]), [1.5, 2.5, 3.5]),
    ],
)
def test_any_number_or_vector_of_numbers_is_a_float32_timestep_for_each_sample(
    runner: Recorder, timestep: Any, expected: list[float]
) -> None:
    EngineUNet(runner).predict(SAMPLE, timestep)
    assert runner.feeds["timestep"].dtype == np.float32
    np.testing.assert_array_equal(runner.feeds["timestep"], expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_inputs_of_any_type_reach_the_engine_as_float32(runner: Recorder, dtype: Any) -> None:
    output = EngineUNet(runner).predict(SAMPLE.astype(dtype), 1, tokens=np.ones((3, 4), dtype))
    assert {value.dtype for value in runner.feeds.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(output, SAMPLE + 1)


@pytest.mark.parametrize(
    ("timestep", "tokens", "named"),
    [([1.0, 2.0], 3, "timestep"), ([1.0], 3, "timestep"), (1.0, 2, "tokens")],
)
def test_batch_sizes_that_differ_are_refused_by_name(
    runner: Recorder, timestep: Any, tokens: int, named: str
) -> None:
    with refused(3, "sample", named):
        EngineUNet(runner).predict(SAMPLE, np.asarray(timestep), tokens=np.ones((tokens, 4)))


@pytest.mark.parametrize("shape", [(3, 2, 6, 4), (3, 2, 4, 2)])
def test_sizes_that_the_model_cannot_halve_as_often_as_it_does_are_refused(
    runner: Recorder, shape: tuple[int, ...]
) -> None:
    unet = EngineUNet(runner, sample_multiple=4)
    with refused(4, list(shape[2:])):
        unet.predict(np.zeros(shape), 1)
    assert not runner.feeds
    assert unet.predict(np.zeros((3, 2, 4, 8)), 1).shape == (3, 2, 4, 8)


def test_an_engine_knows_what_sizes_its_model_takes(
    mini_engines: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = mini_engines("onnxruntime")
    assert engine_info(folder).sample_multiple == 1


def test_it_takes_and_gives_torch_tensors_as_a_denoiser(runner: Recorder) -> None:
    sample = torch.from_numpy(SAMPLE).float()
    output = EngineUNet(runner)(sample, torch.tensor(5).expand(3), tokens=torch.ones(3, 4))
    assert torch.equal(output, sample + 5)


def test_leaving_the_context_closes_the_engine(runner: Recorder) -> None:
    with EngineUNet(runner) as unet:
        assert not runner.closed
        assert unet.predict(SAMPLE, 1).shape == SAMPLE.shape
    assert runner.closed


def test_a_scalar_timestep_equals_the_same_one_for_every_sample(
    mini_engines: Callable[[str], Path],
) -> None:
    generator = np.random.default_rng(0)
    sample, tokens = generator.standard_normal((3, 2, 4, 4)), generator.standard_normal((3, 3, 8))
    with EngineUNet(open_engine(get_backend("onnxruntime"), mini_engines("onnxruntime"))) as unet:
        one = unet.predict(sample, 400, encoder_hidden_states=tokens)
        each = unet.predict(sample, np.full(3, 400.0), encoder_hidden_states=tokens)
    np.testing.assert_array_equal(one, each)


def test_loading_an_engine_that_was_never_built_names_the_command(tmp_path: Path) -> None:
    workspace = Workspace.create(tmp_path / "ws", "emoji", Scheme.parse("w4a4"))
    with refused("quest-deploy build-engine --backend openvino"):
        EngineUNet.load(workspace, "openvino")
