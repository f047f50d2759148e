"""Draw with a Triton server that serves a package: an image alone, and the same one several times
together.

    python -m scripts.bench.draw_served PACKAGE [--cpu] [--json FILE]

On a GPU the server runs the package's plans. A GPU may choose other kernels for other batches, so
that an image drawn beside others need not be equal to the last bit: how many are is a result.
"""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from quest_deploy.errors import QuestDeployError
from quest_deploy.files import write_json
from quest_deploy.serving.client import request_image
from quest_deploy.serving.triton.server import SERVING, PackageServer

REQUEST: dict[str, Any] = {"prompt": "cat", "seed": 0, "steps": 10}


def draw(server: PackageServer, together: int) -> dict[str, Any]:
    """Seconds of an image alone and of ``together`` at once, and how many of these equal it."""

    def one(_: int) -> bytes:
        return request_image(server.grpc, REQUEST).png

    one(0)  # the first also warms up
    started = time.monotonic()
    alone = one(0)
    seconds = time.monotonic() - started
    with ThreadPoolExecutor(together) as pool:
        images = list(pool.map(one, range(together)))
    spent = time.monotonic() - started - seconds
    return {
        "seconds": seconds,
        "together": together,
        "together_seconds": spent,
        "equal": sum(image == alone for image in images),
    }


def main(
    package: Annotated[Path, typer.Argument(help="What `quest-deploy package` wrote.")],
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Without a GPU, through the stand-in.")
    ] = False,
    together: Annotated[int, typer.Option(min=1)] = 8,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Start the server, draw, and print the seconds."""
    # The wheel's server wants an environment of its own, a container's the Python that is here.
    python = SERVING if cpu else Path(sys.executable)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="quest-deploy-") as scratch,
            PackageServer(package, Path(scratch) / "log", cpu=cpu, python=python) as server,
        ):
            found = draw(server, together)
    except QuestDeployError as e:
        print(f"error: {e}", file=sys.stderr)
        raise typer.Exit(e.exit_code) from e
    print(found)
    if json_file is not None:
        write_json(json_file, found)


if __name__ == "__main__":
    typer.run(main)
