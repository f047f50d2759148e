"""Measure a package of the embedded model on a Triton server on the CPU; writes
scripts/bench/results/serving.json, and of them
docs/serving/table.md and plot.png.

    python -m scripts.bench.bench_serving -w WORKSPACE [--minutes 10] [--seconds 20]

First throughput: 1 to 16 clients ask for images, one after the other each, of a server that draws
requests together and of one that draws them one by one (max_in_flight 1), the two in turn. Then
load: 8 clients over HTTP, and 8 over gRPC, for the given minutes each; every image is compared with
the one that the server drew alone. Requests differ in prompt, seed, scheduler, steps (5 to 20)
and guidance.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from quest_deploy.artifacts.workspace import Workspace, versions
from quest_deploy.backends.base import processor_name
from quest_deploy.errors import QuestDeployError
from quest_deploy.files import atomic_file, write_json
from quest_deploy.models.schedulers import SCHEDULERS
from quest_deploy.serving.triton.options import TritonOptions
from quest_deploy.serving.triton.package import write_package
from quest_deploy.serving.triton.server import PackageServer, missing_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Draw = Callable[[dict[str, Any]], np.ndarray]

ROOT = Path(__file__).parents[2]
CLIENTS = (1, 2, 4, 8, 16)
LOAD_CLIENTS = 8
ROUNDS = 3
REQUESTS = 56
PROMPTS = ("cat", "red dog", "house", "blue house", "a dog")
"""Few tokens each, in the vocabulary of any model."""
TOGETHER, ONE_BY_ONE = "together", "one by one"
PROTOCOLS = ("http", "grpc")
SAMPLE_SECONDS = 5.0
CALL_SECONDS = 60.0
"""What an image may take; later it is an error."""
MAX_GROWTH = 0.02
"""The part of its memory that a server may grow by over a load, by the fitted line; more is a
failure.
"""
WARM = 0.2
"""The part of a load, at its start, in which memory may grow: pools and caches fill."""
KINDS = {
    "prompt": "BYTES",
    "seed": "INT64",
    "steps": "INT32",
    "scheduler": "BYTES",
    "guidance": "FP32",
}


def requests() -> list[dict[str, Any]]:
    """The requests: all schedulers, step counts and guidances in turn, each time with another
    prompt and seed.
    """
    names = list(SCHEDULERS)
    return [
        {
            "prompt": PROMPTS[i % len(PROMPTS)],
            "seed": i,
            "steps": (5, 10, 15, 20)[i % 4],
            "scheduler": names[i % len(names)],
            "guidance": (1.0, 3.0)[i // 4 % 2],
        }
        for i in range(REQUESTS)
    ]


@dataclass
class Run:
    """What clients saw in one run.

    Attributes:
        latencies: seconds of each image.
        mean_batch: rows of a UNet batch.
        memory: of each process of the server, bytes, with the seconds since the start.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    mean_batch: float = 0.0
    memory: list[tuple[float, dict[str, int]]] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Images a second."""
        return len(self.latencies) / self.seconds


class Clients:
    """Clients of one server over one protocol; a context manager that closes them, as the server's
    end would wait for them.
    """

    def __init__(self, server: PackageServer, protocol: str, count: int) -> None:
        if protocol == "grpc":
            import tritonclient.grpc as library

            options, self._call = {}, {"client_timeout": CALL_SECONDS}
        else:
            import tritonclient.http as library

            options, self._call = {"network_timeout": CALL_SECONDS}, {}
        self._library = library
        self._made = [
            library.InferenceServerClient(getattr(server, protocol), **options)
            for _ in range(count)
        ]

    def __enter__(self) -> list[Draw]:
        return [self._drawer(client) for client in self._made]

    def __exit__(self, *exception: object) -> None:
        for client in self._made:
            client.close()

    def _drawer(self, client: Any) -> Draw:
        from tritonclient.utils import triton_to_np_dtype

        def draw(request: dict[str, Any]) -> np.ndarray:
            inputs = []
            for name, value in request.items():
                inputs.append(self._library.InferInput(name, [1, 1], KINDS[name]))
                inputs[-1].set_data_from_numpy(
                    np.asarray([[value]], triton_to_np_dtype(KINDS[name]))
                )
            outputs = [self._library.InferRequestedOutput("pixels")]
            pixels: np.ndarray = client.infer(
                "pipeline", inputs, outputs=outputs, **self._call
            ).as_numpy("pixels")[0]
            return pixels

        return draw


def alone(server: PackageServer) -> list[np.ndarray]:
    """The image of each of :func:`requests`, with nothing else under way."""
    with Clients(server, "grpc", 1) as (draw,):
        return [draw(request) for request in requests()]


def batches(server: PackageServer) -> tuple[int, int]:
    """How many rows, and in how many batches, the UNet has run."""
    import tritonclient.grpc

    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        unet = client.get_inference_statistics("unet").model_stats[0]
        return unet.inference_count, unet.execution_count


def ask(
    server: PackageServer,
    protocol: str,
    count: int,
    seconds: float,
    expected: list[np.ndarray],
    *,
    watch: bool = False,
) -> Run:
    """Let ``count`` clients ask for images until the time is over; what is under way then is waited
    for and counts.

    Raises:
        QuestDeployError: the server has ended, or no image was drawn.
    """
    run, sent, before = Run(), requests(), batches(server)
    lock, started = threading.Lock(), time.monotonic()
    ends = started + seconds

    def ended() -> bool:
        return server.process.poll() is not None

    def work(first: int, draw: Draw) -> None:
        i = first
        while time.monotonic() < ends:
            begun = time.monotonic()
            try:
                image = draw(sent[i % REQUESTS])
            except Exception as e:  # whatever it is, it is counted
                with lock:
                    run.errors[str(e)[:200]] += 1
                if ended():
                    return
                continue
            with lock:
                run.latencies.append(time.monotonic() - begun)
                run.wrong += not np.array_equal(image, expected[i % REQUESTS])
            i += count

    with Clients(server, protocol, count) as drawers:
        threads = [
            threading.Thread(target=work, args=(i * REQUESTS // count, draw))
            for i, draw in enumerate(drawers)
        ]
        for thread in threads:
            thread.start()
        while watch and time.monotonic() < ends and not ended():
            run.memory.append((time.monotonic() - started, server.memory()))
            time.sleep(min(SAMPLE_SECONDS, max(0.0, ends - time.monotonic())))
        for thread in threads:
            thread.join()
    run.seconds = time.monotonic() - started
    if ended() or not run.latencies:
        what = "the server has ended" if ended() else "no image was drawn"
        raise QuestDeployError(
            f"{what}; errors over {protocol}: {dict(run.errors.most_common(3))}; the server's log: "
            f"{server.log}"
        )
    after = batches(server)
    run.mean_batch = (after[0] - before[0]) / max(1, after[1] - before[1])
    return run


def measure_throughput(
    servers: dict[str, PackageServer], seconds: float, expected: list[np.ndarray]
) -> Iterator[dict[str, Any]]:
    """For each number of clients, the median images a second of each server, measured in turn."""
    for count in CLIENTS:
        runs: dict[str, list[Run]] = {name: [] for name in servers}
        for _ in range(ROUNDS):
            for name, server in servers.items():
                runs[name].append(ask(server, "grpc", count, seconds / ROUNDS, expected))
        yield {
            "clients": count,
            **{
                name: statistics.median(run.throughput for run in rounds)
                for name, rounds in runs.items()
            },
            "mean_batch": statistics.median(run.mean_batch for run in runs[TOGETHER]),
            "wrong": sum(run.wrong for rounds in runs.values() for run in rounds),
            "errors": sum(run.errors.total() for rounds in runs.values() for run in rounds),
        }
        print(f"{count} clients: done", flush=True)


def summary(protocol: str, run: Run) -> dict[str, Any]:
    """Return what is kept of a load."""
    p50, p90, p99 = (float(np.percentile(run.latencies, q)) for q in (50, 90, 99))
    totals = [(at, sum(sizes.values())) for at, sizes in run.memory if at >= WARM * run.seconds]
    slope, start = 0.0, 1.0
    if len(totals) > 2:
        times, sizes = zip(*totals, strict=True)
        slope, start = map(float, np.polyfit(times, sizes, 1))
    return {
        "protocol": protocol,
        "clients": LOAD_CLIENTS,
        "seconds": run.seconds,
        "images": len(run.latencies),
        "throughput": run.throughput,
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "max": max(run.latencies),
        "mean_batch": run.mean_batch,
        "errors": dict(run.errors),
        "wrong": run.wrong,
        "memory_bytes_per_hour": slope * 3600,
        "memory_growth": slope * run.seconds / start,
        "memory": run.memory,
    }


def table(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# A Triton server on a CPU",
        "",
        f"The embedded model at {results['scheme']}, `quest-deploy package --triton` with its "
        "defaults, `serve.py --cpu`, clients on",
        f"the same machine. {results['note']}".strip(),
        "",
        "Written by `make bench-serving`; every image was compared with the one that the server "
        "drew alone.",
        "",
        "## Throughput, images a second",
        "",
        "| clients | one by one | together | ratio | mean batch, rows | wrong images | errors |",
        "|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {row['clients']} | {row[ONE_BY_ONE]:.2f} | {row[TOGETHER]:.2f} | "
            f"{row[TOGETHER] / row[ONE_BY_ONE]:.2f}x "
            f"| {row['mean_batch']:.2f} | {row['wrong']} | {row['errors']} |"
            for row in results["throughput"]
        ),
        "",
        "One by one: the same server with `max_in_flight` 1, measured in turn with the other; "
        "medians of three. An image takes 5 to 20",
        "steps, half of them with guidance, which makes two rows of an image: alone, the mean "
        "batch is 1.5.",
        "",
        f"## Load, {LOAD_CLIENTS} clients",
        "",
        "| protocol | minutes | images | images/s | p50 | p90 | p99 | longest | mean batch | "
        "errors | wrong images | memory at the start, end | trend |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(_load_row(load) for load in results["load"]),
        "",
        "Latencies in milliseconds. Memory is what the server and its three Python processes hold "
        "for themselves, and what they share,",
        "not the libraries' pages; the trend is a line fitted to it, but for the first fifth. By "
        f"that line it may grow by {MAX_GROWTH:.0%} over the load;",
        "more is a failure, as is an error or a wrong image.",
        "",
        "![throughput, latency, memory](plot.png)",
        "",
        f"Measured on: {results['processor']}, {results['cores']} cores, {results['date']}; "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _load_row(load: dict[str, Any]) -> str:
    totals = [
        sum(sizes.values()) / 1e6 for at, sizes in load["memory"] if at >= WARM * load["seconds"]
    ]
    memory = f"{totals[0]:.0f}, {totals[-1]:.0f} MB" if totals else ""
    times = " | ".join(f"{1000 * load[key]:.0f}" for key in ("p50", "p90", "p99", "max"))
    return (
        f"| {load['protocol']} | {load['seconds'] / 60:.1f} | {load['images']} | "
        f"{load['throughput']:.2f} | {times} "
        f"| {load['mean_batch']:.2f} | {sum(load['errors'].values())} | {load['wrong']} | {memory} "
        f"| {load['memory_bytes_per_hour'] / 1e6:+.1f} MB/h |"
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Save throughput by clients, the latencies' percentiles and memory over time as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure((13, 3.6), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rows = results["throughput"]
    for name in (ONE_BY_ONE, TOGETHER):
        left.plot(
            [row["clients"] for row in rows], [row[name] for row in rows], marker="o", label=name
        )
    left.set(
        xlabel="clients",
        ylabel="images a second",
        ylim=(0, None),
        xticks=[row["clients"] for row in rows],
    )
    left.legend()
    keys = ("p50", "p90", "p99", "max")
    for i, load in enumerate(results["load"]):
        places = np.arange(len(keys)) + 0.4 * i
        middle.bar(
            places,
            [1000 * load[key] for key in keys],
            width=0.38,
            label=f"{load['protocol']}, {load['clients']} clients",
        )
        times = [at / 60 for at, _ in load["memory"]]
        right.plot(
            times,
            [sum(sizes.values()) / 1e6 for _, sizes in load["memory"]],
            label=load["protocol"],
        )
    middle.set_xticks(np.arange(len(keys)) + 0.2, ["p50", "p90", "p99", "longest"])
    middle.set(ylabel="latency, ms")
    middle.legend()
    right.set(xlabel="minutes", ylabel="memory of the server's processes, MB", ylim=(0, None))
    right.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def main(
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", help="A workspace of the embedded model.")
    ],
    minutes: Annotated[float, typer.Option(min=0.1, help="Of load, for each protocol.")] = 10.0,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="Of throughput, for each number of clients and server.")
    ] = 30.0,
    docs: Annotated[Path, typer.Option(help="Where the page goes.")] = ROOT / "docs" / "serving",
    json_file: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = Path(
        __file__
    ).parent
    / "results"
    / "serving.json",
    note: Annotated[str, typer.Option(help="What else the machine did meanwhile.")] = "",
) -> None:
    """Measure, and write the page."""
    if (reason := missing_server()) is not None:
        sys.exit(f"error: {reason}")
    try:
        results = measure(workspace, minutes, seconds, note)
    except QuestDeployError as e:
        sys.exit(f"error: {e}")
    docs.mkdir(parents=True, exist_ok=True)
    write_json(json_file, results)
    (docs / "table.md").write_text(table(results))
    plot(results, docs / "plot.png")
    print(table(results))
    sys.exit(1 if failed(results) else 0)


def failed(results: dict[str, Any]) -> bool:
    """Whether there was a wrong image or an error, or memory grew by more than ``MAX_GROWTH``."""
    of_throughput = sum(row["wrong"] + row["errors"] for row in results["throughput"])
    of_load = sum(load["wrong"] + sum(load["errors"].values()) for load in results["load"])
    return of_throughput + of_load > 0 or any(
        load["memory_growth"] > MAX_GROWTH for load in results["load"]
    )


def measure(workspace: Path, minutes: float, seconds: float, note: str) -> dict[str, Any]:
    """The page's figures; raise QuestDeployError where a server fails."""
    opened = Workspace.open(workspace)
    with tempfile.TemporaryDirectory(prefix="quest-deploy-") as scratch:
        folders = {TOGETHER: Path(scratch) / "together", ONE_BY_ONE: Path(scratch) / "alone"}
        write_package(opened, folders[TOGETHER], TritonOptions())
        write_package(opened, folders[ONE_BY_ONE], TritonOptions(max_in_flight=1, max_images=1))
        with PackageServer(folders[TOGETHER], Path(scratch) / "together.log") as server:
            expected = alone(server)
            with PackageServer(folders[ONE_BY_ONE], Path(scratch) / "alone.log") as other:
                if not all(
                    map(np.array_equal, alone(other), expected)
                ):  # it also warms the server up, as the other one is
                    raise QuestDeployError("two servers of one model draw other images, each alone")
                throughput = list(
                    measure_throughput({ONE_BY_ONE: other, TOGETHER: server}, seconds, expected)
                )
            load = []
            for protocol in PROTOCOLS:
                print(f"load over {protocol}, {minutes:g} minutes", flush=True)
                load.append(
                    summary(
                        protocol,
                        ask(server, protocol, LOAD_CLIENTS, 60 * minutes, expected, watch=True),
                    )
                )
    packages = {
        name: version
        for name, version in versions().items()
        if name in ("onnxruntime", "torch", "diffusers")
    }
    return {
        "scheme": opened.scheme.name,
        "note": note,
        "throughput": throughput,
        "load": load,
        "processor": processor_name(),
        "cores": len(_cores()),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"nvidia-pytriton": "0.7.0", **packages},
    }


def _cores() -> set[int]:
    import os

    return os.sched_getaffinity(0)


if __name__ == "__main__":
    typer.run(main)
