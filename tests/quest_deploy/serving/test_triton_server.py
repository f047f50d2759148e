"""A package of a class-conditional model on a real Triton server: batches across denoising steps,
requests, failures.
"""

from __future__ import annotations

import importlib.util
import marshal
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.evaluation.sampling import sample_images
from quest_deploy.models.loading import load_model
from quest_deploy.serving.client import request_image
from quest_deploy.serving.triton.layout import MODELS
from quest_deploy.serving.triton.server import PackageServer, missing_server
from tests.helpers import assert_holds
from tests.pipelines import CLASSES
from tests.quest_deploy.support import Chain, cli

grpc = pytest.importorskip("tritonclient.grpc")
http = pytest.importorskip("tritonclient.http")
REASON = missing_server()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

KINDS = {
    "label": "INT32",
    "seed": "INT64",
    "steps": "INT32",
    "scheduler": "BYTES",
    "guidance": "FP32",
    "width": "INT32",
}
TYPES = {"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
SCHEDULERS = ("ddim", "euler", "dpm++", "unipc", "ddpm", "lcm", "pndm")
TOGETHER = 14
MAX_STEPS = 800
ANSWER_SECONDS = 60.0
"""However busy the machine, an image or an error comes within it."""


@pytest.fixture(scope="module")
def package(label_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its package; not to be changed."""
    folder = tmp_path_factory.mktemp("triton") / "package"
    ended = cli(
        *("package", "--triton", folder, "-w", label_chain.root, "--max-steps", MAX_STEPS),
        *("--max-images", "2", "--json"),
    )
    assert ended.code == 0, ended.err
    assert ended.json["models"] == ["unet"]
    return folder


def plant_bytecode(package: Path, mark: Path) -> None:
    """Put bytecode beside each of the package's modules that leaves ``mark`` when it is run and
    does not look at its source.
    """
    code = compile(f"open({str(mark)!r}, 'w').close()\n", "planted", "exec")
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8)
    modules = [*(package / "models").rglob("*.py"), *(package / "backends_cpu").rglob("*.py")]
    assert len(modules) > 2
    for module in modules:
        planted = Path(importlib.util.cache_from_source(module))
        planted.parent.mkdir(exist_ok=True)
        planted.write_bytes(header + marshal.dumps(code))


def test_bytecode_that_was_planted_in_a_package_is_not_run(
    client: Any, server: PackageServer
) -> None:
    assert draw(client, **some_requests()[0]).size
    assert not server.log.with_name("mark").exists()


@pytest.fixture(scope="module")
def server(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackageServer]:
    """It, served, after somebody planted bytecode in it."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    plant_bytecode(package, log.with_name("mark"))
    with PackageServer(package, log) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: PackageServer) -> Iterator[Any]:
    """A gRPC client of it."""
    with grpc.InferenceServerClient(server.grpc) as made:
        yield made


def tensors(library: Any, **request: Any) -> list[Any]:
    """The request as the inputs of ``library``, a client library of Triton's; a list has a row for
    each of its values.
    """
    found = []
    for name, value in request.items():
        array = np.asarray(
            value if isinstance(value, list) else [value], TYPES[KINDS[name]]
        ).reshape(-1, 1)
        found.append(library.InferInput(name, list(array.shape), KINDS[name]))
        found[-1].set_data_from_numpy(array)
    return found


def draw(client: Any, *, seconds: float = ANSWER_SECONDS, **request: Any) -> np.ndarray:
    """The image that ``pipeline`` draws, uint8 [H, W, C]."""
    wanted = [grpc.InferRequestedOutput("pixels")]
    result = client.infer(
        "pipeline", tensors(grpc, **request), outputs=wanted, client_timeout=seconds
    )
    pixels: np.ndarray = result.as_numpy("pixels")[0]
    return pixels


def batches(client: Any) -> tuple[int, int]:
    """How many rows, and in how many batches, the UNet has run."""
    statistics = client.get_inference_statistics("unet").model_stats[0]
    return statistics.inference_count, statistics.execution_count


def mean_batch(before: tuple[int, int], after: tuple[int, int]) -> float:
    """The mean number of rows of the batches between two counts."""
    return (after[0] - before[0]) / (after[1] - before[1])


def some_requests() -> list[dict[str, Any]]:
    """Requests that differ in everything: each scheduler twice, five to twenty steps, with and
    without guidance.
    """
    return [
        {
            "label": i % CLASSES,
            "seed": i,
            "steps": (5, 10, 20, 15)[i % 4],
            "scheduler": SCHEDULERS[i % len(SCHEDULERS)],
            "guidance": (1.0, 3.0)[i % 2],
        }
        for i in range(TOGETHER)
    ]


def test_images_drawn_together_across_steps_and_schedulers_equal_those_drawn_alone(
    server: PackageServer, client: Any
) -> None:
    requests = some_requests()
    start = batches(client)
    alone = [draw(client, **request) for request in requests]
    middle = batches(client)
    ready = threading.Barrier(TOGETHER)

    def one(request: dict[str, Any]) -> np.ndarray:
        with grpc.InferenceServerClient(server.grpc) as own:
            own.is_server_live()  # connected before the others start
            ready.wait()
            return draw(own, **request)

    with ThreadPoolExecutor(TOGETHER) as threads:
        together = list(threads.map(one, requests))
    end = batches(client)
    print(
        f"mean batch: {mean_batch(start, middle):.2f} rows alone, {mean_batch(middle, end):.2f} "
        "rows together"
    )
    assert [i for i in range(TOGETHER) if not np.array_equal(alone[i], together[i])] == []
    assert end[0] - middle[0] == middle[0] - start[0]
    assert mean_batch(middle, end) > mean_batch(
        start, middle
    )  # by how much depends on what else the machine does


@pytest.mark.parametrize(("scheduler", "guidance"), [("ddim", 1.0), ("ddpm", 3.0)])
def test_a_served_image_is_the_one_that_the_engine_draws_here(
    client: Any, label_chain: Chain, scheduler: str, guidance: float
) -> None:
    request = {"label": 4, "seed": 5, "steps": 6, "scheduler": scheduler, "guidance": guidance}
    with EngineUNet.load(Workspace.open(label_chain.root), "onnxruntime") as unet:
        expected = sample_images(
            load_model(Workspace.open(label_chain.root).source),
            unet,
            np.asarray([4]),
            scheduler=scheduler,
            steps=6,
            guidance=guidance,
            seed=5,
        )
    difference = draw(client, **request).astype(int) - np.round(
        (expected[0].transpose(1, 2, 0) + 1) * 127.5
    )
    assert np.abs(difference).max() <= 1  # halves of a level are rounded either way


def test_several_images_of_a_request_are_those_of_requests_of_their_own(client: Any) -> None:
    result = client.infer("pipeline", tensors(grpc, label=[3, 4], seed=[1, 2], steps=[3, 7]))
    for row, (label, seed, steps) in enumerate([(3, 1, 3), (4, 2, 7)]):
        np.testing.assert_array_equal(
            result.as_numpy("pixels")[row], draw(client, label=label, seed=seed, steps=steps)
        )
    assert result.as_numpy("seed").tolist() == [[1], [2]]
    assert all(bytes(file).startswith(b"\x89PNG") for file in result.as_numpy("image")[:, 0])


def test_without_a_seed_the_server_chooses_one_that_draws_the_image_again(client: Any) -> None:
    found = [client.infer("pipeline", tensors(grpc, label=3, steps=2)) for _ in range(2)]
    seeds = [int(result.as_numpy("seed")[0, 0]) for result in found]
    assert seeds[0] != seeds[1]
    np.testing.assert_array_equal(
        draw(client, label=3, steps=2, seed=seeds[0]), found[0].as_numpy("pixels")[0]
    )


def half_typed(library: Any) -> list[Any]:
    """A label of the type of a float."""
    found = library.InferInput("label", [1, 1], "FP32")
    found.set_data_from_numpy(np.ones((1, 1), np.float32))
    return [found]


def flat(library: Any) -> list[Any]:
    """A label without its second dimension."""
    found = library.InferInput("label", [1], "INT32")
    found.set_data_from_numpy(np.ones(1, np.int32))
    return [found]


BAD = {
    "a label beyond the last": (lambda lib: tensors(lib, label=5), "label 0 4 5"),
    "a negative label": (lambda lib: tensors(lib, label=-1), "label 0 4 -1"),
    "no label": (lambda lib: tensors(lib, steps=2), "label 0 4"),
    "no steps": (
        lambda lib: tensors(lib, label=1, steps=0),
        f"steps 1 {MAX_STEPS} 0",
    ),
    "too many steps": (
        lambda lib: tensors(lib, label=1, steps=MAX_STEPS + 1),
        f"steps 1 {MAX_STEPS} {MAX_STEPS + 1}",
    ),
    "an unknown scheduler": (
        lambda lib: tensors(lib, label=1, scheduler="heun"),
        "scheduler ddim 'heun'",
    ),
    "a scheduler that is no text": (
        lambda lib: tensors(lib, label=1, scheduler=b"\xff"),
        "scheduler UTF-8",
    ),
    "a guidance that is no number": (
        lambda lib: tensors(lib, label=1, guidance=np.nan),
        "guidance 0 1000 nan",
    ),
    "a negative seed": (
        lambda lib: tensors(lib, label=1, seed=-1),
        "seed -1",
    ),
    "a size beyond the limit": (
        lambda lib: tensors(lib, label=1, width=1 << 20),
        f"width 1 8 {1 << 20}",
    ),
    "one bad row of two": (
        lambda lib: tensors(lib, label=[1, 11]),
        "2 label 0 4 11",
    ),
    "too many images": (lambda lib: tensors(lib, label=[1, 2, 3]), "batch-size must be <= 2"),
    "rows that do not match": (lambda lib: tensors(lib, label=[1, 2], steps=[3]), "batch"),
    "a wrong type": (half_typed, "FP32"),
    "a wrong shape": (flat, "shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason_and_the_server_goes_on(
    server: PackageServer, client: Any, case: str
) -> None:
    make, facts = BAD[case]
    with pytest.raises(grpc.InferenceServerException) as refused:
        client.infer("pipeline", make(grpc))
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert_holds(refused.value.message(), *facts.split())
    with (
        http.InferenceServerClient(server.http) as other,
        pytest.raises(http.InferenceServerException) as refused,
    ):
        other.infer("pipeline", make(http))
    assert refused.value.status() == "400"
    assert draw(client, label=1, steps=1).shape == (8, 8, 3)


def test_http_and_grpc_draw_the_same_image(server: PackageServer, client: Any) -> None:
    with http.InferenceServerClient(server.http) as other:
        found = other.infer("pipeline", tensors(http, label=2, seed=9, steps=4)).as_numpy("pixels")[
            0
        ]
    np.testing.assert_array_equal(found, draw(client, label=2, seed=9, steps=4))


def leave_stream(server: PackageServer, inputs: list[Any]) -> None:
    """Ask for an image with a message for every step, and go away after the first."""
    first = threading.Event()
    with grpc.InferenceServerClient(server.grpc) as own:
        own.start_stream(lambda result, error: first.set())
        own.async_stream_infer("pipeline_stream", inputs)
        assert first.wait(30)
        own.stop_stream(cancel_requests=True)


def leave_call(server: PackageServer, inputs: list[Any]) -> None:
    """Ask for an image and go away once it is being drawn."""
    with grpc.InferenceServerClient(server.grpc) as own:
        start = batches(own)[0]
        call = own.async_infer("pipeline", inputs, callback=lambda result, error: None)
        assert wait_for(lambda: batches(own)[0] > start)
        call.cancel()


@pytest.mark.parametrize("leave", [leave_stream, leave_call])
def test_a_client_that_goes_away_stops_its_request(
    server: PackageServer, client: Any, leave: Any
) -> None:
    start = batches(client)[0]
    leave(server, tensors(grpc, label=1, steps=MAX_STEPS, guidance=2.0, scheduler="pndm"))
    time.sleep(0.5)
    stopped = batches(client)[0]
    time.sleep(0.5)
    assert batches(client)[0] == stopped
    assert start < stopped < start + 2 * MAX_STEPS  # begun, and not come to its end
    assert draw(client, label=1, steps=1).shape == (8, 8, 3)


def test_the_client_command_draws_what_the_pipeline_draws_and_counts_every_step(
    server: PackageServer, client: Any, tmp_path: Path
) -> None:
    from PIL import Image

    told: list[tuple[int, int]] = []
    drawn = request_image(
        server.grpc,
        {"label": 4, "seed": 3, "steps": 5},
        lambda phase, done, total: told.append((done, total)),
    )
    assert told == [(i, 5) for i in range(1, 6)]
    picture = tmp_path / "four.png"
    ended = cli(
        *("client", server.grpc, "--label", "4", "--seed", "3", "--steps", "5", "-o", picture),
        "--json",
    )
    assert ended.code == 0, ended.err
    assert ended.json["seed"] == 3
    assert picture.read_bytes() == drawn.png
    np.testing.assert_array_equal(
        np.asarray(Image.open(picture)), draw(client, label=4, seed=3, steps=5)
    )


@pytest.mark.parametrize(
    ("options", "code", "facts"),
    [
        (["--label", "12"], 2, "label 0 4 12"),
        (["--prompt", "a cat"], 2, "--prompt label"),
        (["--label", str(1 << 40)], 2, "--label INT32"),
        (["--label", "1", "--scheduler", "heun"], 2, "scheduler 'heun' ddim"),
    ],
)
def test_the_client_command_says_why_the_server_refuses(
    server: PackageServer, tmp_path: Path, options: list[str], code: int, facts: str
) -> None:
    picture = tmp_path / "none.png"
    ended = cli("client", server.grpc, *options, "-o", picture)
    ended.assert_refused(*facts.split(), code=code)
    assert not picture.exists()


def test_the_readme_s_example_draws_an_image(server: PackageServer, tmp_path: Path) -> None:
    readme = (server.package / "README.md").read_text()
    example = re.search(r"^    import numpy as np\n(?:    .*\n|\n)*", readme, re.MULTILINE)
    assert example is not None
    code = "\n".join(line[4:] for line in example[0].splitlines()).replace(
        "127.0.0.1:8001", server.grpc
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert (tmp_path / "image.png").read_bytes().startswith(b"\x89PNG")


def health(server: PackageServer) -> subprocess.CompletedProcess[str]:
    """The package's probe."""
    probe = [
        sys.executable,
        server.package / "health.py",
        f"http://{server.http}",
        "--timeout",
        "20",
    ]
    return subprocess.run(probe, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "statuses"),
    [
        (
            "unet",
            {"StatusCode.INTERNAL", "StatusCode.UNAVAILABLE"},
        ),  # the pipeline waits no longer than its model_timeout
        (
            "pipeline",
            {"StatusCode.INTERNAL", "StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"},
        ),  # nobody is left to answer
    ],
)
def test_a_killed_process_fails_the_requests_under_way_is_noticed_and_leaves_nothing_behind(
    package: Path, tmp_path: Path, name: str, statuses: set[str]
) -> None:
    copy = tmp_path / "package"
    shutil.copytree(package, copy)
    config = copy / MODELS / "pipeline" / "config.pbtxt"
    config.write_text(config.read_text().replace('string_value: "600"', 'string_value: "5"'))
    with PackageServer(copy, tmp_path / "server.log") as server:
        assert health(server).returncode == 0
        processes = server.processes()
        assert set(processes) == {"tritonserver", "unet", "pipeline", "pipeline_stream"}
        killed = threading.Event()

        def outcome(seed: int) -> str:
            with grpc.InferenceServerClient(server.grpc) as own:
                try:
                    while (
                        not killed.is_set()
                    ):  # the last one is under way when the process is killed
                        draw(own, label=1, steps=MAX_STEPS, seed=seed, seconds=20.0)
                except grpc.InferenceServerException as e:
                    return str(e.status())
            return "drawn"

        with ThreadPoolExecutor(4) as threads, grpc.InferenceServerClient(server.grpc) as own:
            start = batches(own)[0]
            asked = [threads.submit(outcome, seed) for seed in range(4)]
            assert wait_for(lambda: batches(own)[0] > start)
            os.kill(processes[name], signal.SIGKILL)
            killed.set()
            outcomes = {each.result() for each in asked}
        assert outcomes <= statuses
        assert wait_for(lambda: health(server).returncode == 1)
        assert server.ready()  # which is why there is a probe
        os.kill(processes["tritonserver"], signal.SIGKILL)
        assert server.process.wait(20) == 128 + signal.SIGKILL
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes.values()))
    mine = f"quest-deploy-triton-{server.process.pid}-*"
    assert [*Path("/dev/shm").glob(mine), *Path(os.environ.get("TMPDIR", "/tmp")).glob(mine)] == []


def wait_for(condition: Any, seconds: float = 20.0) -> bool:
    """Whether ``condition`` comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
