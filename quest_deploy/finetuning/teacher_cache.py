"""What the float model answers at each step, in a file: it runs ahead over many steps, and is gone
while the student trains.

The file holds a run of consecutive steps: one line of JSON (the key of what made it, its first
step, the shapes of a step's tensors), then for each step its tensors in float32 and a checksum.
Whatever is missing, damaged or of another key is not used.
"""

from __future__ import annotations

import json
import math
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quest_deploy.errors import InputError
from quest_deploy.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_CHECKSUM_BYTES = 4
_LONGEST_HEADER = 2**20


class TargetStream:
    """The targets of a run of steps, on disk.

    Attributes:
        path: the file; removed by :meth:`remove`, replaced by :meth:`write`.
        key: identifies what makes the targets; a file of another key is never read.
        budget: the bytes that the file may take; one step is held even where it takes more.
    """

    def __init__(self, path: Path, key: str, budget: int) -> None:
        self.path, self.key, self.budget = path, key, budget

    def read(self, step: int) -> list[Tensor] | None:
        """The targets of ``step``, float32, or None where the file does not hold them whole."""
        try:
            with open_regular(self.path) as stream:
                header = json.loads(stream.readline(_LONGEST_HEADER))
                if header["key"] != self.key or step < header["first"]:
                    return None
                sizes = [math.prod(shape) for shape in header["shapes"]]
                if 4 * sum(sizes) > self.path.stat().st_size:
                    return None
                payload = bytearray(4 * sum(sizes))
                stream.seek((step - header["first"]) * (len(payload) + _CHECKSUM_BYTES), 1)
                if stream.readinto(payload) != len(payload) or stream.read(
                    _CHECKSUM_BYTES
                ) != _checksum(step, payload):
                    return None
        except (OSError, ValueError, KeyError, TypeError, InputError):
            return None
        parts = torch.frombuffer(payload, dtype=torch.float32).split(sizes)
        return [part.view(shape) for part, shape in zip(parts, header["shapes"], strict=True)]

    def write(
        self,
        first: int,
        end: int,
        targets: Callable[[int], list[Tensor]],
        on_step: Callable[[int], None],
    ) -> None:
        """Replace the file by ``targets(step)`` for the steps from ``first`` on, up to ``end`` or
        as far as the budget reaches.

        A write that is interrupted leaves the steps that were finished; one that fails leaves
        nothing.
        """
        try:
            self.remove()  # not to write through a link
            with self.path.open("xb") as stream:
                for step in range(first, end):
                    arrays = [
                        np.ascontiguousarray(target.float().cpu().numpy())
                        for target in targets(step)
                    ]
                    if step == first:
                        header = {
                            "key": self.key,
                            "first": first,
                            "shapes": [array.shape for array in arrays],
                        }
                        stream.write(json.dumps(header).encode() + b"\n")
                    for array in arrays:
                        stream.write(array.data)
                    stream.write(_checksum(step, *(array.data for array in arrays)))
                    on_step(step)
                    if (
                        stream.tell() + sum(array.nbytes for array in arrays) + _CHECKSUM_BYTES
                        > self.budget
                    ):
                        break
        except OSError:
            self.remove()
            raise

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self.path.unlink(missing_ok=True)


def _checksum(step: int, *parts: Any) -> bytes:
    checksum = step
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum.to_bytes(_CHECKSUM_BYTES, "little")
