"""Packages of diffusion transformers on a real Triton server: batches across denoising steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quest_deploy.serving.triton.server import PackageServer, missing_server
from tests.quest_deploy.serving.local import LocalPipeline
from tests.quest_deploy.support import cli

grpc = pytest.importorskip("tritonclient.grpc")
REASON = missing_server()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

KINDS = {
    "prompt": "BYTES",
    "negative_prompt": "BYTES",
    "scheduler": "BYTES",
    "label": "INT32",
    "seed": "INT64",
    "steps": "INT32",
    "height": "INT32",
    "guidance": "FP32",
}
TYPES = {"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "pixart": [
        {"prompt": "a red cat", "steps": 5, "scheduler": "dpm++", "guidance": 4.5},
        {"prompt": "photo of a house", "steps": 9, "scheduler": "ddim", "guidance": 1.0},
        {"prompt": "blue", "negative_prompt": "red", "steps": 12, "scheduler": "euler"},
        {"prompt": "a cat", "steps": 7, "scheduler": "unipc", "height": 32},
    ],
    "sd3": [
        {"prompt": "a red cat", "steps": 5, "scheduler": "euler", "guidance": 7.0},
        {"prompt": "photo of a house", "steps": 9, "scheduler": "dpm++", "guidance": 1.0},
        {"prompt": "blue", "negative_prompt": "red", "steps": 12, "scheduler": "unipc"},
    ],
    "flux": [
        {"prompt": "a red cat", "steps": 5, "scheduler": "euler", "guidance": 3.3},
        {"prompt": "photo of a house", "steps": 9, "scheduler": "unipc", "guidance": 1.0},
        {"prompt": "blue", "steps": 12, "scheduler": "euler", "height": 32},
    ],
    "sana": [
        {"prompt": "a red cat", "steps": 5, "scheduler": "dpm++", "guidance": 4.5},
        {"prompt": "blue", "negative_prompt": "red", "steps": 9, "scheduler": "euler"},
    ],
    "dit": [
        {"label": 207, "steps": 5, "scheduler": "ddim", "guidance": 4.0},
        {"label": 3, "steps": 9, "scheduler": "euler", "guidance": 1.0},
    ],
}
"""By a pipeline's name, requests that differ in all that they can."""
TOGETHER = 12


@pytest.fixture(scope="module", params=REQUESTS)
def served(
    request: pytest.FixtureRequest,
    pipelines: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, PackageServer]]:
    """A pipeline's name, and its package, served."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    root, package = folder / "workspace", folder / "package"
    few = ("--bits", "w4a8", "--samples", "1", "--steps", "4", "--buckets", "4")
    for command, *options in (
        ("calibrate", "--model", pipelines(name), *few),
        ("export",),
        ("package", "--triton", package, "--max-size", "32"),
    ):
        ended = cli(command, "-w", root, *options)
        assert ended.code == 0, ended.err
    with PackageServer(package, folder / "server.log") as made:
        yield name, made


def draw(server: PackageServer, ready: threading.Barrier | None, given: dict[str, Any]) -> Any:
    """The image that ``pipeline`` draws, over a connection of its own."""
    inputs = []
    for name, value in given.items():
        inputs.append(grpc.InferInput(name, [1, 1], KINDS[name]))
        inputs[-1].set_data_from_numpy(np.asarray([[value]], TYPES[KINDS[name]]))
    with grpc.InferenceServerClient(server.grpc) as client:
        client.is_server_live()  # connected before the others start
        if ready is not None:
            ready.wait()
        wanted = [grpc.InferRequestedOutput("pixels")]
        return client.infer("pipeline", inputs, outputs=wanted).as_numpy("pixels")[0]


def test_images_drawn_together_across_steps_and_schedulers_equal_those_drawn_alone_and_here(
    served: tuple[str, PackageServer],
) -> None:
    name, server = served
    repeated = REQUESTS[name] * (TOGETHER // len(REQUESTS[name]))
    requests = [{**each, "seed": i} for i, each in enumerate(repeated)]

    def batches() -> tuple[int, int]:
        with grpc.InferenceServerClient(server.grpc) as client:
            statistics = client.get_inference_statistics("transformer").model_stats[0]
        return statistics.inference_count, statistics.execution_count

    start = batches()
    alone = [draw(server, None, request) for request in requests]
    middle = batches()
    ready = threading.Barrier(len(requests))
    with ThreadPoolExecutor(len(requests)) as threads:
        together = list(threads.map(lambda request: draw(server, ready, request), requests))
    end = batches()
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    rows = middle[0] - start[0]
    assert end[0] - middle[0] == rows
    assert end[1] - middle[1] < middle[1] - start[1]  # larger batches
    np.testing.assert_array_equal(LocalPipeline(server.package).draw(**requests[0]), alone[0])


@pytest.mark.parametrize("served", ["sd3"], indirect=True)
def test_images_that_the_network_has_no_positions_for_are_refused_when_a_package_is_made(
    served: tuple[str, PackageServer], tmp_path: Path
) -> None:
    root = served[1].package.with_name("workspace")
    made = cli("package", "-w", root, "--triton", tmp_path / "large", "--max-size", "64")
    made.assert_refused("--max-size", "48")
    assert not (tmp_path / "large").exists()
