"""Hostile requests to a served package, beside honest ones: every honest image is the one drawn
alone, the server keeps its memory and its processes, and goes on.

A minute here; `make soak MINUTES=10` takes longer.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quest_deploy.serving.triton.server import PackageServer, missing_server
from tests.quest_deploy.support import Chain, cli

grpc = pytest.importorskip("grpc")
triton = pytest.importorskip("tritonclient.grpc")
REASON = missing_server()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

Tensor = tuple[str, str, list[int], bytes]
"""Name, type, shape and content of an input, as the protocol has it."""
Outcome = tuple[str, str]
"""What was tried and how it ended."""
MINUTES = float(os.environ.get("SOAK_MINUTES", "1"))
HONEST, HOSTILE = 3, 3
"""How many clients of each kind."""
MAX_STEPS, MAX_IMAGES, MAX_SIZE, IN_FLIGHT = 40, 2, 32, 16
CALL_SECONDS, SAMPLE_SECONDS = 60.0, 2.0
WARM = 0.3
"""The part of the time, at its start, in which memory may grow: pools and caches fill."""
MOST_GROWTH = 0.05 if MINUTES >= 10 else 0.2
"""By which part of itself memory may grow in the rest, by the fitted line. Pools fill for some three
minutes (633 to 771 MB in the last soak): one minute shows a leak of whole requests, ten a small one.
"""
KINDS = {
    "prompt": ("BYTES", np.object_),
    "negative_prompt": ("BYTES", np.object_),
    "scheduler": ("BYTES", np.object_),
    "seed": ("INT64", np.int64),
    "steps": ("INT32", np.int32),
    "height": ("INT32", np.int32),
    "width": ("INT32", np.int32),
    "guidance": ("FP32", np.float32),
}
REFUSED, BUSY = "INVALID_ARGUMENT", "UNAVAILABLE"
KEY = "the key"
KEYED = f"quest-deploy-key: {KEY}"


@pytest.fixture(scope="module")
def server(text_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackageServer]:
    """The small text-to-image pipeline, served."""
    folder = tmp_path_factory.mktemp("hostile")
    limits = {
        "--max-steps": MAX_STEPS,
        "--max-images": MAX_IMAGES,
        "--max-size": MAX_SIZE,
        "--max-in-flight": IN_FLIGHT,
    }
    options = [str(word) for option in limits.items() for word in option]
    ended = cli("package", "--triton", folder / "package", "-w", text_chain.root, *options)
    assert ended.code == 0, ended.err
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUEST_DEPLOY_HTTP_KEY", KEY)
        with PackageServer(folder / "package", folder / "server.log") as made:
            yield made


def requests() -> list[dict[str, Any]]:
    """Honest requests."""
    return [
        {
            "prompt": ("a red cat", "photo of a house", "")[i % 3],
            "scheduler": ("ddim", "euler", "dpm++", "ddpm")[i % 4],
            "steps": (3, 5, 8)[i % 3],
            "guidance": (1.0, 3.0)[i % 2],
            "seed": i,
            **({"height": 32, "width": 16} if i % 5 == 0 else {}),
        }
        for i in range(12)
    ]


def tensor(name: str, *values: Any) -> Tensor:
    """An input of the pipeline with a row for each value."""
    kind, dtype = KINDS[name]
    if kind == "BYTES":
        texts = [x.encode() if isinstance(x, str) else x for x in values]
        content = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    else:
        content = np.asarray(values, dtype).tobytes()
    return name, kind, [len(values), 1], content


def floats(name: str, value: float, *shape: int) -> Tensor:
    """An input of one of the other models, of equal values."""
    return name, "FP32", list(shape), np.full(shape, value, np.float32).tobytes()


def infer(
    channel: Any, model: str, inputs: list[Tensor], *, outputs: tuple[str, ...] = ("pixels",)
) -> tuple[str, Any]:
    """The status that a request ends with, and the answer."""
    request = triton.service_pb2.ModelInferRequest(model_name=model)
    for name, kind, shape, content in inputs:
        request.inputs.add(name=name, datatype=kind, shape=shape)
        request.raw_input_contents.append(content)
    for name in outputs:
        request.outputs.add(name=name)
    try:
        stub = triton.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return "OK", stub.ModelInfer(request, timeout=CALL_SECONDS)
    except grpc.RpcError as e:
        return e.code().name, e.details()


def draw(channel: Any, request: dict[str, Any]) -> np.ndarray | None:
    """The image of an honest request; None where the server is busy.

    Raises:
        AssertionError: anything else came.
    """
    inputs = [tensor(name, value) for name, value in request.items()]
    status, answer = infer(channel, "pipeline", inputs)
    if status == BUSY:
        return None
    assert status == "OK", f"{status}: {answer}"
    shape = answer.outputs[0].shape
    return np.frombuffer(answer.raw_output_contents[0], np.uint8).reshape(shape)[0]


def body(request: dict[str, Any]) -> bytes:
    """The request as the JSON of HTTP's protocol."""
    inputs = [
        {"name": name, "shape": [1, 1], "datatype": KINDS[name][0], "data": [value]}
        for name, value in request.items()
    ]
    return json.dumps({"inputs": inputs, "outputs": [{"name": "pixels"}]}).encode()


