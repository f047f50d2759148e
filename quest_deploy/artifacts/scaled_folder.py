"""A ControlNet or T2I-adapter that the user names, and whether it is still the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from quest_deploy.artifacts.model_source import fingerprint
from quest_deploy.artifacts.schema import validated
from quest_deploy.errors import InputError
from quest_deploy.files import absolute

CONFIGURATION = "config.json"


@validated("ControlNet or T2I-adapter")
@dataclass(frozen=True)
class ScaledFolder:
    """The folder of a ControlNet or T2I-adapter in diffusers' layout, the scale of what it adds,
    and the folder's :func:`quest_deploy.artifacts.model_source.fingerprint`.
    """

    path: str
    scale: float
    fingerprint: str

    @classmethod
    def parse(cls, text: str, flag: str) -> ScaledFolder:
        """Read "FOLDER" or "FOLDER:SCALE"; raise InputError, which names the ``flag``, where there
        is no such folder, or the scale is no positive number.
        """
        name, colon, number = text.rpartition(":")
        whole = not colon or Path(text).is_dir()  # a path may hold colons, C:\ among them
        path, scale = (Path(text), 1.0) if whole else (Path(name), _number(number))
        if scale is None:
            raise InputError(
                f"{flag} {text}: expected FOLDER:SCALE with a finite scale above 0, such as "
                "canny:0.8"
            )
        if not (path / CONFIGURATION).is_file():
            raise InputError(
                f"{flag} {text}: expected its folder in diffusers' layout, and {path} has no "
                f"{CONFIGURATION}"
            )
        return cls(str(absolute(path)), scale, fingerprint(path))

    def check(self) -> Path:
        """Its folder; raise InputError where it is another one by now."""
        path = Path(self.path)
        if not path.is_dir() or fingerprint(path) != self.fingerprint:
            raise InputError(
                f"{path} was changed or removed meanwhile; run the command again with it"
            )
        return path


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
