"""Files that are either whole or absent, also after a power cut; bounds on what is read."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import stat
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from quest_deploy.errors import InputError, QuestDeployError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TEMPORARY_PREFIX = ".tmp-"
_MAX_JSON_BYTES = 64 * 2**20
_POSIX = hasattr(os, "O_DIRECTORY")
"""Whether folders can be opened, which Windows cannot."""
PLAIN = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
"""Flags of ``os.open`` that read any file as it is, as far as this system has them."""
_LOCKED_BYTES = 2**20


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error that the disk is full say of which file: a write to an open one does not."""
    try:
        yield
    except OSError as e:
        if e.errno != errno.ENOSPC or e.filename is not None:
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it there when the block ends well, delete it
    when it does not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}"
    try:
        with naming(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        _remove_left(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Like :func:`atomic_file` for a whole folder, which replaces the one at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _fresh_folder(path.parent, path.name)
    try:
        with naming(path):
            yield temporary
            sync_all(temporary)
            replace_folder(path, temporary)
            sync(path.parent)
        _remove_left(path)
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


def _remove_left(path: Path) -> None:
    """Delete what processes that are no more left half-written of ``path``, beside it."""
    pattern = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}(\d+)-(old-)?{re.escape(path.name)}")
    for left in path.parent.glob(f"{TEMPORARY_PREFIX}*"):
        if (found := pattern.fullmatch(left.name)) and not _runs(int(found[1])):
            _delete(left)


def _runs(process: int) -> bool:
    """Whether there is such a process; Windows cannot be asked without ending it."""
    if not _POSIX:
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed process left half-written in ``folder``; put back what
    :func:`atomic_folder` had moved away by then.
    """
    for left in folder.glob(f"{TEMPORARY_PREFIX}*"):
        replaced = re.fullmatch(rf"{re.escape(TEMPORARY_PREFIX)}\d+-old-(.+)", left.name)
        if replaced and left.is_dir() and not (folder / replaced[1]).exists():
            os.replace(left, folder / replaced[1])
        else:
            _delete(left)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _fresh_folder(parent: Path, name: str) -> Path:
    temporary = parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk: a rename alone may reach it before
    what it names.
    """
    if not _POSIX and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if _POSIX else os.O_RDWR | PLAIN)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """:func:`sync` a folder and everything in it."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root, name))
        sync(Path(root))


@contextmanager
def lock(descriptor: int, *, shared: bool) -> Iterator[None]:
    """Lock an open file against other processes, or, ``shared``, against those alone that do not
    share; raise BlockingIOError where one has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows, which locks ranges of bytes
        with _lock_bytes(descriptor, shared=shared):
            yield
        return
    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    yield  # until the file is closed


@contextmanager
def _lock_bytes(descriptor: int, *, shared: bool) -> Iterator[None]:
    """Lock all bytes, or, ``shared``, one of them, each process another."""
    import msvcrt

    windows: Any = msvcrt
    count = 1 if shared else _LOCKED_BYTES
    start = random.randrange(_LOCKED_BYTES) if shared else 0
    os.lseek(descriptor, start, os.SEEK_SET)
    try:
        windows.locking(descriptor, windows.LK_NBLCK, count)
    except OSError as e:
        raise BlockingIOError(*e.args) from e
    try:
        yield
    finally:
        os.lseek(descriptor, start, os.SEEK_SET)
        windows.locking(descriptor, windows.LK_UNLCK, count)


def absolute(path: Path) -> Path:
    """The absolute path without links, but for its last part: a link is known by its own name, such
    as model.safetensors in the hub's cache, and not by that of what it leads to.
    """
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent)) / path.name


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a further name on its disk; elsewhere, and where there are none, copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def gathered(first: Path, *others: str) -> Iterator[Path]:
    """Give a path of the file ``first``, as called, beside which ``others`` lie, as called, none
    of them a link: runtimes look for a graph's weights where what a link names lies, or refuse
    links to other folders, and caches keep files under other names.

    Where links lead to such a place already, it is that; else a scratch folder, which lasts as long
    as the block.
    """
    names = [first.name, *(name for name in others if first.with_name(name).exists())]
    files = [Path(os.path.realpath(first.with_name(name))) for name in names]
    if files == [files[0].with_name(name) for name in names]:
        yield files[0]
        return
    with tempfile.TemporaryDirectory(prefix="quest-deploy-", ignore_cleanup_errors=True) as scratch:
        for file, name in zip(files, names, strict=True):
            link_or_copy(file, Path(scratch, name))
        yield Path(scratch, first.name)


