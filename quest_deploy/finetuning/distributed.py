"""The processes of a data-parallel run, as `accelerate launch` or `torchrun` starts them: each
takes its share of every batch.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.finetuning.choices import DEVICES
from quest_deploy.processes import end_with

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from torch import Tensor, nn


def is_main_process() -> bool:
    """Whether this process is the one that locks the workspace, writes results and prints; True
    where it is alone.
    """
    return os.environ.get("RANK", "0") == "0"


class Processes:
    """All processes of this run, joined while the context is open; this one alone where no launcher
    started it.

    Attributes:
        device: where this process computes.
        index, count: this process among all of them.
    """

    device: torch.device
    index: int = 0
    count: int = 1

    def __init__(self, device: str, batch: int) -> None:
        """Join the others.

        Args:
            device: one of ``DEVICES``; several processes on "cuda" get a GPU each.
            batch: samples a step, over all processes.

        Raises:
            InputError: the device is unknown or absent, or the batch cannot be shared out evenly.
        """
        import torch

        if device not in DEVICES:
            raise InputError(f"unknown device {device!r}: expected one of {', '.join(DEVICES)}")
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch finds no CUDA device here; use --device cpu")
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if batch % count:
            raise InputError(
                f"{count} processes cannot share a batch of {batch} evenly: give --batch a "
                f"multiple of {count}"
            )
        self.device = torch.device(device)
        if count > 1:
            from accelerate import PartialState

            end_with(os.getppid())  # a launcher that is killed ends nobody
            with _together():
                self._state = PartialState(cpu=device == "cpu")
            self.device, self.index, self.count = (
                self._state.device,
                self._state.process_index,
                count,
            )

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        # After an error the others may never come to an orderly end: leave them to the launcher.
        if self.count > 1 and kind is None:
            with _together():
                self._state.wait_for_everyone()
                self._state.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the run's state."""
        return self.index == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of ``rows`` [B, ...], which every process holds: [B / count, ...]."""
        return rows.chunk(self.count)[self.index]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes; all must call this with tensors of
        the same shapes.
        """
        if self.count == 1:
            return
        import torch.distributed

        for tensor in tensors:
            with _together():
                torch.distributed.all_reduce(tensor)
            tensor.div_(self.count)


@contextmanager
def _together() -> Iterator[None]:
    """What only all processes do; raise QuestDeployError where one of them has ended."""
    try:
        yield
    except RuntimeError as e:  # what torch.distributed's errors are
        raise QuestDeployError(
            f"another process of this run cannot be reached; it has ended, and this one ends too "
            f"({str(e).splitlines()[0]})"
        ) from e


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that the last backward pass left."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
