from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn
from unittest.mock import Mock

import pytest

from quest_deploy import files
from quest_deploy.files import (
    atomic_file,
    atomic_folder,
    gathered,
    read_json,
    remove_temporaries,
    sha256_of,
    sha256_of_json,
    write_json,
)
from tests.helpers import refused


class StopError(Exception):
    """What interrupts a write."""


def interrupt_after(write: Callable[[], object]) -> NoReturn:
    write()
    raise StopError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_whole_and_in_a_folder_that_did_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["a.txt"]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(StopError), atomic_file(path) as temporary:
        interrupt_after(lambda: temporary.write_text("half"))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_names_the_file_that_was_to_be(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match="No space") as caught, atomic_file(path) as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("content")
    assert caught.value.filename == str(path)


def test_a_folder_replaces_the_old_one_entirely(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("old", "new"):
        with atomic_folder(path) as temporary:
            (temporary / name).write_text(name)
    assert names(path) == ["new"]
    assert names(tmp_path) == ["folder"]


def test_an_exception_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(StopError), atomic_folder(path) as temporary:
        interrupt_after(lambda: (temporary / "new").write_text("half"))
    assert names(path) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    replace = os.replace

    def refuse_new(a: Path, b: Path) -> None:
        if Path(b) == path and "-old-" not in Path(a).name:
            raise OSError("disk trouble")
        replace(a, b)

    monkeypatch.setattr(os, "replace", refuse_new)
    with pytest.raises(OSError, match="disk trouble"), atomic_folder(path) as temporary:
        (temporary / "new").write_text("whole")
    assert path.is_dir()
    assert names(path) == ["old"]


@pytest.mark.parametrize("restore_fails", [False, True])
def test_ctrl_c_while_folders_are_renamed_loses_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, restore_fails: bool
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    replace = os.replace

    def interrupted(a: Path, b: Path) -> None:
        if "-old-" in Path(a).name and restore_fails:
            raise OSError("disk trouble")
        replace(a, b)
        if "-old-" in Path(b).name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises((KeyboardInterrupt, OSError)), atomic_folder(path) as temporary:
            (temporary / "new").write_text("whole")
    assert path.exists() is not restore_fails
    remove_temporaries(tmp_path)
    assert names(tmp_path) == ["folder"]
    assert names(path) == ["old"]


def test_a_folder_that_a_killed_process_had_moved_away_is_put_back_unless_the_new_one_is_there(
    tmp_path: Path,
) -> None:
    for name in ("a", "b"):
        old = tmp_path / f"{files.TEMPORARY_PREFIX}12-old-{name}"
        old.mkdir()
        (old / "old").write_text("old")
    (tmp_path / "b").mkdir()
    remove_temporaries(tmp_path)
    assert names(tmp_path) == ["a", "b"]
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["old"], [])


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_what_a_killed_process_left_beside_a_file_is_deleted_by_the_next_to_write_it(
    tmp_path: Path, write: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    ended = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    gone = ended.stdout.strip()
    for name in (f"{gone}-a", f"{gone}-old-a", f"{gone}-b", f"{os.getppid()}-a"):
        (tmp_path / f".tmp-{name}").mkdir()
    with write(tmp_path / "a") as temporary:
        temporary.exists() or temporary.touch()
    assert names(tmp_path) == sorted([f".tmp-{gone}-b", f".tmp-{os.getppid()}-a", "a"])


def test_what_a_killed_process_left_is_overwritten_and_can_be_removed(tmp_path: Path) -> None:
    left = tmp_path / f"{files.TEMPORARY_PREFIX}{os.getpid()}-folder"
    left.mkdir()
    (left / "stale").write_text("stale")
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "new").write_text("new")
    assert names(tmp_path / "folder") == ["new"]
    (tmp_path / f"{files.TEMPORARY_PREFIX}1-a").write_text("half")
    (tmp_path / f"{files.TEMPORARY_PREFIX}1-b").mkdir()
    remove_temporaries(tmp_path)
    assert names(tmp_path) == ["folder"]


def test_json_survives_writing_and_reading(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "ä": {"b": "c"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_what_is_written_as_json_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"smile": "\N{GRINNING FACE}"})
    assert read_json(path) == {"smile": "\N{GRINNING FACE}"}
    # What Python makes of a byte that is no UTF-8, in a file's name or an argument.
    for value in ({"path": ["a\udcffb"]}, {"a\udcff": 1}):
        with refused("a.json", "UTF-8"):
            write_json(path, value)
    assert read_json(path) == {"smile": "\N{GRINNING FACE}"}


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == 1
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{'a': 1}", b"\xff\xfe", b"[1] [2]", b"[" * 200_000],
    ids=lambda c: repr(c[:8]),
)
def test_a_file_that_is_not_json_is_an_input_error_with_its_path(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with refused(tmp_path / "a.json"):
        read_json(path)


def test_a_missing_json_file_and_a_folder_in_its_place_are_input_errors_with_the_path(
    tmp_path: Path,
) -> None:
    with refused(tmp_path / "a.json"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").mkdir()
    with refused(tmp_path / "b.json"):
        read_json(tmp_path / "b.json")


def test_a_json_file_beyond_the_limit_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_MAX_JSON_BYTES", 4)
    path = tmp_path / "a.json"
    path.write_text("1234")
    assert read_json(path) == 1234
    path.write_text("12345")
    with refused(path, 4):
        read_json(path)


def test_hashes_are_sha256_of_the_bytes_and_of_canonical_json(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert sha256_of_json({"b": 1, "a": [1, 2]}) == hashlib.sha256(b'{"a":[1,2],"b":1}').hexdigest()
    assert sha256_of_json(json.loads('{"a": [1, 2], "b": 1}')) == sha256_of_json(
        {"b": 1, "a": [1, 2]}
    )


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_files_that_links_lead_to_under_other_names_are_gathered_under_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    graph, store = tmp_path / "graph", tmp_path / "store"
    for name, blob in (("graph", "ab/1"), ("weights", "cd/2")):
        (store / blob).parent.mkdir(parents=True)
        (store / blob).write_text(name)
        (tmp_path / name).symlink_to(store / blob)
    if not links:
        monkeypatch.setattr("os.link", Mock(side_effect=OSError(errno.EXDEV, "another disk")))
    with gathered(graph, "weights", "none") as found:
        folder = found.parent
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            "graph": "graph",
            "weights": "weights",
        }
        assert not any(path.is_symlink() for path in folder.iterdir())
        assert found.samefile(store / "ab" / "1") == links
    assert not folder.exists()


def test_files_that_lie_under_their_own_names_are_read_where_they_are(tmp_path: Path) -> None:
    real, links = tmp_path / "real", tmp_path / "links"
    for folder in (real, links):
        folder.mkdir()
    for name in ("graph", "weights"):
        (real / name).write_text(name)
        (links / name).symlink_to(real / name)
    for folder in (real, links):
        with gathered(folder / "graph", "weights") as found:
            assert found == real / "graph"
