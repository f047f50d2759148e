"""Safetensors files that are read and written a tensor at a time."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save
from safetensors.torch import save_file as torch_save_file

from quest_deploy.artifacts.lazy_tensors import LazyArray, stored_tensors, write_tensors
from tests.helpers import refused

TYPES = ("bool", "u1", "i1", "i2", "u2", "f2", "i4", "u4", "f4", "f8", "i8", "u8")


@pytest.fixture
def tensors() -> dict[str, np.ndarray[Any, Any]]:
    """One of each type, in no order, two of one type, a scalar, an empty one and a transposed one."""
    rng = np.random.default_rng(0)
    drawn = {f"t{i}.{t}": rng.integers(0, 2, (3, i + 1)).astype(t) for i, t in enumerate(TYPES)}
    others = {"b": np.float32(3.5), "a": np.empty((2, 0), np.float32), "c": drawn["t8.f4"].T}
    return {**drawn, **{name: np.asarray(value) for name, value in others.items()}}


def written(path: Path, tensors: dict[str, Any], **metadata: str) -> Path:
    with path.open("wb") as file:
        write_tensors(file, tensors, metadata, lambda name, values: None)
    return path


def parts(content: bytes) -> tuple[list[tuple[str, Any]], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return list(header.items()), content[8 + length :]


def test_a_file_is_the_librarys_own_but_for_the_metadata(
    tmp_path: Path, tensors: dict[str, np.ndarray[Any, Any]]
) -> None:
    path = written(tmp_path / "a.safetensors", tensors, kind="a test", version="2")
    ours = {
        name: np.ascontiguousarray(value).reshape(value.shape) for name, value in tensors.items()
    }
    assert parts(path.read_bytes()) == parts(save(ours))
    with safe_open(path, "numpy") as stream:
        assert stream.metadata() == {"kind": "a test", "version": "2"}
        for name, value in tensors.items():
            np.testing.assert_array_equal(stream.get_tensor(name), value, strict=True)


def test_the_same_content_in_another_order_gives_the_same_bytes(
    tmp_path: Path, tensors: dict[str, np.ndarray[Any, Any]]
) -> None:
    turned = dict(reversed(tensors.items()))
    first, second = (written(tmp_path / str(i), x) for i, x in enumerate((tensors, turned)))
    assert first.read_bytes() == second.read_bytes()


def test_tensors_are_read_when_they_are_asked_for_and_are_what_was_written(
    tmp_path: Path, tensors: dict[str, np.ndarray[Any, Any]]
) -> None:
    path = written(tmp_path / "a.safetensors", tensors, kind="a test")
    metadata, stored = stored_tensors(path)
    assert metadata == {"kind": "a test"}
    assert stored.keys() == tensors.keys()
    for name, value in tensors.items():
        lazy = stored[name]
        assert (lazy.shape, lazy.dtype, lazy.size) == (value.shape, value.dtype, value.size)
        assert lazy.nbytes == value.nbytes
        np.testing.assert_array_equal(np.asarray(lazy), value, strict=True)
        assert not np.shares_memory(np.asarray(lazy), np.asarray(lazy))


def test_tensors_are_of_the_file_that_was_opened_where_another_takes_its_name(
    tmp_path: Path,
) -> None:
    path = written(tmp_path / "a.safetensors", {"x": np.arange(5)})
    _, stored = stored_tensors(path)
    os.replace(written(tmp_path / "b.safetensors", {"x": np.arange(5) + 1}), path)
    np.testing.assert_array_equal(np.asarray(stored["x"]), np.arange(5))


def test_a_file_that_is_cut_off_after_it_was_opened_is_refused_where_it_is_read(
    tmp_path: Path,
) -> None:
    path = written(tmp_path / "a.safetensors", {"x": np.arange(5000), "y": np.arange(5)})
    _, stored = stored_tensors(path)
    os.truncate(path, 9000)
    with refused(path):
        np.asarray(stored["x"])


def test_a_file_that_is_written_over_after_it_was_opened_is_refused_where_it_is_read(
    tmp_path: Path,
) -> None:
    path = written(tmp_path / "a.safetensors", {"x": np.arange(5)})
    _, stored = stored_tensors(path)
    before = path.stat()
    path.write_bytes(written(tmp_path / "b.safetensors", {"x": np.arange(5) + 1}).read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with refused(path):
        np.asarray(stored["x"])


def test_a_type_that_numpy_lacks_is_refused_where_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch_save_file({"x": torch.ones(2, dtype=torch.bfloat16), "y": torch.ones(2)}, path)
    _, stored = stored_tensors(path)
    np.testing.assert_array_equal(np.asarray(stored["y"]), np.ones(2))
    with refused(path, "x", "BF16"):
        np.asarray(stored["x"])


def test_each_tensor_is_checked_before_it_is_written_and_one_at_a_time_is_made(
    tmp_path: Path,
) -> None:
    made, checked = [], []

    def lazy(name: str) -> LazyArray:
        def read() -> np.ndarray[Any, Any]:
            made.append(name)
            return np.full(4, len(made), np.int8)

        return LazyArray((4,), np.dtype(np.int8), read)

    def check(name: str, values: np.ndarray[Any, Any]) -> None:
        checked.append((name, int(values[0]), list(made)))

    with (tmp_path / "a.safetensors").open("wb") as file:
        write_tensors(file, {name: lazy(name) for name in "abc"}, {}, check)
    assert checked == [("a", 1, ["a"]), ("b", 2, ["a", "b"]), ("c", 3, ["a", "b", "c"])]


def test_a_lazy_array_is_sent_to_another_process_as_its_values() -> None:
    lazy = LazyArray((3,), np.dtype(np.int64), lambda: np.arange(3))
    found = pickle.loads(pickle.dumps(lazy))
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, np.arange(3), strict=True)


def test_what_the_library_overlooks_in_a_header_is_overlooked(tmp_path: Path) -> None:
    entry = {"dtype": "I8", "shape": [2], "data_offsets": [0, 2], "of": "another tool"}
    text = json.dumps({"__metadata__": None, "x": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\1\2")
    with safe_open(path, "numpy") as stream:
        assert stream.get_tensor("x").tolist() == [1, 2]
    metadata, stored = stored_tensors(path)
    assert metadata == {}
    assert np.asarray(stored["x"]).tolist() == [1, 2]


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with refused(tmp_path):
        stored_tensors(tmp_path)
