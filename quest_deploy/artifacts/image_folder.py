"""A folder of images that a model inpaints or edits, and whether it is still the same."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from quest_deploy.artifacts.schema import validated
from quest_deploy.errors import InputError
from quest_deploy.files import read_bounded, sha256_of_json

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
FLAG = "--image-folder"
"""The option that names it, unless another does."""
MOST_IMAGES = 10_000
MOST_BYTES = 2**26
"""Of an image's file."""


@validated("image folder")
@dataclass(frozen=True)
class ImageFolder:
    """A folder by its absolute path, with a hash of its images' names and contents."""

    path: str
    sha256: str

    @classmethod
    def of(cls, folder: Path | str, flag: str = FLAG) -> ImageFolder:
        """The folder as it is now; raise InputError, which names the ``flag``, where it holds no
        image.
        """
        path = Path(os.path.realpath(folder))  # Path.resolve raises for a link to itself
        return cls(str(path), _hash(path, flag))

    def files(self, flag: str = FLAG) -> list[Path]:
        """Its images, by name; raise InputError where they are not what they were."""
        path = Path(self.path)
        if _hash(path, flag) != self.sha256:
            raise InputError(f"the images in {path} were changed; restore them, or calibrate anew")
        return _images(path, flag)


def _images(folder: Path, flag: str) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{flag} {folder}: expected a folder of images")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not 1 <= len(found) <= MOST_IMAGES:
        raise InputError(
            f"{flag} {folder}: expected 1 to {MOST_IMAGES} images ({', '.join(SUFFIXES)}), "
            f"found {len(found)}"
        )
    return found


def _hash(folder: Path, flag: str) -> str:
    contents = (
        (path.name, read_bounded(path, MOST_BYTES, f"give {flag} a folder of images"))
        for path in _images(folder, flag)
    )
    return sha256_of_json({name: hashlib.sha256(each).hexdigest() for name, each in contents})
