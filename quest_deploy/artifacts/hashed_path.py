"""A file or a folder that the user names for a stage, and whether it is still the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quest_deploy.artifacts.schema import validated
from quest_deploy.errors import InputError
from quest_deploy.files import absolute, sha256_of, sha256_of_json


@validated("file or folder")
@dataclass(frozen=True)
class HashedPath:
    """A file or folder by its absolute path, with its content's SHA-256: a folder's is of the names
    and hashes of the files in it, but for hidden ones and those in folders of its own.
    """

    path: str
    sha256: str

    @classmethod
    def of(cls, path: Path | str, flag: str) -> HashedPath:
        """The file or folder as it is now; raise InputError where there is none, or it is a pipe or
        a device. ``flag`` is how the message calls it.
        """
        place = absolute(Path(path))
        if not place.exists():
            raise InputError(f"{flag} {path}: there is no such file or folder")
        return cls(str(place), _hash(place))

    def unchanged(self) -> Path:
        """Its path; raise InputError where its content is not what it was."""
        path = Path(self.path)
        if not path.exists() or _hash(path) != self.sha256:
            raise InputError(f"{path} was changed or removed meanwhile; run the command again")
        return path


def _hash(path: Path) -> str:
    if not path.is_dir():
        return sha256_of(path)
    files = (x for x in path.iterdir() if x.is_file() and not x.name.startswith("."))
    return sha256_of_json({x.name: sha256_of(x) for x in files})