def head(length: int, *more: str, path: str = "v2/models/pipeline/infer") -> bytes:
    """A request's first lines."""
    lines = [f"POST /{path} HTTP/1.1", "Host: x", f"Content-Length: {length}", *more, "", ""]
    return "\r\n".join(lines).encode()


def draw_over_http(server: PackageServer, request: dict[str, Any]) -> np.ndarray | None:
    """As :func:`draw`; raise HTTPError where anything else came."""
    url = f"http://{server.http}/v2/models/pipeline/infer"
    asked = urllib.request.Request(url, body(request), {"quest-deploy-key": KEY})
    try:
        with urllib.request.urlopen(asked, timeout=CALL_SECONDS) as answer:
            (pixels,) = json.load(answer)["outputs"]
    except urllib.error.HTTPError as e:
        if e.code == 503:
            return None
        raise
    return np.asarray(pixels["data"], np.uint8).reshape(pixels["shape"])[0]


def connect(server: PackageServer) -> socket.socket:
    host, port = server.http.split(":")
    return socket.create_connection((host, int(port)), timeout=CALL_SECONDS)


def answer_to(server: PackageServer, content: bytes, seconds: float = CALL_SECONDS) -> str:
    """The status that HTTP answers with, "closed" or, after so many seconds, "silent"."""
    with connect(server) as connection:
        connection.settimeout(seconds)
        try:
            connection.sendall(content)
            first = connection.recv(4096)
        except TimeoutError:
            return "silent"
        except OSError:
            return "closed"
    return first.split(b" ")[1].decode() if first.startswith(b"HTTP/") else "closed"


