"""A text-to-image package with low-precision inputs and outputs and tight limits, on a real Triton
server.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quest_deploy.serving.client import request_image
from quest_deploy.serving.triton.layout import MODELS
from quest_deploy.serving.triton.pbtxt import pbtxt
from quest_deploy.serving.triton.server import PackageServer, missing_server
from scripts.bench import bench_serving as script
from tests.helpers import assert_holds
from tests.pipelines import TOKENS
from tests.quest_deploy.serving.local import LocalPipeline
from tests.quest_deploy.support import Chain, cli

grpc = pytest.importorskip("tritonclient.grpc")
REASON = missing_server()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

LIMITS = {
    "--max-images": "1",
    "--max-in-flight": "1",
    "--max-queue": "2",
    "--max-size": "32",
    "--io-dtype": "fp16",
}
KINDS = {
    "prompt": "BYTES",
    "negative_prompt": "BYTES",
    "seed": "INT64",
    "steps": "INT32",
    "height": "INT32",
    "guidance": "FP32",
}
TYPES = {"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}


@pytest.fixture(scope="module")
def server(text_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackageServer]:
    """The small text-to-image pipeline, served; its UNet configured as that of a plan for two
    sizes.
    """
    folder = tmp_path_factory.mktemp("triton")
    options = [text for option in LIMITS.items() for text in option]
    ended = cli("package", "--triton", folder / "package", "-w", text_chain.root, *options)
    assert ended.code == 0, ended.err
    with (folder / "package" / MODELS / "unet" / "config.pbtxt").open("a") as config:
        config.write(pbtxt({"instance_group": [{"profile": ["0", "1"]}]}))
    with PackageServer(folder / "package", folder / "server.log") as made:
        yield made


def draw(server: PackageServer, **request: Any) -> np.ndarray:
    """The image that ``pipeline`` draws, uint8 [H, W, C], over a connection of its own."""
    inputs = []
    for name, value in request.items():
        inputs.append(grpc.InferInput(name, [1, 1], KINDS[name]))
        inputs[-1].set_data_from_numpy(np.asarray([[value]], TYPES[KINDS[name]]))
    with grpc.InferenceServerClient(server.grpc) as client:
        wanted = [grpc.InferRequestedOutput("pixels")]
        pixels: np.ndarray = client.infer("pipeline", inputs, outputs=wanted).as_numpy("pixels")[0]
        return pixels


@pytest.mark.parametrize(
    "choices",
    [{"guidance": 7.5, "negative_prompt": "blue"}, {"guidance": 1.0, "height": 32}],
    ids=["guidance", "another size"],
)
def test_low_precision_ends_round_what_the_models_are_given_and_give_and_nothing_else(
    server: PackageServer, choices: dict[str, Any]
) -> None:
    request = {"prompt": "a red cat", "steps": 3, "seed": 5, **choices}
    expected = LocalPipeline(server.package, half=True).draw(**request)
    np.testing.assert_array_equal(draw(server, **request), expected)


@pytest.mark.parametrize(
    ("request_", "facts"),
    [
        ({"prompt": "red " * TOKENS}, f"prompt {TOKENS}"),
        ({"prompt": "red", "height": 48}, "height 2 32 48"),
    ],
)
def test_an_over_long_prompt_or_a_large_image_is_refused(
    server: PackageServer, request_: dict[str, Any], facts: str
) -> None:
    with pytest.raises(grpc.InferenceServerException) as refused:
        draw(server, **request_)
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert_holds(refused.value.message(), *facts.split())
    assert draw(server, prompt="red", steps=1).shape == (16, 16, 3)


def test_more_requests_than_may_wait_are_refused_as_unavailable_the_others_are_drawn_and_the_probe_passes(
    server: PackageServer,
) -> None:
    probe = [
        sys.executable,
        server.package / "health.py",
        f"http://{server.http}",
        "--timeout",
        "60",
    ]

    def one(seed: int) -> str:
        try:
            draw(server, prompt="red", steps=100, seed=seed)
        except grpc.InferenceServerException as e:
            return str(e.status())
        return "drawn"

    with ThreadPoolExecutor(12) as threads:
        asked = [threads.submit(one, seed) for seed in range(12)]
        assert subprocess.run(probe, check=False).returncode == 0
        outcomes = [each.result() for each in asked]
    assert set(outcomes) == {"drawn", "StatusCode.UNAVAILABLE"}
    assert draw(server, prompt="red", steps=1).shape == (16, 16, 3)


def test_for_a_gpu_the_repository_lacks_nothing_but_triton_s_tensorrt_backend(
    server: PackageServer, tmp_path: Path
) -> None:
    copy = tmp_path / "package"
    shutil.copytree(server.package, copy)
    config = copy / MODELS / "broken" / "config.pbtxt"
    (config.parent / "1").mkdir(parents=True)  # without a file, which serve.py would refuse
    unet = (copy / MODELS / "unet" / "config.pbtxt").read_text()
    config.write_text(
        unet.replace('name: "unet"', 'name: "broken"').replace(
            "dims: [4, -1, -1]", "dims: [4, 0, -1]"
        )
    )
    said = {}
    with (
        PackageServer(
            copy, tmp_path / "server.log", cpu=False, options=["--model-control-mode=explicit"]
        ) as other,
        grpc.InferenceServerClient(other.grpc) as client,
    ):
        for model in ("unet", "text_encoder", "vae_decoder", "broken"):
            with pytest.raises(grpc.InferenceServerException) as refused:
                client.load_model(model)
            said[model] = refused.value.message()
    missing = {
        model
        for model, message in said.items()
        if "unable to find backend library for backend 'tensorrt'" in message
    }
    assert missing == {"unet", "text_encoder", "vae_decoder"}, said


def test_the_client_draws_a_prompt(server: PackageServer, tmp_path: Path) -> None:
    drawn = request_image(server.grpc, {"prompt": "a red cat", "steps": 2, "seed": 1})
    ended = cli(
        *("client", server.grpc, "--prompt", "a red cat", "--steps", "2", "--seed", "1"),
        *("-o", tmp_path / "cat.png"),
    )
    assert ended.code == 0, ended.err
    assert (tmp_path / "cat.png").read_bytes() == drawn.png


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_load_benchmark_counts_images_wrong_ones_and_memory(
    server: PackageServer, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "REQUESTS", 6)
    expected = script.alone(server)
    run = script.ask(server, protocol, 2, 1.0, expected, watch=True)
    assert len(run.latencies) >= 2
    assert (run.wrong, run.errors.total()) == (0, 0)
    assert set(run.memory[0][1]) == {
        "tritonserver",
        "unet",
        "pipeline",
        "pipeline_stream",
        "text_encoder",
        "vae_decoder",
        "shared memory",
    }
    assert all(size > 2**20 for size in run.memory[0][1].values())
    wrong = script.ask(server, protocol, 2, 0.5, [1 - image for image in expected])
    assert wrong.wrong == len(wrong.latencies) > 0
    page = script.table(
        {
            "scheme": "w4a4",
            "note": "",
            "throughput": [],
            "load": [script.summary(protocol, wrong)],
            "processor": "a processor",
            "cores": 2,
            "date": "2026-11-21",
            "versions": {},
        }
    )
    assert f"| {wrong.wrong} |" in page
