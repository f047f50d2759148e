"""Reads and writes safetensors files a tensor at a time, where all would fill the memory."""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quest_deploy.artifacts.tensors import open_tensors
from quest_deploy.errors import InputError
from quest_deploy.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import BinaryIO

    from numpy.typing import NDArray

_LENGTH = "<Q"
"""Of the header, before it."""
_TYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "I16": np.int16,
        "U16": np.uint16,
        "F16": np.float16,
        "I32": np.int32,
        "U32": np.uint32,
        "F32": np.float32,
        "F64": np.float64,
        "I64": np.int64,
        "U64": np.uint64,
    }.items()
}
"""NumPy's types by the format's names, as the library orders them in a file, the last first."""


@dataclass(frozen=True, eq=False)
class LazyArray:
    """An array that is read from a file, or computed, each time that it is asked for, by
    ``numpy.asarray``.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], NDArray[Any]]

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes in memory."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        found = self.read()
        return found if dtype is None else found.astype(dtype, copy=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied, and sent to other processes, as what it is now."""
        return np.asarray, (self.read(),)


Array = np.ndarray[Any, Any] | LazyArray


def stored_tensors(path: Path) -> tuple[dict[str, str], dict[str, LazyArray]]:
    """The metadata of a file, and its tensors by name, none of them in memory: each is read again
    whenever it is asked for, from this very file, also where another has taken its name since.

    Reading one raises InputError where its type is none of NumPy's, or the file was written to
    since.

    Raises:
        InputError, OSError, SafetensorError: as :func:`open_tensors`.
    """
    with open_tensors(path):  # the library checks that the header fits the file
        pass
    stream, reading = open_regular(path), threading.Lock()
    opened = _version(stream)
    (length,) = struct.unpack(_LENGTH, stream.read(8))
    header = json.loads(stream.read(length))
    metadata = header.pop("__metadata__", None) or {}

    def stored(name: str, dtype: str, shape: list[int], start: int) -> LazyArray:
        def read() -> NDArray[Any]:
            if dtype not in _TYPES:
                raise InputError(f"{path}: {name}: expected one of NumPy's types, found {dtype}")
            found = np.empty(shape, _TYPES[dtype])
            # Not the library, which maps the file: what was read once would stay in memory.
            with reading:
                stream.seek(8 + length + start)
                whole = stream.readinto(found.reshape(-1).view(np.uint8).data) == found.nbytes
            if not whole or _version(stream) != opened:
                raise InputError(f"{path} was changed while it was read; run the command again")
            return found

        return LazyArray(tuple(shape), _TYPES.get(dtype, np.dtype(np.void)), read)

    return metadata, {
        name: stored(name, entry["dtype"], entry["shape"], entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _version(stream: BinaryIO) -> tuple[int, int]:
    """What changes when an open file is written to."""
    found = os.fstat(stream.fileno())
    return found.st_size, found.st_mtime_ns


def write_tensors(
    file: BinaryIO,
    tensors: Mapping[str, Array],
    metadata: Mapping[str, str],
    check: Callable[[str, NDArray[Any]], None],
) -> None:
    """Write a safetensors file, a tensor at a time: the same bytes for the same content, the
    library's own but for the metadata, which it writes in an order that changes from call to call.

    Args:
        check: called with each tensor and its name before it is written.
    """
    # Not the library's save_file: its errors on a full disk are no OSError.
    ranks = list(_TYPES.values())
    names = sorted(tensors, key=lambda name: (-ranks.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    types, end = {dtype: name for name, dtype in _TYPES.items()}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": types[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack(_LENGTH, len(text)) + text)
    for name in names:
        array = np.ascontiguousarray(tensors[name])
        check(name, array)
        file.write(array.reshape(-1).view(np.uint8).data)