def open_regular(path: Path) -> io.BufferedReader[io.FileIO]:
    """Open a file for reading; raise InputError where it is a pipe, a device or a folder, which may
    have no end or never answer.
    """
    if not _POSIX and path.is_dir():
        raise InputError(f"{path}: expected a regular file, found a folder")
    descriptor = os.open(path, os.O_RDONLY | PLAIN)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path}: expected a regular file, found another kind of file")
    return io.BufferedReader(io.FileIO(descriptor))


def check_archive(path: Path) -> None:
    """Raise InputError where a file that torch.save wrote would take more memory than it has bytes:
    it writes nothing compressed, and a few compressed megabytes could fill any machine.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if not zipfile.is_zipfile(stream):
            return  # in the format of before, whose tensors lie in the file as they are
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or size < sum(
        entry.file_size for entry in entries
    ):
        raise InputError(f"{path}: expected an archive without compression, as torch.save writes")


def read_bounded(path: Path, most: int, repair: str) -> bytes:
    """The content of a regular file.

    Raises:
        InputError: it cannot be opened, is not a regular file, or has more than ``most`` bytes;
            the message ends with ``repair``, what to do.
    """
    try:
        with open_regular(path) as stream:
            content = stream.read(most + 1)  # not stat, whose answer may be another one by now
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist; {repair}") from e
    except OSError as e:  # a link to itself, no permission
        raise InputError(f"{path} cannot be read ({e.strerror}); {repair}") from e
    if len(content) > most:
        raise InputError(f"{path}: expected a file of at most {most} bytes; {repair}")
    return content


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as hex; raise InputError where it is not a regular file."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """The SHA-256 of a JSON value in its canonical form (sorted keys, no spaces), as hex."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The JSON object with the SHA-256 of its canonical form, so that an edit is noticed."""
    return {**content, "sha256": sha256_of_json(content)}


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all.

    Raises:
        QuestDeployError: it holds a number that is not finite.
        InputError: it holds a text that :func:`read_json` would refuse, see :func:`check_text`.
    """
    if (place := _not_finite(value)) is not None:
        raise QuestDeployError(f"{path.name} would hold a number that is not finite: {place}")
    text = json.dumps(value, indent=1) + "\n"
    if "\\ud" in text:
        check_text(value, path.name)
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def check_text(value: Any, what: str) -> None:
    """Raise InputError where a JSON value holds half of a surrogate pair: Python has it for bytes
    of a name or an argument that are no UTF-8, and no reader of JSON takes it.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        near = e.object[max(0, e.start - 30) : e.end + 10]
        raise InputError(
            f"{what}: expected names and texts in UTF-8, found {near!r}; rename the file, or give "
            "another text"
        ) from e


def _not_finite(value: Any, place: str = "") -> str | None:
    """Where the first number that is not finite stands, such as "results.FP32"; None if nowhere."""
    if isinstance(value, float) and not math.isfinite(value):
        return place
    if isinstance(value, dict):
        parts: Iterable[tuple[Any, Any]] = value.items()
    else:
        parts = enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = (_not_finite(part, f"{place}.{key}".lstrip(".")) for key, part in parts)
    return next((x for x in found if x is not None), None)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} fits no float")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"a name is there twice, of {', '.join(found)}"[:200])
    return found


def read_json(path: Path, *, repair: str = "make it again", infinities: bool = False) -> Any:
    """Read a JSON file; raise InputError, which ends with what to do (``repair``), where it is
    missing, too large or not JSON in UTF-8. What readers of JSON read differently, names that are
    there twice and numbers that fit no float, is refused, as the C++ runtime does.

    Args:
        infinities: take NaN, Infinity and -Infinity, which are no JSON, but which Python writes.
    """
    content = read_bounded(path, _MAX_JSON_BYTES, repair)
    try:
        text = content.decode("utf-8-sig")
        value = json.loads(
            text,
            parse_constant=None if infinities else _refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
        if "\\ud" in text.lower():  # half of a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as e:
        # ValueError: no UTF-8, no JSON, or an integer of thousands of digits
        raise InputError(f"{path}: expected JSON, found something else ({e}); {repair}") from e


def size(count: float) -> str:
    """A number of bytes as people read it (1 MB = 10^6 bytes)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