PROMPT = tensor("prompt", "a cat")
MANY = 100_000
BAD_VALUES: dict[str, list[Tensor]] = {
    "100,000 tokens": [tensor("prompt", "cat " * MANY)],
    "100,000 letters": [tensor("prompt", "x" * MANY)],
    "8 MB of prompt": [tensor("prompt", b"a" * (8 << 20))],
    "no UTF-8": [tensor("prompt", b"\xff\xfe")],
    "no prompt": [tensor("seed", 1)],
    "negative steps": [PROMPT, tensor("steps", -1)],
    "no steps": [PROMPT, tensor("steps", 0)],
    "the fewest steps": [PROMPT, tensor("steps", -(2**31))],
    "the most steps": [PROMPT, tensor("steps", 2**31 - 1)],
    "one step too many": [PROMPT, tensor("steps", MAX_STEPS + 1)],
    "guidance NaN": [PROMPT, tensor("guidance", np.nan)],
    "guidance infinite": [PROMPT, tensor("guidance", np.inf)],
    "guidance negative": [PROMPT, tensor("guidance", -1.0)],
    "guidance huge": [PROMPT, tensor("guidance", 3e38)],
    "a negative seed": [PROMPT, tensor("seed", -(2**63))],
    "a negative height": [PROMPT, tensor("height", -16)],
    "a huge width": [PROMPT, tensor("width", 2**31 - 1)],
    "an odd height": [PROMPT, tensor("height", 17)],
    "an unknown scheduler": [PROMPT, tensor("scheduler", "../" * 5000)],
    "a long negative prompt": [PROMPT, tensor("negative_prompt", "cat " * 5000)],
    "one bad row": [tensor("prompt", "a", "a"), tensor("steps", 2, -2)],
    "too many rows": [tensor("prompt", *["a"] * (MAX_IMAGES + 1))],
    "rows that differ": [tensor("prompt", "a", "a"), tensor("steps", 2)],
    "no rows": [("prompt", "BYTES", [0, 1], b"")],
    "a flat prompt": [("prompt", "BYTES", [1], PROMPT[3])],
    "a deep prompt": [("prompt", "BYTES", [1, 1, 1, 1], PROMPT[3])],
    "a negative shape": [("prompt", "BYTES", [-1, -1], PROMPT[3])],
    "a huge shape": [("prompt", "BYTES", [1 << 31, 1 << 31], PROMPT[3])],
    "fewer bytes than the shape": [PROMPT, ("steps", "INT32", [1, 1], b"\1")],
    "more bytes than the shape": [PROMPT, ("steps", "INT32", [1, 1], bytes(4096))],
    "a text longer than its bytes": [("prompt", "BYTES", [1, 1], b"\xff\xff\xff\x7fabc")],
    "a wrong type": [PROMPT, ("steps", "FP32", [1, 1], bytes(4))],
    "an unknown type": [PROMPT, ("steps", "FP12", [1, 1], bytes(4))],
    "an unknown input": [PROMPT, ("label", "INT32", [1, 1], bytes(4))],
    "an input twice": [PROMPT, PROMPT],
    "no inputs": [],
}
"""None of these may be drawn."""


def bad_value(server: PackageServer, channel: Any, rng: random.Random) -> Outcome:
    name = rng.choice(list(BAD_VALUES))
    status, details = infer(channel, "pipeline", BAD_VALUES[name])
    known = status in (REFUSED, BUSY) or (status == "INTERNAL" and "text" in name)
    return name, "refused" if known else f"{status}: {str(details)[:200]}"


def strange_numbers(server: PackageServer, channel: Any, rng: random.Random) -> Outcome:
    """NaN, infinite or absurd values to the models behind the pipeline, which nobody checks: they
    may answer anything, and meet honest rows in their batches.
    """
    value = rng.choice((np.nan, np.inf, -np.inf, 3e38, 1e-45))
    side = rng.choice((8, 8, 7, 16))
    rows = rng.choice((1, 2, 16, 17))
    unet = [
        floats("sample", value, rows, 4, side, side),
        floats("timestep", rng.choice((500.0, np.nan, -1.0, 1e30)), rows, 1),
        floats("encoder_hidden_states", rng.choice((0.0, value)), rows, 8, 16),
    ]
    words = np.full((rows, 8), rng.choice((0, -1, 10**6, 2**31 - 1)), np.int32)
    model, inputs = rng.choice(
        [
            ("unet", unet),
            ("vae_decoder", [floats("sample", value, rows, 4, side, side)]),
            ("text_encoder", [("input_ids", "INT32", [rows, 8], words.tobytes())]),
        ]
    )
    status, _ = infer(channel, model, inputs, outputs=())
    return f"{model}, strange numbers", status


