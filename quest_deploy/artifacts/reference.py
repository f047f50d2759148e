"""The files in which the reference is saved and read again: numpy only, so that verifying needs no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from quest_deploy.errors import InputError
from quest_deploy.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

VERSION = 5
"""Of what the files hold: a stage that has run with another version's runs again."""
INDEX = "reference.json"
TABLES = "tables.safetensors"
"""Each site's scale [K] and channel vector [C], or its scale [K, C]: what tells how far an
activation is from a tie.

And what its codes are: ``low``, ``high`` and ``offset`` [K], or ``zero_point`` [K, C] and the
``range`` [2] of the codes with it.
"""
HALF_TYPES = ("fp16", "bf16")
"""What an engine's activations may be besides FP32."""
OUTPUT = "output"
"""What stands for a site's name where the model's output is meant."""
TIE_ULPS = 4
"""An activation within this many ulp of a rounding tie may get either code."""


@dataclass(frozen=True)
class RecordEntry:
    """A record's line in the index: its file, for each of its two samples the timestep and the
    bucket, and what it holds.

    Attributes:
        sensitivity: for each sample, the largest relative change of the output when the same model
            runs with its activations jittered by up to 64 ulp before each quantizer (more than any
            two runtimes differ), or in float64 where it is not too large for that; None where it
            was not measured.
        half_sensitivity: the same by type (fp16, bf16), when what enters each site and leaves each
            layer is rounded to that type.
        sites, products: those whose tensors it holds; of the sites' layers it holds all.
    """

    file: str
    timesteps: tuple[float, float]
    buckets: tuple[int, int]
    sensitivity: tuple[float, float] | None
    half_sensitivity: dict[str, tuple[float, float]] | None
    sites: tuple[str, ...]
    products: tuple[str, ...]


class StoredTensors(Mapping[str, "NDArray[Any]"]):
    """The tensors of a safetensors file, each read when it is asked for: a record may be larger
    than memory should hold at once.
    """

    def __init__(self, path: Path) -> None:
        """Raise OSError or SafetensorError where there is no such file, or one that is damaged."""
        self._file = safe_open(path, framework="numpy")
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        tensor: NDArray[Any] = self._file.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Record:
    """A record with its tensors.

    ``input.*`` and ``output`` are [2, ...], ``bucket`` [4], and ``site.*`` [4, ...]. ``layer.*``
    are layers' and products' outputs: [4, ...] of those that read the record's sites, [2, ...] of
    others that are upstream of a float part. ``operand.*`` [4, ...] are products' float operands.
    ``rounding.*`` [2], of sites, products and the output, is how much rounding alone changes the
    float part before it.

    The first two of four rows are the two samples' real activations, the others the probes of the
    same buckets. The real ones are those of a pass in which every tie of the record's sites was
    moved, and ``untied_output`` [2, ...] is what that pass gave. ``site.*.ties`` and
    ``site.*.untied`` are the places of ties in all four rows, counted in C order, and the values
    moved there.
    """

    entry: RecordEntry
    tensors: Mapping[str, NDArray[Any]]

    @property
    def row_buckets(self) -> list[int]:
        """The buckets of the four rows."""
        return [int(b) for b in self.tensors["bucket"]]

    def sensitivity(self, half: str | None) -> tuple[float, float] | None:
        """That of the model as it is, or with activations of a half type; None where it was not
        measured.
        """
        return (
            self.entry.sensitivity
            if half is None or self.entry.half_sensitivity is None
            else self.entry.half_sensitivity[half]
        )

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """The model's inputs, end to end."""
        return {
            name.removeprefix("input."): self.tensors[name]
            for name in self.tensors
            if name.startswith("input.")
        }

    def untied(self, site: str) -> NDArray[Any]:
        """The site's tensor with the values on ties moved to the middle of their codes: what its
        layers' outputs are computed from.
        """
        x = self.tensors[f"site.{site}.x"]
        if f"site.{site}.ties" in self.tensors:
            x.flat[self.tensors[f"site.{site}.ties"]] = self.tensors[f"site.{site}.untied"]
        return x


def load_reference(folder: Path) -> tuple[list[Record], dict[str, NDArray[Any]]]:
    """The records, whose tensors are read when they are asked for, and the tables; raise InputError
    where one is missing or damaged.
    """
    index = read_json(folder / INDEX, repair="run `quest-deploy reference` again")
    try:
        entries = [RecordEntry(**entry) for entry in index["records"]]
        return [Record(entry, StoredTensors(folder / entry.file)) for entry in entries], load_file(
            folder / TABLES
        )
    except (KeyError, TypeError, OSError, SafetensorError) as e:
        raise InputError(
            f"{folder}: not a readable reference ({type(e).__name__}: {e}); run `quest-deploy "
            "reference` again"
        ) from e
