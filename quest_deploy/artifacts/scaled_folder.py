"""A ControlNet that the user names, and whether it is still the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from quest_deploy.artifacts.model_source import fingerprint
from quest_deploy.artifacts.schema import validated
from quest_deploy.errors import InputError
from quest_deploy.files import absolute

CONFIGURATION = "config.json"


@validated("ControlNet")
@dataclass(frozen=True)
class ControlNetFolder:
    """A ControlNet's folder in diffusers' layout, the scale of what it adds, and the folder's
    :func:`quest_deploy.artifacts.model_source.fingerprint`.
    """

    path: str
    scale: float
    fingerprint: str

    @classmethod
    def parse(cls, text: str) -> ControlNetFolder:
        """Read "FOLDER" or "FOLDER:SCALE"; raise InputError where there is no such folder, or the
        scale is no positive number.
        """
        name, colon, number = text.rpartition(":")
        whole = not colon or Path(text).is_dir()  # a path may hold colons, C:\ among them
        path, scale = (Path(text), 1.0) if whole else (Path(name), _number(number))
        if scale is None:
            raise InputError(
                f"--controlnet {text}: expected FOLDER:SCALE with a finite scale above 0, such as "
                "canny:0.8"
            )
        if not (path / CONFIGURATION).is_file():
            raise InputError(
                f"--controlnet {text}: expected a ControlNet's folder in diffusers' layout, and "
                f"{path} has no {CONFIGURATION}"
            )
        return cls(str(absolute(path)), scale, fingerprint(path))

    def check(self) -> Path:
        """Its folder; raise InputError where it is another one by now."""
        path = Path(self.path)
        if not path.is_dir() or fingerprint(path) != self.fingerprint:
            raise InputError(
                f"the ControlNet {path} was changed or removed meanwhile; give it again with "
                "--controlnet"
            )
        return path


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
