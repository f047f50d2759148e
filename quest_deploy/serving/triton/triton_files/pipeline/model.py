"""Triton's side of `pipeline`, and, where the configuration says decoupled, of `pipeline_stream`.

Requests run as coroutines of one event loop beside Triton's own thread: while one waits for the
UNet the others go on, so that all of them, whatever their denoising steps, schedulers and step
counts, meet in the UNet's dynamic batcher.
"""

from __future__ import annotations

import asyncio
import json
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from generation import Generator, InvalidRequestError, Job, Limits, NotFiniteError, png

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class ClientGoneError(Exception):
    """The client went away."""


class ModelFailedError(Exception):
    """A model that the pipeline calls answered with an error, or not at all.

    Args:
        code: Triton's, for the client.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class TritonPythonModel:
    """See Triton's python backend for what calls it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load what the model draws with, and start the event loop."""
        torch.set_num_threads(1)  # its work between the UNet's passes is small
        config = json.loads(args["model_config"])
        try:
            limits = Limits.of(config["parameters"])
        except ValueError as e:
            raise pb_utils.TritonModelException(str(e)) from e
        self._stream = pb_utils.using_decoupled_model_transaction_policy(config)
        self._generator = Generator(Path(__file__).parent, limits)
        self._in_flight = limits.max_in_flight
        self._slots = threading.Semaphore(self._in_flight)
        self._loop = asyncio.new_event_loop()
        # Each call of another model waits in a thread of its own.
        self._loop.set_default_executor(ThreadPoolExecutor(self._in_flight))
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Start each request and return; with as many images in flight as are allowed, wait, and
        let Triton's queue fill.
        """
        for request in requests:
            inputs = {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}
            # One for each image, as far as there are so many at all.
            slots = min(max(1, len(next(iter(inputs.values()), ()))), self._in_flight)
            for _ in range(slots):
                self._slots.acquire()
            work = self._serve(
                inputs, request.requested_output_names(), request.get_response_sender(), slots
            )
            asyncio.run_coroutine_threadsafe(work, self._loop)

    def finalize(self) -> None:
        """Stop the event loop; Triton has waited for the requests."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _serve(
        self, inputs: dict[str, np.ndarray], outputs: list[str], sender: Any, slots: int
    ) -> None:
        code = pb_utils.TritonError
        error = None
        try:
            response = await self._draw(inputs, outputs, sender)
        except InvalidRequestError as e:
            error = code(str(e), code.INVALID_ARG)
        except ClientGoneError:
            error = code("cancelled by the client", code.CANCELLED)
        except ModelFailedError as e:
            error = code(str(e), e.code)
        except NotFiniteError as e:
            error = code(str(e), code.INTERNAL)
        except Exception as e:
            pb_utils.Logger.log_error(traceback.format_exc())
            error = code(f"{type(e).__name__}: {e}", code.INTERNAL)
        try:
            sender.send(pb_utils.InferenceResponse(error=error) if error else response, flags=FINAL)
        finally:
            self._slots.release(slots)

    async def _draw(self, inputs: dict[str, np.ndarray], outputs: list[str], sender: Any) -> Any:
        if sender.is_cancelled():  # while it waited
            raise ClientGoneError
        jobs = self._generator.jobs(inputs)
        if "pixels" in outputs and len({(job.height, job.width) for job in jobs}) > 1:
            raise InvalidRequestError("height, width: expected one size in a request for pixels")
        images = [np.empty(0)] * len(jobs)

        async def draw(i: int, job: Job) -> None:
            images[i] = await self._generator.draw(
                job, self._infer, lambda done, total: self._on_step(sender, done, total)
            )

        tasks = [asyncio.ensure_future(draw(i, job)) for i, job in enumerate(jobs)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # where one failed
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # before others take their slots
        found = {"seed": np.asarray([[job.seed] for job in jobs], np.int64)}
        if "pixels" in outputs:
            found["pixels"] = np.stack(images)
        if "image" in outputs:
            run = self._loop.run_in_executor
            files = await asyncio.gather(*(run(None, png, image) for image in images))
            found["image"] = np.asarray([[file] for file in files], np.object_)
        return _response({name: value for name, value in found.items() if name in outputs})

    def _on_step(self, sender: Any, done: int, total: int) -> None:
        if sender.is_cancelled():
            raise ClientGoneError
        if self._stream:
            sender.send(
                _response(
                    {
                        "step": np.asarray([[done]], np.int32),
                        "steps": np.asarray([[total]], np.int32),
                    }
                )
            )

    async def _infer(self, model: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run another model of the repository; low-precision models take and give it."""
        names, kinds = self._signature(model)
        given = [
            pb_utils.Tensor(name, np.ascontiguousarray(value, kinds[name]))
            for name, value in inputs.items()
        ]
        request = pb_utils.InferenceRequest(
            model_name=model, inputs=given, requested_output_names=names
        )
        timeout = self._generator.limits.model_timeout
        try:
            answer = await asyncio.wait_for(request.async_exec(), timeout)
        except asyncio.TimeoutError:  # noqa: UP041 - on Python 3.10 not the built-in one
            raise ModelFailedError(
                f"{model}: no answer within {timeout} s", pb_utils.TritonError.INTERNAL
            ) from None
        if answer.has_error():
            raise ModelFailedError(f"{model}: {answer.error().message()}", answer.error().code())
        found = {tensor.name(): tensor.as_numpy() for tensor in answer.output_tensors()}
        return {name: value.astype(np.float32) for name, value in found.items()}

    def _signature(self, model: str) -> tuple[list[str], dict[str, Any]]:
        signature = self._generator.settings["models"][model]
        return signature["outputs"], signature["inputs"]


def _response(arrays: dict[str, np.ndarray]) -> Any:
    return pb_utils.InferenceResponse(
        output_tensors=[pb_utils.Tensor(name, value) for name, value in arrays.items()]
    )
