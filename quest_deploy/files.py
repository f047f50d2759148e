"""Files that are either whole or absent: temporary names, renames, hashes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

TEMPORARY_PREFIX = ".tmp-"
_MAX_JSON_BYTES = 64 * 2**20


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it there when the block ends well, delete it
    when it does not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_files(folder: Path, *, last: str) -> Iterator[Path]:
    """Like :func:`atomic_file` for several files of ``folder`` that belong together: ``last`` is
    renamed after the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = _fresh_folder(folder, last)
    try:
        yield temporary
        for written in sorted(temporary.iterdir(), key=lambda p: p.name == last):
            os.replace(written, folder / written.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Like :func:`atomic_file` for a whole folder, which replaces the one at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _fresh_folder(path.parent, path.name)
    try:
        yield temporary
        replace_folder(path, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(path: Path, new: Path) -> None:
    """Rename the folder ``new``, on the same disk, to ``path``, and delete what is there; where
    that fails, nothing has changed.
    """
    replaced = path.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-old-{path.name}"
    try:
        if path.exists():
            os.replace(path, replaced)
        os.replace(new, path)
    except BaseException:
        # Once the new folder is in place the old one is not wanted back.
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed process left half-written in ``folder``; put back what
    :func:`atomic_folder` had moved away by then.
    """
    for left in folder.glob(f"{TEMPORARY_PREFIX}*"):
        replaced = re.fullmatch(rf"{re.escape(TEMPORARY_PREFIX)}\d+-old-(.+)", left.name)
        if replaced and left.is_dir() and not (folder / replaced[1]).exists():
            os.replace(left, folder / replaced[1])
        else:
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(
                missing_ok=True
            )


def _fresh_folder(parent: Path, name: str) -> Path:
    temporary = parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """The SHA-256 of a JSON value in its canonical form (sorted keys, no spaces), as hex."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: Path, *, repair: str = "make it again") -> Any:
    """Read a JSON file; raise InputError, which ends with what to do (``repair``), where it is
    missing, too large or not JSON.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise InputError(
                f"{path}: expected a JSON file of at most {_MAX_JSON_BYTES} bytes, found "
                f"{path.stat().st_size}; {repair}"
            )
        return json.loads(path.read_text())
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist; {repair}") from e
    except (
        IsADirectoryError,
        ValueError,
        RecursionError,
    ) as e:  # ValueError: no UTF-8, no JSON, or an integer of thousands of digits
        raise InputError(f"{path}: expected JSON, found something else ({e}); {repair}") from e
