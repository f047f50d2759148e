"""The files in which the reference is saved and read again: numpy only, so that verifying needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from quest_deploy.errors import InputError
from quest_deploy.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

VERSION = 2
"""Of what the files hold: a stage that has run with another version's runs again."""
INDEX = "reference.json"
TABLES = "tables.safetensors"
"""Each site's scale [K] and channel vector [C], or its scale [K, C]: what tells how far an activation is from a tie."""
OUTPUT = "output"
"""What stands for a site's name where the model's output is meant."""
TIE_ULPS = 4
"""An activation within this many ulp of a rounding tie may get either code."""


@dataclass(frozen=True)
class RecordEntry:
    """A record's line in the index: its file, and for each of its two samples the timestep, the bucket, the sensitivity.

    ``sensitivity`` is the largest relative change of the output when the same model runs in float64, or with its activations
    jittered by up to 64 ulp before each quantizer (more than any two runtimes differ).
    """

    file: str
    timesteps: tuple[float, float]
    buckets: tuple[int, int]
    sensitivity: tuple[float, float]


@dataclass(frozen=True)
class Record:
    """A record with its tensors: ``input.*`` and ``output`` [2, ...]; ``bucket`` [4], ``site.*``, ``layer.*`` (of layers and of
    products) and ``operand.*`` (a product's float ones) [4, ...].

    The first two of the four rows are the two samples' real activations, the others the probes of the same buckets. The real ones
    are those of a pass in which every tie was moved, and ``untied_output`` [2, ...] is what that pass gave. ``rounding.*`` [2], of
    sites, products and the output, is how much rounding alone changes the float part before it.
    """

    entry: RecordEntry
    tensors: dict[str, NDArray[Any]]

    @property
    def row_buckets(self) -> list[int]:
        """The buckets of the four rows."""
        return [int(b) for b in self.tensors["bucket"]]

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """The model's inputs, end to end."""
        return {name.removeprefix("input."): value for name, value in self.tensors.items() if name.startswith("input.")}


def load_reference(folder: Path) -> tuple[list[Record], dict[str, NDArray[Any]]]:
    """The records and the tables; raise InputError where they are missing or damaged."""
    index = read_json(folder / INDEX, repair="run `quest-deploy reference` again")
    try:
        entries = [RecordEntry(**entry) for entry in index["records"]]
        return [Record(entry, load_file(folder / entry.file)) for entry in entries], load_file(folder / TABLES)
    except (KeyError, TypeError, OSError, SafetensorError) as e:
        raise InputError(f"{folder}: not a readable reference ({type(e).__name__}: {e}); run `quest-deploy reference` again") from e
