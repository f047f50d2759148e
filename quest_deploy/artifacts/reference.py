"""The files in which the reference is saved and read again: numpy only, so that verifying needs no
torch. What stands under which name is known here alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import save_file

from quest_deploy.artifacts.schema import parse, validated
from quest_deploy.artifacts.tensors import open_tensors, read_tensors
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import (
    atomic_file,
    read_json,
    sha256_of_json,
    write_json,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

VERSION = 6
"""Of what the files hold: a stage that has run with another version's runs again."""
INDEX = "reference.json"
TABLES = "tables.safetensors"
LOW_PRECISION_TYPES = ("fp16", "bf16")
"""What an engine's activations may be besides FP32."""
OUTPUT = "output"
"""What stands for a quantizer's name where the model's output is meant."""
MOST_SENSITIVITY = 2.0
"""Two unrelated outputs of one size differ by the square root of 2, relative to either."""
_REPAIR = "run `quest-deploy reference` again"
Sensitivity = Annotated[float, Field(ge=0, le=MOST_SENSITIVITY, allow_inf_nan=False)]


@dataclass(frozen=True)
class IntegerTables:
    """A quantizer's tables, float32: scale [K], smoothing scale [C], and of its codes low, high and
    offset [K].
    """

    scale: NDArray[Any]
    channel: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]
    offset: NDArray[Any]


@dataclass(frozen=True)
class PerChannelTables:
    """A per-channel quantizer's tables: scale and zero_point float32 [K, C], and the range [2] of
    the codes with it.
    """

    scale: NDArray[Any]
    zero_point: NDArray[Any]
    range: NDArray[Any]


Tables = IntegerTables | PerChannelTables


@validated("a record's entry")
@dataclass(frozen=True)
class RecordEntry:
    """A record's line in the index: its file, for each of its two samples the timestep and the
    bucket, and what it holds.

    Attributes:
        sensitivity: for each sample, the largest relative change of the output when the same model
            runs with its activations jittered by up to 64 ulp before each quantizer (more than any
            two runtimes differ), or in float64 where it is not too large for that; None where it
            was not measured.
        half_sensitivity: the same by type (fp16, bf16), when what enters each quantizer and leaves
            each layer is rounded to that type.
        sites, products: those whose tensors it holds; of the quantizers' layers it holds all.
    """

    file: str
    timesteps: tuple[float, float]
    buckets: tuple[int, int]
    sensitivity: tuple[Sensitivity, Sensitivity] | None
    half_sensitivity: dict[str, tuple[Sensitivity, Sensitivity]] | None
    sites: tuple[str, ...]
    products: tuple[str, ...]


@validated("a reference's index")
@dataclass(frozen=True)
class ReferenceIndex:
    """All records.

    Attributes:
        key: identifies the model and what else they were made from.
        sha256: of each record, by its file's name.
    """

    key: str
    sha256: dict[str, str]
    records: tuple[RecordEntry, ...]

    @classmethod
    def read(cls, folder: Path) -> ReferenceIndex:
        """Raise InputError where there is none, or it is damaged or edited: what it says decides
        verdicts.
        """
        path = folder / INDEX
        content = read_json(path, repair=_REPAIR)
        digest = content.pop("digest", None) if isinstance(content, dict) else None
        if digest != sha256_of_json(content):
            raise InputError(f"{path} was edited; {_REPAIR}")
        return parse(cls, content, str(path), _REPAIR)

    def write(self, folder: Path) -> None:
        """Write the index, whole or not at all."""
        content = asdict(self)
        write_json(folder / INDEX, {**content, "digest": sha256_of_json(content)})


class StoredTensors(Mapping[str, "NDArray[Any]"]):
    """The tensors of a safetensors file, each read when it is asked for: a record may be larger
    than memory should hold at once.
    """

    def __init__(self, path: Path) -> None:
        """Raise OSError or SafetensorError where there is no such file, or one that is damaged."""
        self._file = open_tensors(path)
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