def cancelled_call(server: PackageServer, channel: Any, rng: random.Random) -> Outcome:
    with triton.InferenceServerClient(server.grpc) as client:
        inputs = [PROMPT, tensor("steps", MAX_STEPS)]
        call = client.async_infer("pipeline", client_inputs(inputs), lambda result, error: None)
        time.sleep(rng.uniform(0, 0.2))
        call.cancel()
    return "a cancelled call", "left"


def client_inputs(inputs: list[Tensor]) -> list[Any]:
    found = []
    for name, kind, shape, content in inputs:
        found.append(triton.InferInput(name, shape, kind))
        value = content[4:] if kind == "BYTES" else np.frombuffer(content, KINDS[name][1])
        found[-1].set_data_from_numpy(np.asarray(value, KINDS[name][1]).reshape(shape))
    return found


def left_stream(server: PackageServer, channel: Any, rng: random.Random) -> Outcome:
    """A stream whose reader is slow, and leaves."""
    wait, cancel, first = rng.choice((0.0, 0.3)), rng.random() < 0.5, threading.Event()

    def read(result: Any, error: Any) -> None:
        first.set()
        time.sleep(wait)

    with triton.InferenceServerClient(server.grpc) as client:
        client.start_stream(read)
        client.async_stream_infer(
            "pipeline_stream", client_inputs([PROMPT, tensor("steps", MAX_STEPS)])
        )
        first.wait(CALL_SECONDS)
        client.stop_stream(cancel_requests=cancel)
    return f"a {'slow' if wait else 'quick'} stream", "cancelled" if cancel else "left"


KILLED = (
    "import socket, sys, time; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); "
    "s.sendall(sys.stdin.buffer.read()); print(flush=True); time.sleep(600)"
)


def killed_client(server: PackageServer, channel: Any, rng: random.Random) -> Outcome:
    content = body({"prompt": "a cat", "steps": MAX_STEPS})
    sent = head(len(content), KEYED) + content
    sent = sent[: rng.choice((len(sent), len(sent), len(sent) - 10))]
    program = [sys.executable, "-S", "-E", "-c", KILLED, server.http.split(":")[1]]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(sent)
        process.stdin.close()
        process.stdout.read(1)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
    return "a killed client", "killed"


def half_sent(server: PackageServer, channel: Any, rng: random.Random) -> Outcome:
    content = body({"prompt": "a cat", "steps": 2})
    sent = head(rng.choice((len(content), 10**6, 10**12)), KEYED) + content
    with connect(server) as connection:
        connection.sendall(sent[: rng.randrange(len(sent) - 1)])
        time.sleep(rng.uniform(0, 1))
    return "half a request", "left"


def slow_client(server: PackageServer, channel: Any, rng: random.Random) -> Outcome:
    """Writes and reads a byte at a time."""
    content = body({"prompt": "a cat", "steps": 2})
    found = b""
    with connect(server) as connection:
        connection.settimeout(5.0)
        with contextlib.suppress(OSError):  # what the server does then is its own affair
            connection.sendall(head(len(content), KEYED)[:-4])
            for byte in b"\r\n\r\n" + content:
                connection.send(bytes([byte]))
                time.sleep(0.002)
            while len(found) < 60 and (byte_read := connection.recv(1)):
                found += byte_read
                time.sleep(0.002)
    return "a byte at a time", found.split(b" ")[1].decode() if b" " in found else "left"


