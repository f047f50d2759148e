"""Exit 0 if the server draws an image or its queue is full, 1 if not: a probe for container
orchestration. Needs nothing but Python.

A full queue is a server with much to do, which a restart would not help. A probe that waits in the
queue needs a --timeout for it.

Triton's own readiness endpoint is not enough: a model whose python process has died still counts as
ready there.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import urllib.error
import urllib.request
import zlib
from pathlib import Path

FULL = "maximum queue size"
"""What Triton says of a full queue, with the status 503."""
KEY_HEADER, KEY_VARIABLE = "quest-deploy-key", "QUEST_DEPLOY_HTTP_KEY"
"""As `serve.py` has them."""
PNG = b"\x89PNG\r\n\x1a\n"
IMAGES = {"inpainting": ("init_image", "mask_image"), "instruct-pix2pix": ("init_image",)}
"""The images of a request, by the kind that the settings name."""


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "url",
        nargs="?",
        default="http://127.0.0.1:8000",
        help="the server's HTTP address (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout", type=float, default=30.0, help="seconds (default: %(default)s)"
    )
    arguments = parser.parse_args()
    settings = json.loads(
        (
            Path(__file__).resolve().parent / "models" / "pipeline" / "1" / "settings.json"
        ).read_text()
    )
    steps = min(2, settings["defaults"]["steps"])
    inputs = [_input("steps", "INT32", steps), _input("seed", "INT64", 0)]
    if settings["text"]:
        inputs.append(_input("prompt", "BYTES", "health"))
    elif settings["labels"] > 1:
        inputs.append(_input("label", "INT32", 0))
    images = IMAGES.get(settings["image"], ())
    picture = _bytes(_picture())
    size = {"binary_data_size": len(picture)}
    about = {"shape": [1, 1], "datatype": "BYTES", "parameters": size}
    request = {
        "inputs": [*inputs, *({"name": name, **about} for name in images)],
        "outputs": [{"name": "image", "parameters": {"binary_data": True}}],
    }
    content = json.dumps(request).encode()
    headers = {"Inference-Header-Content-Length": str(len(content))}
    if KEY_VARIABLE in os.environ:
        headers[KEY_HEADER] = os.environ[KEY_VARIABLE]
    # The environment's proxy is for elsewhere.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        answer = opener.open(
            urllib.request.Request(
                f"{arguments.url}/v2/models/pipeline/infer",
                content + picture * len(images),
                headers,
            ),
            timeout=arguments.timeout,
        )
        body = answer.read()
    except urllib.error.HTTPError as e:
        reason = e.read().decode(errors="replace")
        if e.code == 503 and FULL in reason:
            print("busy: the queue is full")
            return
        sys.exit(f"unhealthy: {reason}")
    except OSError as e:
        sys.exit(f"unhealthy: {e}")
    if PNG not in body:
        sys.exit("unhealthy: the server gave no image")
    print("healthy")


def _input(name: str, datatype: str, value: object) -> dict[str, object]:
    return {"name": name, "shape": [1, 1], "datatype": datatype, "data": [value]}


def _picture() -> bytes:
    """A PNG of one gray pixel."""
    header = struct.pack(">2I5B", 1, 1, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0\x80")), (b"IEND", b""))
    return PNG + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def _bytes(value: bytes) -> bytes:
    """An element of a BYTES tensor, as it lies behind a request's JSON."""
    return struct.pack("<I", len(value)) + value


if __name__ == "__main__":
    main()