class Key:
    """What a record's tensors are called.

    The first two of four rows are the two samples' real activations, the others the probes of the
    same buckets. The real ones are those of a pass in which every tie of the record's quantizers
    was moved.
    """

    BUCKET = "bucket"
    """The buckets of the four rows, int64 [4]."""
    OUTPUT = OUTPUT
    """The model's output for the two samples, [2, ...]."""
    UNTIED_OUTPUT = "untied_output"
    """What the pass gave in which the ties were moved, [2, ...]."""
    _INPUT = "input."

    @classmethod
    def input(cls, name: str) -> str:
        """An input of the model, [2, ...]."""
        return f"{cls._INPUT}{name}"

    @classmethod
    def inputs(cls, names: Iterable[str]) -> dict[str, str]:
        """The model's inputs among ``names``: their keys, by the name of the input."""
        return {x.removeprefix(cls._INPUT): x for x in names if x.startswith(cls._INPUT)}

    @staticmethod
    def x(quantizer: str) -> str:
        """Return what a quantizer quantizes, [4, ...]."""
        return f"site.{quantizer}.x"

    @staticmethod
    def codes(quantizer: str) -> str:
        """The codes of that, [4, ...]."""
        return f"site.{quantizer}.codes"

    @staticmethod
    def ties(quantizer: str) -> str:
        """The places of ties in all four rows, counted in C order; absent where there are none."""
        return f"site.{quantizer}.ties"

    @staticmethod
    def untied(quantizer: str) -> str:
        """The values moved there."""
        return f"site.{quantizer}.untied"

    @staticmethod
    def y(layer: str) -> str:
        """A layer's or product's output: [4, ...] of those that read the record's quantizers, [2,
        ...] of others that are upstream of a float part.
        """
        return f"layer.{layer}.y"

    @staticmethod
    def operand(product: str, index: int) -> str:
        """A float operand of a product, [4, ...]."""
        return f"operand.{product}.{index}"

    @staticmethod
    def rounding(name: str) -> str:
        """How much rounding alone changes the float part before a quantizer, a product or the
        output, float32 [2].
        """
        return f"rounding.{name}"


@dataclass(frozen=True)
class Record:
    """A record with its tensors, which :class:`Key` names."""

    entry: RecordEntry
    tensors: Mapping[str, NDArray[Any]]

    @property
    def bucket(self) -> NDArray[np.int64]:
        """The buckets of the four rows."""
        return self.tensors[Key.BUCKET]

    def sensitivity(self, half: str | None) -> tuple[float, float] | None:
        """That of the model as it is, or with activations of a low-precision type; None where it
        was not measured.
        """
        return (
            self.entry.sensitivity
            if half is None or self.entry.half_sensitivity is None
            else self.entry.half_sensitivity[half]
        )

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """The model's inputs, end to end."""
        return {name: self.tensors[key] for name, key in Key.inputs(self.tensors).items()}

    def untied(self, quantizer: str) -> NDArray[Any]:
        """The quantizer's tensor with the values on ties moved to the middle of their codes: what
        its layers' outputs are computed from.
        """
        x = self.tensors[Key.x(quantizer)]
        if Key.ties(quantizer) in self.tensors:
            x.flat[self.tensors[Key.ties(quantizer)]] = self.tensors[Key.untied(quantizer)]
        return x

    def is_whole(self, layers: Iterable[str]) -> bool:
        """Whether it holds what belongs to its quantizers, their readers ``layers``, and its
        products.
        """
        quantizers, products = self.entry.sites, self.entry.products
        needed = {Key.BUCKET, Key.OUTPUT, Key.UNTIED_OUTPUT}
        needed |= {key(quantizer) for quantizer in quantizers for key in (Key.x, Key.codes)}
        needed |= {Key.y(name) for name in (*layers, *products)}
        needed |= {Key.rounding(name) for name in (*quantizers, *products, OUTPUT)}
        return needed <= self.tensors.keys()


def write_tensors(tensors: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Write a record's tensors, whole or not at all; raise OSError or QuestDeployError where it
    cannot be.
    """
    try:
        with atomic_file(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, temporary)
            # safetensors lets nobody else read its files, whatever the umask says.
            temporary.chmod(mode)
    except SafetensorError as e:
        if found := re.search(r"os error (\d+)", str(e)):  # such as a full disk
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from e
        raise QuestDeployError(f"{path.name} cannot be written: {e}") from e


def write_tables(tables: Mapping[str, Tables], folder: Path) -> None:
    """Write each quantizer's tables, by the quantizer's name."""
    write_tensors(
        {
            f"{quantizer}.{table.name}": getattr(of_quantizer, table.name)
            for quantizer, of_quantizer in tables.items()
            for table in fields(of_quantizer)
        },
        folder / TABLES,
    )


def load_reference(folder: Path) -> tuple[list[Record], dict[str, Tables]]:
    """The records, whose tensors are read when they are asked for, and each quantizer's tables;
    raise InputError where one is missing or damaged.
    """
    index = ReferenceIndex.read(folder)
    try:
        records = [Record(entry, StoredTensors(folder / entry.file)) for entry in index.records]
        return records, _tables(read_tensors(folder / TABLES))
    except (KeyError, OSError, SafetensorError) as e:
        raise InputError(
            f"{folder}: not a readable reference ({type(e).__name__}: {e}); {_REPAIR}"
        ) from e


def _tables(stored: dict[str, NDArray[Any]]) -> dict[str, Tables]:
    tables: dict[str, Tables] = {}
    for quantizer in (key.removesuffix(".scale") for key in stored if key.endswith(".scale")):
        kind = IntegerTables if f"{quantizer}.channel" in stored else PerChannelTables
        tables[quantizer] = kind(
            **{table.name: stored[f"{quantizer}.{table.name}"] for table in fields(kind)}
        )
    return tables