def http_requests() -> dict[str, bytes]:
    """Malformed HTTP, by what it is."""
    good = body({"prompt": "a cat", "steps": 2})
    bomb = zlib.compressobj(wbits=31)
    packed = bomb.compress(b'{"inputs": [' + b" " * (32 << 20)) + bomb.flush()
    # The server would make room for it, and end: why HTTP has a key.
    huge = good.replace(b"[1, 1]", b"[1, 1000000000000]")
    deep = b"[" * MANY + b"]" * MANY
    nan = good.replace(b'"data": [2]', b'"data": [NaN]')
    return {
        "noise": random.Random(0).randbytes(2000),
        "no JSON": head(5, KEYED) + b"xxxxx",
        "deep JSON": head(len(deep), KEYED) + deep,
        "NaN for steps": head(len(nan), KEYED) + nan,
        "a header beyond the body": head(len(good), "Inference-Header-Content-Length: 99999", KEYED)
        + good,
        "a negative length": head(-5, KEYED) + good,
        "two lengths": head(len(good), "Content-Length: 3", KEYED) + good,
        "no gzip": head(len(good), "Content-Encoding: gzip", KEYED) + good,
        "another model": head(len(good), KEYED, path="v2/models/../../etc/passwd/infer") + good,
        "64 kB of header": head(len(good), "X: " + "x" * 65536, KEYED) + good,
        "to unload a model": head(2, KEYED, path="v2/repository/models/unet/unload") + b"{}",
        # What the key keeps away.
        "no key": head(len(good)) + good,
        "a wrong key": head(len(good), KEYED + "s") + good,
        "a huge shape": head(len(huge)) + huge,
        "a bomb": head(len(packed), "Content-Encoding: gzip") + packed,
        "to change the log": head(20, KEYED, path="v2/logging") + b'{"log_info": false }',
        "to trace": head(2, KEYED, path="v2/trace/setting") + b"{}",
        "shared memory": head(2, KEYED, path="v2/systemsharedmemory/region/x/register") + b"{}",
    }


HTTP = http_requests()


def malformed(server: PackageServer, channel: Any, rng: random.Random) -> Outcome:
    name = rng.choice(list(HTTP))
    status = answer_to(server, HTTP[name], 2.0)
    known = status in ("closed", "silent") or status[:1] in ("4", "5")
    return f"HTTP: {name}", "refused" if known else status


def closed_service(server: PackageServer, channel: Any, rng: random.Random) -> Outcome:
    """What HTTP's requests without the key try too."""
    stub, messages = triton.service_pb2_grpc.GRPCInferenceServiceStub(channel), triton.service_pb2
    region = messages.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=8)
    name, call, request = rng.choice(
        [
            ("shared memory", stub.SystemSharedMemoryRegister, region),
            ("to change the log", stub.LogSettings, messages.LogSettingsRequest()),
            ("to trace", stub.TraceSetting, messages.TraceSettingRequest()),
        ]
    )
    try:
        call(request, timeout=CALL_SECONDS)
    except grpc.RpcError as e:
        known = e.code().name == BUSY and "restricted" in str(e.details())
        return f"gRPC: {name}", "refused" if known else f"{e.code().name}: {e.details()}"
    return f"gRPC: {name}", "answered"


def many_connections(server: PackageServer, channel: Any, rng: random.Random) -> Outcome:
    held = [connect(server) for _ in range(50)]
    time.sleep(0.2)
    for connection in held:
        connection.close()
    return "50 connections", "left"


ATTACKS: tuple[
    tuple[Callable[[PackageServer, Any, random.Random], Outcome], int, set[str]], ...
] = (
    (bad_value, 12, {"refused"}),
    (strange_numbers, 6, {"OK", REFUSED, BUSY, "INTERNAL"}),
    (malformed, 8, {"refused"}),
    (closed_service, 1, {"refused"}),
    (cancelled_call, 2, {"left"}),
    (left_stream, 3, {"cancelled", "left"}),
    (killed_client, 2, {"killed"}),
    (half_sent, 2, {"left"}),
    (slow_client, 1, {"200", "503", "left"}),  # an honest request, slowly sent
    (many_connections, 1, {"left"}),
)
"""How often each, and how it may end."""
WRONG = "wrong: "


