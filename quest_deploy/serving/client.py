"""Ask a Triton server that serves a package of ours for an image, over gRPC, told of every
denoising step.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quest_deploy.backends.base import require_package
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.progress import no_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quest_deploy.progress import Progress

STREAM = "pipeline_stream"
CONNECT_SECONDS = 10.0
"""How long the server may take to say what it serves."""
TIMEOUT = 600.0
"""How long a step may take, or the queue before the first one."""


@dataclass(frozen=True)
class Drawn:
    """An image that a server drew.

    Attributes:
        png: the image's file.
        seed: what it was drawn with, the server's choice where none was asked for.
    """

    png: bytes
    seed: int


def request_image(
    url: str,
    request: dict[str, Any],
    progress: Progress = no_progress,
    timeout: float = TIMEOUT,
) -> Drawn:
    """Let the server at ``url`` draw one image; leaving early, as by Ctrl-C, cancels it there.

    Args:
        url: "host:port" of its gRPC service.
        request: values by the names of the pipeline's inputs: prompt, label, seed, steps and so on.
        progress: is told how many of how many denoising steps are done.
        timeout: seconds to wait for each message.

    Raises:
        InputError: the server refuses the request, or its model has no such input.
        QuestDeployError: there is no server, or it fails.
    """
    require_package("tritonclient", "serving", "asking a Triton server")
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    if "/" in url or ":" not in url:
        raise InputError(
            f"expected HOST:PORT of a server's gRPC service, such as 127.0.0.1:8001, not {url!r}"
        )
    try:
        with InferenceServerClient(url) as client:
            kinds = {
                entry.name: entry.datatype
                for entry in client.get_model_metadata(
                    STREAM, client_timeout=CONNECT_SECONDS
                ).inputs
            }
            return _stream(client, _inputs(request, kinds), progress, timeout)
    except InferenceServerException as e:
        raise _error(e, url) from e


def _inputs(request: dict[str, Any], kinds: dict[str, str]) -> list[Any]:
    from tritonclient.grpc import InferInput
    from tritonclient.utils import triton_to_np_dtype

    inputs = []
    for name, value in request.items():
        option = f"--{name.replace('_', '-')}"
        if name not in kinds:
            raise InputError(
                f"{option}: the served model has no such input; it has {', '.join(kinds)}"
            )
        try:
            data = value.encode() if isinstance(value, str) else value
            array: NDArray[Any] = np.asarray([[data]], triton_to_np_dtype(kinds[name]))
        except (
            UnicodeEncodeError
        ) as e:  # such as what Python makes of an argument in another encoding
            raise InputError(f"{option}: expected text that UTF-8 can encode ({e})") from e
        except OverflowError as e:
            raise InputError(
                f"{option}: expected a number of the type {kinds[name]}, not {value}"
            ) from e
        tensor = InferInput(name, list(array.shape), kinds[name])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def _stream(client: Any, inputs: list[Any], progress: Progress, timeout: float) -> Drawn:
    messages: queue.Queue[tuple[Any, Any]] = queue.Queue()
    # The header makes the stream end with the error's own status, which Triton otherwise leaves
    # out.
    client.start_stream(
        lambda result, error: messages.put((result, error)), headers={"triton_grpc_error": "true"}
    )
    try:
        client.async_stream_infer(STREAM, inputs)
        while True:
            result, error = messages.get(timeout=timeout)
            if error is not None:
                raise error
            if (image := result.as_numpy("image")) is not None:
                return Drawn(bytes(image[0, 0]), int(result.as_numpy("seed")[0, 0]))
            done, total = (int(result.as_numpy(name)[0, 0]) for name in ("step", "steps"))
            progress("denoising", done, total)
    except queue.Empty:
        raise QuestDeployError(f"the server did not answer within {timeout:g} s") from None
    finally:
        client.stop_stream(cancel_requests=True)


def _error(e: Any, url: str) -> QuestDeployError:
    status, message = str(e.status()), e.message()
    if "INVALID_ARGUMENT" in status:
        return InputError(f"the server refuses the request: {message}")
    if ("UNAVAILABLE" in status and "onnect" in message) or "DEADLINE_EXCEEDED" in status:
        return QuestDeployError(
            f"no server answers at {url}; start the package's serve.py, or give another address "
            f"({message})"
        )
    return QuestDeployError(f"the server failed: {message}")
