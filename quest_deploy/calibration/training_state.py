"""Where an interrupted finetuning or reconstruction goes on."""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quest_deploy.errors import InputError
from quest_deploy.files import atomic_file, check_archive

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass
class TrainingState:
    """Where an interrupted run goes on: ``step`` optimizer steps (of a reconstruction: units) are
    done, over all stages.

    Attributes:
        key: identifies the options and inputs that made it.
        model: the parameters that some stage (of a reconstruction: the last unit) trains, by name.
        optimizer: the state of the last step's stage.
        generator: the state of the generator that goes on drawing the batches, where there is one.
    """

    key: str
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    generator: Tensor | None = None

    def save(self, path: Path) -> None:
        """Write the state, whole or not at all."""
        buffer = io.BytesIO()  # torch.save's own errors on a full disk are no OSError
        torch.save(vars(self), buffer)
        with atomic_file(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    @classmethod
    def load(cls, path: Path, key: str) -> TrainingState | None:
        """The state at ``path``, on the CPU, or None where there is none.

        Raises:
            InputError: it is damaged, or of a run with another ``key``; it is only a shortcut, and
                may be ignored.
        """
        try:
            check_archive(path)
            with zipfile.ZipFile(path) as archive:
                damaged = (
                    archive.testzip()
                )  # torch.load checks none of the checksums that torch.save writes
            if damaged is not None:
                raise ValueError(f"{damaged} has another checksum")
            state = cls(**torch.load(path, weights_only=True, map_location="cpu"))
        except FileNotFoundError:
            return None
        except Exception as e:  # zipfile and torch.load raise whatever the damage provokes
            raise InputError(f"{path} is damaged") from e
        if state.key != key:
            raise InputError(f"{path} is of a run with other options, model or data")
        return state


def hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of named tensors, their types and shapes, as hex: for a state's ``key``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