def attack(server: PackageServer, seed: int, until: float, outcomes: Counter[Outcome]) -> None:
    rng = random.Random(seed)
    weights = [weight for _, weight, _ in ATTACKS]
    with grpc.insecure_channel(server.grpc) as channel:
        while time.monotonic() < until:
            ((chosen, _, ends),) = rng.choices(ATTACKS, weights)
            try:
                name, end = chosen(server, channel, rng)
            except (OSError, IndexError) as e:  # the server went away
                name, end = chosen.__name__, f"{type(e).__name__}: {e}"
            outcomes[name, end if end in ends else f"{WRONG}{end}"] += 1


def ask(
    server: PackageServer, seed: int, until: float, expected: list[np.ndarray], seen: Counter[str]
) -> None:
    """Be an honest client, the first one over HTTP."""
    sent = requests()
    with grpc.insecure_channel(server.grpc) as channel:
        for i in range(seed, 1 << 30):
            if time.monotonic() > until:
                return
            request = sent[i % len(sent)]
            image = draw(channel, request) if seed else draw_over_http(server, request)
            if image is None:
                seen["busy"] += 1
                time.sleep(0.1)
            else:
                seen["right" if np.array_equal(image, expected[i % len(sent)]) else "wrong"] += 1


def growth(samples: list[tuple[float, int]]) -> float:
    """By which part of itself memory grew after the warm-up, by the fitted line."""
    times, sizes = zip(*samples[int(WARM * len(samples)) :], strict=True)
    slope, start = np.polyfit(np.subtract(times, times[0]), sizes, 1)
    return float(slope * (times[-1] - times[0]) / start)


def open_files(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def test_honest_images_stay_right_and_memory_flat_beside_hostile_requests(
    server: PackageServer,
) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        expected = [image for r in requests() if (image := draw(channel, r)) is not None]
    assert len(expected) == len(requests())
    processes, outcomes, seen = server.processes(), Counter[Outcome](), Counter[str]()
    files = open_files(processes["tritonserver"])
    start, memory = time.monotonic(), list[tuple[float, int]]()
    until = start + 60 * MINUTES
    with ThreadPoolExecutor(HONEST + HOSTILE) as threads:
        asked = [
            *(threads.submit(ask, server, 4 * i, until, expected, seen) for i in range(HONEST)),
            *(threads.submit(attack, server, i, until, outcomes) for i in range(HOSTILE)),
        ]
        while time.monotonic() < until and server.process.poll() is None:
            memory.append((time.monotonic() - start, sum(server.memory().values())))
            time.sleep(SAMPLE_SECONDS)
        for each in asked:
            each.result()
    report(outcomes, seen, memory)
    assert server.processes() == processes
    assert {outcome for outcome in outcomes if outcome[1].startswith(WRONG)} == set()
    assert seen["right"] > 10 * MINUTES
    assert seen["wrong"] == 0
    assert growth(memory) <= MOST_GROWTH
    # As many images at once as before, each right: no request has kept its place.
    with ThreadPoolExecutor(IN_FLIGHT) as threads, grpc.insecure_channel(server.grpc) as channel:
        again = list(threads.map(lambda r: draw(channel, r), requests() * 2))
    assert all(map(np.array_equal, again, expected * 2))
    assert open_files(processes["tritonserver"]) < files + 20
    probe = [sys.executable, server.package / "health.py", f"http://{server.http}"]
    assert subprocess.run(probe, check=False).returncode == 0
    assert server.ready()


def report(outcomes: Counter[Outcome], seen: Counter[str], memory: list[tuple[float, int]]) -> None:
    """Print what was seen."""
    for (what, ended), count in sorted(outcomes.items()):
        print(f"{count:6} {what}: {ended}")
    print(f"{outcomes.total()} hostile requests, honest images: {dict(seen)}")
    sizes = [size / 1e6 for _, size in memory]
    print(
        f"memory: {sizes[0]:.0f} MB at the start, {sizes[int(WARM * len(sizes))]:.0f} warm, "
        f"{sizes[-1]:.0f} at the end, {max(sizes):.0f} at most; trend {growth(memory):+.1%}"
    )
